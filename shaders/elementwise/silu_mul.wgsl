// y = silu(gate) * up, elementwise; silu(g) = g / (1 + exp(-g)).
{% import "shared/entry.wgsl" as entry %}

struct Params {
    first_group: u32,
    groups: u32,
    quads: u32,
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> gate: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> up: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>;

{% call entry.each_quad(threads) %}
    let g = gate[i];
    // exp of a number up to 0 cannot overflow.
    let e = exp(-abs(g));
    let sigmoid = select(e, vec4<f32>(1.0), g >= vec4<f32>(0.0)) / (vec4<f32>(1.0) + e);
    y[i] = g * sigmoid * up[i];
{% endcall %}
