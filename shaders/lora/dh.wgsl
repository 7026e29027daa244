// G = s * dY * B: [M, r] from dY [M, N] and B [N, r]; both row-major f32. Lanes run along r, so
// they read neighbouring values of B.
//
// Floor: the 4 M N bytes of dY over the bandwidth, or 2 M N r FLOP over the rate of f32.
{% import "shared/entry.wgsl" as entry %}
{% import "shared/row_quads.wgsl" as row_quads %}

struct Params {
    first_group: u32,
    groups: u32,
    k: u32,           // N of the layer: the contracted values
    rows: u32,        // M
    rank: u32,
    rank_groups: u32, // workgroups along the rank
    scale: f32,       // s
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> dy: array<{{ "f32" if ragged or share else "vec4<f32>" }}>;
@group(0) @binding(1) var<storage, read> b: array<f32>;
@group(0) @binding(2) var<storage, read_write> g: array<f32>;

{% if share %}

fn left1(row: u32, n: u32) -> f32 {
    return dy[row * p.k + n];
}
{% else %}
{{ row_quads.load("dy") }}

fn left4(row: u32, q: u32) -> vec4<f32> {
    return dy4(row, q);
}
{% endif %}

fn right4_0(j: u32, q: u32) -> vec4<f32> {
    let n = 4u * q;
{% if ragged %}
    // Past the end: the last row of B, multiplied by zero.
    let row = min(vec4<u32>(n, n + 1u, n + 2u, n + 3u), vec4<u32>(p.k - 1u)) * p.rank + j;
{% else %}
    let row = vec4<u32>(n, n + 1u, n + 2u, n + 3u) * p.rank + j;
{% endif %}
    return vec4<f32>(b[row.x], b[row.y], b[row.z], b[row.w]);
}

fn store_0(at: u32, sum: f32) {
    g[at] = p.scale * sum;
}

{% include "lora/shared/skinny.wgsl" %}
