enable f16;
enable wgpu_cooperative_matrix;
// dQ of attention by cooperative matrices. Queries go over the keys that they see.
//
// P = exp(scale * Q * K^T - lse), dS = P * (dO * V^T - delta),
// dQ = scale * dS * K.
//
// Scores are as exact as in the forward. All else is one f16; sums are f32.
//
// Floor: bytes of packed Q, dO, K and V and of dQ, D * (10 * M * H + 8 * keys * Hkv), over the
// memory's bandwidth; 10 * H * D FLOP of f16 matrices per pair of a query and a key that it sees
// (M * keys pairs, half of them in causal order) over their rate.
{% import "shared/coop.wgsl" as coop %}
{% import "attention/shared/buffers.wgsl" as buffers %}
{% import "attention/shared/sides.wgsl" as sides %}
{% import "attention/shared/coop_strips.wgsl" as tiles %}

{% include "attention/shared/params.wgsl" %}

// Q in two planes and transposed, dO.
@group(0) @binding(0) var<storage, read> queries: array<{{ tiles.packed_type }}>;
// K in two planes and transposed, V.
@group(0) @binding(1) var<storage, read> keys: array<{{ tiles.packed_type }}>;
@group(0) @binding(2) var<storage, read> query_scales: array<f32>;     // of Q, of dO
@group(0) @binding(3) var<storage, read> key_scales: array<vec4<f32>>; // of K, of V
{{ buffers.stats(4) }}
{{ buffers.ranges(5, sides.queries) }}
@group(0) @binding(6) var<storage, read_write> dq: array<vec4<f32>>;

// Factor of weights as f16.
const WEIGHT_FACTOR = 16384.0;

{% call tiles.each_block(sides.queries, "dq", "vec4<f32>") %}
    var k_most = 0x1p-126f;
    var v_most = 0x1p-126f;
    for (var key = start + thread; key < end; key = key + {{ 4 * lanes }}u) {
        k_most = max(k_most, key_scales[(k_row + key) / 4u][key % 4u]);
        v_most = max(v_most, key_scales[(v_row + key) / 4u][key % 4u]);
    }
    let k_scale = -least_of(-k_most, subgroup);
    // Packed values are below 2^14. Multiplied by this, no value of dO * V^T and no delta, with
    // V's scale, exceeds 1.
    let range = 0x1p-28f / {{ wide }}.0 / -least_of(-v_most, subgroup);
    // Brings all rows of K to one scale.
    let k_inverse = 1.0 / k_scale;
{% for r in range(tiles.rows_each) %}
    let undo{{ r }} = query_scales[q_row + row_base + local{{ r }}] * p.scale;
    let stat{{ r }} = stats[min(row{{ r }}, p.queries - 1u) * p.heads + head];
    let delta{{ r }} = stat{{ r }}.y / query_scales[do_row + row_base + local{{ r }}];
{% endfor %}
    let q_begin = (q_row + row_base + strip_row) * {{ wide }}u;
    let do_begin = 3u * q_plane + q_begin;
{{ tiles.fetch_own("queries", "q_begin", 0, 2, "q_plane") }}
{{ tiles.fetch_own("queries", "do_begin", 2) }}
{{ coop.accumulators(16, 16 * tiles.own_tiles) }}

    let first_base = start & ~{{ tiles.other_rows - 1 }}u;
    for (var base = first_base; base < end; base = base + {{ tiles.other_rows }}u) {
        let k_begin = (k_row + base + half_row) * {{ wide }}u;
        let v_begin = 3u * k_plane + k_begin;
        let k_transposed = 2u * k_plane + (k_row + base) * {{ wide }}u;
{{ tiles.scores("queries", "q_begin", "keys", "k_begin", 0, "q_plane", "k_plane") }}
        workgroupBarrier();
{% for r in range(tiles.rows_each) %}
{% call tiles.each_quad(r) %}
                let sum = {{ tiles.four("sums", "at") }};
                let score = sum * undo{{ r }} * key_scales[(k_row + other) / 4u];
                let visible_weight = exp(score - vec4<f32>(stat{{ r }}.x));
                let weight =
                    select(vec4<f32>(0.0), visible_weight, visible(other, seen{{ r }}));
                let staged = weight * WEIGHT_FACTOR;
{{ tiles.stage("to", "staged") }}
{% endcall %}
{% endfor %}
        workgroupBarrier();
{{ tiles.scores("queries", "do_begin", "keys", "v_begin", 2) }}
        workgroupBarrier();
{% for r in range(tiles.rows_each) %}
{% call tiles.each_quad(r) %}
                let weight = {{ tiles.four("weights", "to") }};
                let d_weight = {{ tiles.four("sums", "at") }} * key_scales[(v_row + other) / 4u];
                let graded = weight * ((d_weight - vec4<f32>(delta{{ r }})) * range);
                // With a weight of 0 the pair isn't visible, or as good as invisible.
                let known = select(vec4<f32>(0.0), graded, weight > vec4<f32>(0.0));
                let d_score = known * (key_scales[(k_row + other) / 4u] * k_inverse);
{{ tiles.stage("to", "d_score") }}
{% endcall %}
{% endfor %}
        workgroupBarrier();
{{ tiles.gather("keys", "k_transposed", "sum") }}
    }

{% call tiles.in_memory("sum") %}
        finish(d, strip, sums_begin, lane, row_base, do_row, head, k_scale, range);
{% endcall %}
{% endcall %}

fn finish(
    d: u32, strip: u32, sums_begin: u32, lane: u32,
    row_base: u32, do_row: u32, head: u32, k_scale: f32, range: f32,
) {
{% call tiles.each_result(sides.queries) %}
            let value = {{ tiles.four("sums", "at") }} / WEIGHT_FACTOR;
            dq[to] = value * query_scales[do_row + own] / range * k_scale * p.scale;
{% endcall %}
}
