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
{{ "" }}
{% from "shared/coop.wgsl" import enter, accumulators, least %}
{% from "attention/shared/strips.wgsl" import own_rows, other_rows, sum_stride, weight_stride, own_tiles, of_strip, of_half, share, rows_each, unit, memory, each_quad, query_rows, key_rows, begin, ranges, fetch_own, scores, gather, in_memory, four, stage, result_at %}

{% include "attention/shared/coop_memory.wgsl" %}
// Q in two planes and transposed, dO.
@group(0) @binding(0) var<storage, read> queries: array<{{ "vec4<f16>" if staged else "f16" }}>;
// K in two planes and transposed, V.
@group(0) @binding(1) var<storage, read> keys: array<{{ "vec4<f16>" if staged else "f16" }}>;
@group(0) @binding(2) var<storage, read> query_scales: array<f32>;     // of Q, of dO
@group(0) @binding(3) var<storage, read> key_scales: array<vec4<f32>>; // of K, of V
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>;      // for each query and head: lse, delta
@group(0) @binding(5) var<storage, read> key_ranges: array<vec2<u32>>; // for each query: first key, end
@group(0) @binding(6) var<storage, read_write> dq: array<vec4<f32>>;

// Factor of weights as f16.
const WEIGHT_FACTOR = 16384.0;

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
{{ enter("dq", "vec4<f32>") }}
    let block = group / p.heads;
    let head = group - block * p.heads;
    let kv_head = head / (p.heads / p.kv_heads);
    let row_base = block * {{ own_rows }}u;
{{ query_rows() }}
{{ key_rows() }}
{{ begin() }}
{{ ranges("key_ranges", "p.queries") }}
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
{% for r in range(rows_each) %}
    let undo{{ r }} = query_scales[q_row + row_base + local{{ r }}] * p.scale;
    let stat{{ r }} = stats[min(row_base + local{{ r }}, p.queries - 1u) * p.heads + head];
    let delta{{ r }} = stat{{ r }}.y / query_scales[do_row + row_base + local{{ r }}];
{% endfor %}
    let q_begin = (q_row + row_base{{ of_strip }}) * {{ wide }}u;
    let do_begin = 3u * q_plane + q_begin;
{{ fetch_own(edge, "queries", "q_begin", 0, 2, "q_plane") }}
{{ fetch_own(edge, "queries", "do_begin", 2) }}
{{ accumulators(edge, 16, 16 * own_tiles) }}

    for (var base = start & ~{{ other_rows - 1 }}u; base < end; base = base + {{ other_rows }}u) {
        let k_begin = (k_row + base{{ of_half }}) * {{ wide }}u;
        let v_begin = 3u * k_plane + k_begin;
        let k_transposed = 2u * k_plane + (k_row + base) * {{ wide }}u;
{{ scores(edge, "queries", "q_begin", "keys", "k_begin", 0, "q_plane", "k_plane") }}
        workgroupBarrier();
{% for r in range(rows_each) %}
{{ each_quad(r) }}
                let score = {{ four("sums", "at") }} * undo{{ r }} * key_scales[(k_row + other) / 4u];
                let weight = select(vec4<f32>(0.0), exp(score - vec4<f32>(stat{{ r }}.x)), visible(other, seen{{ r }}));
                let staged = weight * WEIGHT_FACTOR;
{{ stage("to", "staged") }}
            }
{% endfor %}
        workgroupBarrier();
{{ scores(edge, "queries", "do_begin", "keys", "v_begin", 2) }}
        workgroupBarrier();
{% for r in range(rows_each) %}
{{ each_quad(r) }}
                let weight = {{ four("weights", "to") }};
                let d_weight = {{ four("sums", "at") }} * key_scales[(v_row + other) / 4u];
                let graded = weight * ((d_weight - vec4<f32>(delta{{ r }})) * range);
                // With a weight of 0 the pair isn't visible, or as good as invisible.
                let d_score = select(vec4<f32>(0.0), graded, weight > vec4<f32>(0.0)) * (key_scales[(k_row + other) / 4u] * k_inverse);
{{ stage("to", "d_score") }}
            }
{% endfor %}
        workgroupBarrier();
{{ gather(edge, "keys", "k_transposed", "sum") }}
    }

{{ in_memory(edge, "sum", "finish", "row_base, do_row, head, k_scale, range") }}
}

fn finish(
    d: u32, strip: u32, sums_begin: u32, lane: u32, row_base: u32, do_row: u32, head: u32, k_scale: f32, range: f32,
) {
    for (var i = lane; i < 64u; i = i + {{ lanes }}u) {
        let query = row_base + 16u * strip + i / 4u;
        let first = d + i % 4u * 4u;
        if (query < p.queries && first < {{ head_dim }}u) {
            let at = {{ result_at("i / 4u", "i % 4u") }};
            let value = {{ four("sums", "at") }} / WEIGHT_FACTOR * query_scales[do_row + query] / range * k_scale;
            dq[(query * p.heads + head) * {{ head_dim // 4 }}u + first / 4u] = value * p.scale;
        }
    }
}
