// H = X * A^T with dropout on X: [M, r] from X [M, K] and A [r, K]; both row-major f32.

struct Params {
    first_group: u32,
    groups: u32,
    k: u32,
    rows: u32,        // M
    rank: u32,
    rank_groups: u32, // workgroups along the rank
    seed_low: u32,    // of the dropout
    seed_high: u32,
    drop_below: u32,  // a value whose hash is under this is dropped
    keep_scale: f32,  // 1 / (1 - probability)
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> x: array<{{ "f32" if ragged else "vec4<f32>" }}>;
@group(0) @binding(1) var<storage, read> a: array<{{ "f32" if ragged else "vec4<f32>" }}>;
@group(0) @binding(2) var<storage, read_write> h: array<f32>;

{% include "groups.wgsl" %}
{% set operand = "x" %}
{% include "rows.wgsl" %}
{% if dropout %}
{% include "dropout.wgsl" %}
{% endif %}

{% set operand = "a" %}
{% include "rows.wgsl" %}

fn left4(row: u32, q: u32) -> vec4<f32> {
{% if dropout %}
    let i = row * p.k + 4u * q;
    return x4(row, q) * vec4<f32>(dropout_factor(i), dropout_factor(i + 1u), dropout_factor(i + 2u), dropout_factor(i + 3u));
{% else %}
    return x4(row, q);
{% endif %}
}

fn right4(j: u32, q: u32) -> vec4<f32> {
    return a4(j, q);
}

{% set result = "h" %}
{% set scale = "" %}
{% include "skinny.wgsl" %}
