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
{{ "" }}
{% from "shared/coop.wgsl" import enter, accumulators, least %}
{% from "attention/shared/strips.wgsl" import own_rows, other_rows, sum_stride, weight_stride, own_tiles, of_strip, of_half, share, rows_each, unit, memory, each_quad, query_rows, key_rows, begin, ranges, fetch_own, scores, gather, in_memory, four, four_of, stage, result_at %}

{% include "attention/shared/coop_memory.wgsl" %}
// Q in two planes and transposed, dO in one and transposed.
@group(0) @binding(0) var<storage, read> queries: array<{{ "vec4<f16>" if staged else "f16" }}>;
// K in two planes and transposed, V.
@group(0) @binding(1) var<storage, read> keys: array<{{ "vec4<f16>" if staged else "f16" }}>;
@group(0) @binding(2) var<storage, read> query_scales: array<f32>;       // of Q, of dO
@group(0) @binding(3) var<storage, read> key_scales: array<f32>;         // of K, of V
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>;        // for each query and head: lse, delta
@group(0) @binding(5) var<storage, read> query_ranges: array<vec2<u32>>; // for each key: first query, end
@group(0) @binding(6) var<storage, read_write> dk: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> dv: array<vec4<f32>>;

// Factor of weights as f16.
const WEIGHT_FACTOR = 16384.0;

// For each query of a step: Q's scale and lse; the factors that bring dO and Q to one scale for
// all; and delta over dO's scale.
var<workgroup> q_scale: array<f32, {{ other_rows }}>;
var<workgroup> lse: array<f32, {{ other_rows }}>;
var<workgroup> do_ratio: array<f32, {{ other_rows }}>;
var<workgroup> q_ratio: array<f32, {{ other_rows }}>;
var<workgroup> delta: array<f32, {{ other_rows }}>;

{{ memory() }}

