// Copies rows of K and of V [M, width]: keys[first + i] = k[i], values[first + i] = v[i].
{% import "shared/entry.wgsl" as entry %}

struct Params {
    first_group: u32,
    groups: u32,
    quads: u32, // of k
    at: u32,    // place of the first row in the cache, in quads
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> keys: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> values: array<vec4<f32>>;

{% call entry.each_quad(threads) %}
    keys[p.at + i] = k[i];
    values[p.at + i] = v[i];
{% endcall %}
