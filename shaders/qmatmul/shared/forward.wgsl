// Parameters, operands and result of every form of the fused product; `QmatmulParams` in
// src/kernels/qmatmul/call.rs.
struct Params {
    first_group: u32,
    groups: u32,
    k: u32,
    n: u32,             // rows of W in this part
    row: u32,           // first row of X
    rows: u32,          // rows of X from there on
    column: u32,        // column of Y for this part's first row of W
    y_stride: u32,      // columns of Y
    splits: u32,        // parts of the contracted index that are summed separately
    rank: u32,          // 0: no adapter
    bias_rows: u32,     // 0: no bias; 1: all rows of Y share it; else one for each row
    lora_scale: f32,
    m: Matrix,
}

{% include "shared/matrix_params.wgsl" %}

{# H and B are read four ranks at a time. #}
{% set ranks = "vec4<f32>" if rank_quads is defined and rank_quads else "f32" %}
{% set x_type = "vec4<u32>" if packed is defined else "f32" if ragged or share else "vec4<f32>" %}
{% set y_type = "vec4<f32>" if quads is defined and quads else "f32" %}
{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> x: array<{{ x_type }}>;
@group(0) @binding(1) var<storage, read> w: array<u32>;
@group(0) @binding(2) var<storage, read> bias: array<{{ y_type }}>;
@group(0) @binding(3) var<storage, read> h: array<{{ ranks }}>;
@group(0) @binding(4) var<storage, read> b: array<{{ ranks }}>;

// Place of the bias for a row of Y and a column.
fn bias_at(row: u32, column: u32) -> u32 {
    return select(0u, row * p.y_stride, p.bias_rows > 1u) + column;
}
