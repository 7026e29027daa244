// Rotary position embedding: each pair of values of a head is rotated by the angle of its token's
// position. X and Y are [M, H * D].
{% if both %}
// X1 and Y1 follow, and have their own number of heads.
{% endif %}
{% import "shared/entry.wgsl" as entry %}

struct Params {
    first_group: u32,
    groups: u32,
    pairs: u32,      // of all heads and tokens, M * H * D / 2
    all_pairs: u32,  // together with those of X1
    row_pairs: u32,  // of a token, H * D / 2
    row_pairs1: u32, // the same for X1
    half: u32,       // of a head, D / 2
    positions: u32,  // rows of the table
    sign: f32,       // of the angle: -1 for the backward
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> x1: array<f32>; // X again, if there is no second one
@group(0) @binding(2) var<storage, read> cosines: array<f32>; // [positions, D / 2]
@group(0) @binding(3) var<storage, read> sines: array<f32>;   // [positions, D / 2]
@group(0) @binding(4) var<storage, read> position: array<u32>; // for each token
@group(0) @binding(5) var<storage, read_write> y: array<f32>;
@group(0) @binding(6) var<storage, read_write> y1: array<f32>;

{% include "elementwise/shared/rope_pairs.wgsl" %}

{% call entry.each_value(threads) %}
    if (i >= p.all_pairs) {
        return;
    }
{% if both %}
    let later = i >= p.pairs;
    let pair = i - select(0u, p.pairs, later);
    let row_pairs = select(p.row_pairs, p.row_pairs1, later);
{% else %}
    let pair = i;
    let row_pairs = p.row_pairs;
{% endif %}
    let at = places(pair);
    var by = angle(pair, position[pair / row_pairs]);
    by.y = p.sign * by.y;
{% if both %}
    if (later) {
        let result = turned(x1[at.x], x1[at.y], by);
        y1[at.x] = result.x;
        y1[at.y] = result.y;
        return;
    }
{% endif %}
    let result = turned(x[at.x], x[at.y], by);
    y[at.x] = result.x;
    y[at.y] = result.y;
{% endcall %}
