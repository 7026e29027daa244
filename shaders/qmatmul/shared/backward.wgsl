// Parameters and operands of every form of the input gradient; `QmatmulDxParams` in
// src/kernels/qmatmul/dx/call.rs.
struct Params {
    first_group: u32,
    groups: u32,
    k: u32,             // columns of dX
    words: u32,         // of eight columns, in a row of dX
    n: u32,             // rows of W in this part
    row: u32,           // first row of dX
    rows: u32,          // rows of dX from there on
    column: u32,        // column of dY for this part's first row of W
    dy_stride: u32,     // columns of dY
    splits: u32,        // parts of the contracted index that are summed separately
    rank: u32,          // 0: no adapter, or an earlier part has added it
    accumulate: u32,    // 1: add to dX
    seed_low: u32,      // of the dropout
    seed_high: u32,
    drop_below: u32,    // values with a hash below this are dropped
    keep_scale: f32,    // 1 / (1 - probability)
    m: Matrix,
}

{% include "shared/matrix_params.wgsl" %}

{{ param_space }} p: Params;
{% set wide = wide is defined and wide %}
{% set packed = packed is defined %}
{% set dy_type = "vec4<u32>" if packed else "vec4<f32>" if wide and quads else "f32" %}
{# G is read four ranks at a time. #}
{% set ranks = "vec4<f32>" if rank_quads is defined and rank_quads else "f32" %}
@group(0) @binding(0) var<storage, read> dy: array<{{ dy_type }}>;
@group(0) @binding(1) var<storage, read> w: array<u32>;
@group(0) @binding(2) var<storage, read> g: array<{{ ranks }}>;
@group(0) @binding(3) var<storage, read> a: array<{{ "f32" if ragged else "vec4<f32>" }}>;

{% if dropout %}
{% include "shared/dropout.wgsl" %}

// Dropout factors of the elements [row, k .. k + 4] of X.
fn dropout_factor4(row: u32, k: u32) -> vec4<f32> {
    let i = row * p.k + k;
    return vec4<f32>(
        dropout_factor(i), dropout_factor(i + 1u), dropout_factor(i + 2u), dropout_factor(i + 3u),
    );
}
{% endif %}

{% if wide and not ragged %}
// dX[row, 4q .. 4q + 4]
fn load4(row: u32, q: u32) -> vec4<f32> {
    return dx[row * (p.k >> 2u) + q];
}

fn store4(row: u32, q: u32, values: vec4<f32>) {
    dx[row * (p.k >> 2u) + q] = values;
}
{% else %}
// dX[row, 4q .. 4q + 4], up to the last column.
fn load4(row: u32, q: u32) -> vec4<f32> {
    let at = row * p.k + 4u * q;
{% if ragged %}
    let left = p.k - min(p.k, 4u * q);
    var values = vec4<f32>(0.0);
{% for e in range(4) %}
    if (left > {{ e }}u) { values.{{ "xyzw"[e] }} = dx[at + {{ e }}u]; }
{% endfor %}
    return values;
{% else %}
    return vec4<f32>(dx[at], dx[at + 1u], dx[at + 2u], dx[at + 3u]);
{% endif %}
}

fn store4(row: u32, q: u32, values: vec4<f32>) {
    let at = row * p.k + 4u * q;
{% if ragged %}
    let left = p.k - min(p.k, 4u * q);
{% endif %}
{% for e in range(4) %}
{% if ragged %}
    if (left > {{ e }}u) { dx[at + {{ e }}u] = values.{{ "xyzw"[e] }}; }
{% else %}
    dx[at + {{ e }}u] = values.{{ "xyzw"[e] }};
{% endif %}
{% endfor %}
}
{% endif %}

{% if wide and not packed %}
// Four values of a row of this part's columns of dY, from the n-th on; zero past the end.
fn dy4(row: u32, n: u32) -> vec4<f32> {
{% if quads %}
    let values = dy[(row * p.dy_stride + p.column + min(n, p.n - 4u)) >> 2u];
    return select(vec4<f32>(0.0), values, n < p.n);
{% else %}
    let place = vec4<u32>(n) + vec4<u32>(0u, 1u, 2u, 3u);
    let at = min(place, vec4<u32>(p.n - 1u)) + vec4<u32>(row * p.dy_stride + p.column);
    let values = vec4<f32>(dy[at.x], dy[at.y], dy[at.z], dy[at.w]);
    return select(vec4<f32>(0.0), values, place < vec4<u32>(p.n));
{% endif %}
}
{% endif %}
