enable f16;
enable wgpu_cooperative_matrix;
// dK and dV of attention by cooperative matrices. Keys go over the queries that see them, in all
// heads that share the keys.
//
// P = exp(scale * Q * K^T - lse), dS = P * (dO * V^T - delta),
// dV = P^T * dO, dK = scale * dS^T * Q.
//
// Scores are as exact as in the forward. All else is one f16; sums are f32.
//
// Floor: bytes of packed Q, dO, K and V and of dK and dV, D * (10 * M * H + 14 * keys * Hkv), over
// the memory's bandwidth; 12 * H * D FLOP of f16 matrices per pair of a query and a key that it
// sees (M * keys pairs, half of them in causal order) over their rate.
{% import "shared/coop.wgsl" as coop %}
{% import "attention/shared/buffers.wgsl" as buffers %}
{% import "attention/shared/sides.wgsl" as sides %}
{% import "attention/shared/coop_strips.wgsl" as tiles %}

{% include "attention/shared/params.wgsl" %}

// Q in two planes and transposed, dO in one and transposed.
@group(0) @binding(0) var<storage, read> queries: array<{{ tiles.packed_type }}>;
// K in two planes and transposed, V.
@group(0) @binding(1) var<storage, read> keys: array<{{ tiles.packed_type }}>;
@group(0) @binding(2) var<storage, read> query_scales: array<f32>;       // of Q, of dO
@group(0) @binding(3) var<storage, read> key_scales: array<f32>;         // of K, of V
{{ buffers.stats(4) }}
{{ buffers.ranges(5, sides.keys) }}
@group(0) @binding(6) var<storage, read_write> dk: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> dv: array<vec4<f32>>;

// Factor of weights as f16.
const WEIGHT_FACTOR = 16384.0;

// For each query of a step: Q's scale and lse; the factors that bring dO and Q to one scale for
// all; and delta over dO's scale.
var<workgroup> q_scale: array<f32, {{ tiles.other_rows }}>;
var<workgroup> lse: array<f32, {{ tiles.other_rows }}>;
var<workgroup> do_ratio: array<f32, {{ tiles.other_rows }}>;
var<workgroup> q_ratio: array<f32, {{ tiles.other_rows }}>;
var<workgroup> delta: array<f32, {{ tiles.other_rows }}>;

