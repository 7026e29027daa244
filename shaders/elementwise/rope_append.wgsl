// Adds the next tokens of a sequence to the cache: queries and keys are rotated by the angles of
// their positions, and keys and values are stored in the cache. Y = rope(Q), keys[first + i] =
// rope(K)[i], values[first + i] = V[i].
{% import "shared/entry.wgsl" as entry %}

struct Params {
    first_group: u32,
    groups: u32,
    pairs: u32,      // of Q
    kv_pairs: u32,   // of K, and of V
    row_pairs: u32,  // of one token's query
    kv_row_pairs: u32,
    first: u32,      // position of the first token, and its row in the cache
    half: u32,       // of a head, D / 2
    positions: u32,  // rows of the table
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> q: array<f32>;
@group(0) @binding(1) var<storage, read> k: array<f32>;
@group(0) @binding(2) var<storage, read> v: array<f32>;
@group(0) @binding(3) var<storage, read> cosines: array<f32>; // [positions, D / 2]
@group(0) @binding(4) var<storage, read> sines: array<f32>;   // [positions, D / 2]
@group(0) @binding(5) var<storage, read_write> y: array<f32>;
@group(0) @binding(6) var<storage, read_write> keys: array<f32>;
@group(0) @binding(7) var<storage, read_write> values: array<f32>;

{% include "elementwise/shared/rope_pairs.wgsl" %}

{% call entry.each_value(threads) %}
    if (i >= p.pairs + 2u * p.kv_pairs) {
        return;
    }
    if (i < p.pairs) {
        let at = places(i);
        let result = turned(q[at.x], q[at.y], angle(i, p.first + i / p.row_pairs));
        y[at.x] = result.x;
        y[at.y] = result.y;
        return;
    }
    let pair = (i - p.pairs) % p.kv_pairs;
    let at = places(pair);
    let to = at + 2u * p.kv_row_pairs * p.first;
    if (i < p.pairs + p.kv_pairs) {
        let result = turned(k[at.x], k[at.y], angle(pair, p.first + pair / p.kv_row_pairs));
        keys[to.x] = result.x;
        keys[to.y] = result.y;
    } else {
        values[to.x] = v[at.x];
        values[to.y] = v[at.y];
    }
{% endcall %}