@compute @workgroup_size({{ 4 * lanes }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) subgroup_size: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
{{ enter("dv", "vec4<f32>") }}
    let block = group / p.kv_heads;
    let kv_head = group - block * p.kv_heads;
    let heads = p.heads / p.kv_heads;
    let row_base = block * {{ own_rows }}u;
{{ begin() }}
{{ key_rows() }}
{{ ranges("query_ranges", "p.keys") }}
    var q_most = 0x1p-126f;
    var do_most = 0x1p-126f;
    var v_most = 0x1p-126f;
    var delta_most = 0x1p-126f;
    for (var head = kv_head * heads; head < (kv_head + 1u) * heads; head = head + 1u) {
{{ query_rows() }}
        for (var query = start + thread; query < end; query = query + {{ 4 * lanes }}u) {
            let of_do = query_scales[do_row + query];
            q_most = max(q_most, query_scales[q_row + query]);
            do_most = max(do_most, of_do);
            delta_most = max(delta_most, abs(stats[query * p.heads + head].y) / of_do);
        }
        for (var local = thread; local < {{ own_rows }}u; local = local + {{ 4 * lanes }}u) {
            v_most = max(v_most, key_scales[v_row + row_base + local]);
        }
    }
    let all_q = -least_of(-q_most, subgroup);
    let all_do = -least_of(-do_most, subgroup);
    // Packed values are below 2^14. Multiplied by this, no value of dO * V^T with V's scale, and
    // no delta, exceeds 1.
    let range = min(0x1p-28f / {{ wide }}.0 / -least_of(-v_most, subgroup), 1.0 / -least_of(-delta_most, subgroup));
{% for r in range(rows_each) %}
    let undo{{ r }} = key_scales[k_row + row_base + local{{ r }}] * p.scale;
    let v_scale{{ r }} = key_scales[v_row + row_base + local{{ r }}];
{% endfor %}
    let k_begin = (k_row + row_base{{ of_strip }}) * {{ wide }}u;
    let v_begin = 3u * k_plane + k_begin;
{{ fetch_own(edge, "keys", "k_begin", 0, 2, "k_plane") }}
{{ fetch_own(edge, "keys", "v_begin", 2) }}
{{ accumulators(edge, 16, 16 * own_tiles, "dk_sum") }}
{{ accumulators(edge, 16, 16 * own_tiles, "dv_sum") }}

    for (var head = kv_head * heads; head < (kv_head + 1u) * heads; head = head + 1u) {
{{ query_rows() }}
        for (var base = start & ~{{ other_rows - 1 }}u; base < end; base = base + {{ other_rows }}u) {
            let q_begin = (q_row + base{{ of_half }}) * {{ wide }}u;
            let do_begin = 3u * q_plane + q_begin;
            let q_transposed = 2u * q_plane + (q_row + base) * {{ wide }}u;
            let do_transposed = q_transposed + 2u * q_plane;
            for (var i = thread; i < {{ other_rows }}u; i = i + {{ 4 * lanes }}u) {
                let stat = stats[min(base + i, p.queries - 1u) * p.heads + head];
                let of_q = query_scales[q_row + base + i];
                let of_do = query_scales[do_row + base + i];
                q_scale[i] = of_q;
                lse[i] = stat.x;
                do_ratio[i] = of_do / all_do;
                q_ratio[i] = of_q / all_q;
                delta[i] = stat.y / of_do;
            }
{{ scores(edge, "keys", "k_begin", "queries", "q_begin", 0, "k_plane", "q_plane") }}
            workgroupBarrier();
{% for r in range(rows_each) %}
{{ each_quad(r) }}
                let score = {{ four("sums", "at") }} * undo{{ r }} * {{ four_of("q_scale", "local_other") }};
                let seen = select(vec4<f32>(0.0), exp(score - {{ four_of("lse", "local_other") }}), visible(other, seen{{ r }}));
                let weight = seen * WEIGHT_FACTOR * {{ four_of("do_ratio", "local_other") }};
{{ stage("to", "weight") }}
            }
{% endfor %}
            workgroupBarrier();
{{ gather(edge, "queries", "do_transposed", "dv_sum") }}
{{ scores(edge, "keys", "v_begin", "queries", "do_begin", 2) }}
            workgroupBarrier();
{% for r in range(rows_each) %}
{{ each_quad(r) }}
                let weight = {{ four("weights", "to") }};
                let d_weight = {{ four("sums", "at") }} * v_scale{{ r }};
                let graded = weight * ((d_weight - {{ four_of("delta", "local_other") }}) * range);
                // With a weight of 0 the pair isn't visible, or as good as invisible.
                let d_score = select(vec4<f32>(0.0), graded, weight > vec4<f32>(0.0)) * {{ four_of("q_ratio", "local_other") }};
{{ stage("to", "d_score") }}
            }
{% endfor %}
            workgroupBarrier();
{{ gather(edge, "queries", "q_transposed", "dk_sum") }}
        }
    }

{{ in_memory(edge, "dv_sum", "finish_dv", "row_base, kv_head, all_do") }}
{{ in_memory(edge, "dk_sum", "finish_dk", "row_base, kv_head, all_do, range, all_q") }}
}

fn finish_dv(d: u32, strip: u32, sums_begin: u32, lane: u32, row_base: u32, kv_head: u32, all_do: f32) {
    for (var i = lane; i < 64u; i = i + {{ lanes }}u) {
        let key = row_base + 16u * strip + i / 4u;
        let first = d + i % 4u * 4u;
        if (key < p.keys && first < {{ head_dim }}u) {
            let at = {{ result_at("i / 4u", "i % 4u") }};
            dv[(key * p.kv_heads + kv_head) * {{ head_dim // 4 }}u + first / 4u] = {{ four("sums", "at") }} / WEIGHT_FACTOR * all_do;
        }
    }
}

fn finish_dk(
    d: u32, strip: u32, sums_begin: u32, lane: u32, row_base: u32, kv_head: u32, all_do: f32, range: f32, all_q: f32,
) {
    for (var i = lane; i < 64u; i = i + {{ lanes }}u) {
        let key = row_base + 16u * strip + i / 4u;
        let first = d + i % 4u * 4u;
        if (key < p.keys && first < {{ head_dim }}u) {
            let at = {{ result_at("i / 4u", "i % 4u") }};
            let value = {{ four("sums", "at") }} / WEIGHT_FACTOR * all_do / range * all_q;
            dk[(key * p.kv_heads + kv_head) * {{ head_dim // 4 }}u + first / 4u] = value * p.scale;
        }
    }
}
