// y = a + b, elementwise.
{% import "shared/entry.wgsl" as entry %}

struct Params {
    first_group: u32,
    groups: u32,
    quads: u32,
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> b: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>;

{% call entry.each_quad(threads) %}
    y[i] = a[i] + b[i];
{% endcall %}
