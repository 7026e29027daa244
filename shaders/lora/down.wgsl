// H = X * A^T with dropout on X: [M, r] from X [M, K] and A [r, K]; both row-major f32. Computes
// up to three A at a time, which read the same X and drop different values of it.
//
// Floor: the 4 M K bytes of X over the bandwidth, or 2 M K r FLOP per A over the rate of f32.
{% import "shared/entry.wgsl" as entry %}
{% import "shared/row_quads.wgsl" as row_quads %}

struct Params {
    first_group: u32,
    groups: u32,
    k: u32,
    rows: u32,        // M
    rank: u32,        // of every A
    rank_groups: u32, // workgroups along the rank
    seed_low: u32,    // of the dropout of the first A
    seed_high: u32,
    seed_low1: u32,   // of the second
    seed_high1: u32,
    seed_low2: u32,   // of the third
    seed_high2: u32,
    drop_below: u32,  // values with a hash below this are dropped
    keep_scale: f32,  // 1 / (1 - probability)
}

{{ param_space }} p: Params;
{% set type = "f32" if ragged else "vec4<f32>" %}
@group(0) @binding(0) var<storage, read> x: array<{{ "f32" if share else type }}>;
@group(0) @binding(1) var<storage, read> a: array<{{ type }}>;
@group(0) @binding(2) var<storage, read> a1: array<{{ type }}>;
@group(0) @binding(3) var<storage, read> a2: array<{{ type }}>;
@group(0) @binding(4) var<storage, read_write> h: array<f32>;
@group(0) @binding(5) var<storage, read_write> h1: array<f32>;
@group(0) @binding(6) var<storage, read_write> h2: array<f32>;

{% if dropout %}
{% include "shared/dropout.wgsl" %}
{% endif %}
{% for part in range(parts) %}
{% set a, h = "a" ~ (part or ""), "h" ~ (part or "") %}

{{ row_quads.load(a) }}
{% if dropout %}

// Dropout factor of an element of X, for this A.
fn mask_{{ part }}(row: u32, k: u32) -> f32 {
    let i = row * p.k + k;
    return dropout_factor_of(i, p.seed_low{{ part or "" }}, p.seed_high{{ part or "" }});
}
{% endif %}

fn right4_{{ part }}(j: u32, q: u32) -> vec4<f32> {
    return {{ a }}4(j, q);
}

fn store_{{ part }}(at: u32, sum: f32) {
    {{ h }}[at] = sum;
}
{% endfor %}

{% if share %}
fn left1(row: u32, k: u32) -> f32 {
    return x[row * p.k + k];
}
{% else %}
{{ row_quads.load("x") }}

fn left4(row: u32, q: u32) -> vec4<f32> {
    return x4(row, q);
}
{% endif %}

{% include "lora/shared/skinny.wgsl" %}