{% call tiles.each_block(sides.keys, "dv", "vec4<f32>") %}
    var q_most = 0x1p-126f;
    var do_most = 0x1p-126f;
    var v_most = 0x1p-126f;
    var delta_most = 0x1p-126f;
    for (var head = kv_head * heads; head < (kv_head + 1u) * heads; head = head + 1u) {
{{ tiles.query_rows() }}
        for (var query = start + thread; query < end; query = query + {{ 4 * lanes }}u) {
            let of_do = query_scales[do_row + query];
            q_most = max(q_most, query_scales[q_row + query]);
            do_most = max(do_most, of_do);
            delta_most = max(delta_most, abs(stats[query * p.heads + head].y) / of_do);
        }
        for (var local = thread; local < {{ tiles.own_rows }}u; local = local + {{ 4 * lanes }}u) {
            v_most = max(v_most, key_scales[v_row + row_base + local]);
        }
    }
    let all_q = -least_of(-q_most, subgroup);
    let all_do = -least_of(-do_most, subgroup);
    // Packed values are below 2^14. Multiplied by this, no value of dO * V^T with V's scale, and
    // no delta, exceeds 1.
    let v_range = 0x1p-28f / {{ wide }}.0 / -least_of(-v_most, subgroup);
    let range = min(v_range, 1.0 / -least_of(-delta_most, subgroup));
{% for r in range(tiles.rows_each) %}
    let undo{{ r }} = key_scales[k_row + row_base + local{{ r }}] * p.scale;
    let v_scale{{ r }} = key_scales[v_row + row_base + local{{ r }}];
{% endfor %}
    let k_begin = (k_row + row_base + strip_row) * {{ wide }}u;
    let v_begin = 3u * k_plane + k_begin;
{{ tiles.fetch_own("keys", "k_begin", 0, 2, "k_plane") }}
{{ tiles.fetch_own("keys", "v_begin", 2) }}
{{ coop.accumulators(16, 16 * tiles.own_tiles, "dk_sum") }}
{{ coop.accumulators(16, 16 * tiles.own_tiles, "dv_sum") }}

    for (var head = kv_head * heads; head < (kv_head + 1u) * heads; head = head + 1u) {
{{ tiles.query_rows() }}
        let first_base = start & ~{{ tiles.other_rows - 1 }}u;
        for (var base = first_base; base < end; base = base + {{ tiles.other_rows }}u) {
            let q_begin = (q_row + base + half_row) * {{ wide }}u;
            let do_begin = 3u * q_plane + q_begin;
            let q_transposed = 2u * q_plane + (q_row + base) * {{ wide }}u;
            let do_transposed = q_transposed + 2u * q_plane;
            for (var i = thread; i < {{ tiles.other_rows }}u; i = i + {{ 4 * lanes }}u) {
                let stat = stats[min(base + i, p.queries - 1u) * p.heads + head];
                let of_q = query_scales[q_row + base + i];
                let of_do = query_scales[do_row + base + i];
                q_scale[i] = of_q;
                lse[i] = stat.x;
                do_ratio[i] = of_do / all_do;
                q_ratio[i] = of_q / all_q;
                delta[i] = stat.y / of_do;
            }
{{ tiles.scores("keys", "k_begin", "queries", "q_begin", 0, "k_plane", "q_plane") }}
            workgroupBarrier();
{% for r in range(tiles.rows_each) %}
{% call tiles.each_quad(r) %}
                let sum = {{ tiles.four("sums", "at") }};
                let q_scales = {{ tiles.four_of("q_scale", "local_other") }};
                let score = sum * undo{{ r }} * q_scales;
                let lses = {{ tiles.four_of("lse", "local_other") }};
                let seen = select(vec4<f32>(0.0), exp(score - lses), visible(other, seen{{ r }}));
                let do_ratios = {{ tiles.four_of("do_ratio", "local_other") }};
                let weight = seen * WEIGHT_FACTOR * do_ratios;
{{ tiles.stage("to", "weight") }}
{% endcall %}
{% endfor %}
            workgroupBarrier();
{{ tiles.gather("queries", "do_transposed", "dv_sum") }}
{{ tiles.scores("keys", "v_begin", "queries", "do_begin", 2) }}
            workgroupBarrier();
{% for r in range(tiles.rows_each) %}
{% call tiles.each_quad(r) %}
                let weight = {{ tiles.four("weights", "to") }};
                let d_weight = {{ tiles.four("sums", "at") }} * v_scale{{ r }};
                let deltas = {{ tiles.four_of("delta", "local_other") }};
                let graded = weight * ((d_weight - deltas) * range);
                // With a weight of 0 the pair isn't visible, or as good as invisible.
                let q_ratios = {{ tiles.four_of("q_ratio", "local_other") }};
                let d_score = select(vec4<f32>(0.0), graded, weight > vec4<f32>(0.0)) * q_ratios;
{{ tiles.stage("to", "d_score") }}
{% endcall %}
{% endfor %}
            workgroupBarrier();
{{ tiles.gather("queries", "q_transposed", "dk_sum") }}
        }
    }

{% call tiles.in_memory("dv_sum") %}
        finish_dv(d, strip, sums_begin, lane, row_base, kv_head, all_do);
{% endcall %}
{% call tiles.in_memory("dk_sum") %}
        finish_dk(d, strip, sums_begin, lane, row_base, kv_head, all_do, range, all_q);
{% endcall %}
{% endcall %}

fn finish_dv(
    d: u32, strip: u32, sums_begin: u32, lane: u32, row_base: u32, kv_head: u32, all_do: f32,
) {
{% call tiles.each_result(sides.keys) %}
            dv[to] = {{ tiles.four("sums", "at") }} / WEIGHT_FACTOR * all_do;
{% endcall %}
}

fn finish_dk(
    d: u32, strip: u32, sums_begin: u32, lane: u32,
    row_base: u32, kv_head: u32, all_do: f32, range: f32, all_q: f32,
) {
{% call tiles.each_result(sides.keys) %}
            let value = {{ tiles.four("sums", "at") }} / WEIGHT_FACTOR;
            dk[to] = value * all_do / range * all_q * p.scale;
{% endcall %}
}
