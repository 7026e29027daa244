// Gradients of y = silu(gate) * up, elementwise, with s = 1 / (1 + exp(-gate)):
// d_gate = dy * up * s * (1 + gate * (1 - s)), d_up = dy * gate * s.
{% import "shared/entry.wgsl" as entry %}

struct Params {
    first_group: u32,
    groups: u32,
    quads: u32,
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> dy: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> gate: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> up: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> d_gate: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> d_up: array<vec4<f32>>;

{% call entry.each_quad(threads) %}
    let one = vec4<f32>(1.0);
    let g = gate[i];
    let e = exp(-abs(g));
    let positive = g >= vec4<f32>(0.0);
    // s and 1 - s, without subtracting nearly equal values.
    let s = select(e, one, positive) / (one + e);
    let rest = select(one, e, positive) / (one + e);
    let d = dy[i];
    d_gate[i] = d * up[i] * s * (one + g * rest);
    d_up[i] = d * g * s;
{% endcall %}
