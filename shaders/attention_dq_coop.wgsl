enable f16;
enable wgpu_cooperative_matrix;
// dQ of attention by cooperative matrices: queries over the keys that they see. With P = exp(scale * Q * K^T - lse) and
// dS = P * (dO * V^T - delta): dQ = scale * dS * K. Scores are as exact as the forward's, all else is one f16; sums are f32.
{{ "" }}
{% from "coop.wgsl" import accumulators, least %}
{% from "attention_strips.wgsl" import sum_stride, weight_stride, begin_queries, begin, scores, split_scores, gather, in_memory %}

{% include "attention_coop.wgsl" %}
@group(0) @binding(0) var<storage, read> queries: array<f16>;          // Q in two planes, dO
@group(0) @binding(1) var<storage, read> keys: array<f16>;             // K in two planes, V
@group(0) @binding(2) var<storage, read> query_factors: array<f32>;    // of Q, of dO
@group(0) @binding(3) var<storage, read> key_factors: array<f32>;      // of K, of V
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>;      // of each query and head: lse, delta
@group(0) @binding(5) var<storage, read> key_ranges: array<vec2<u32>>; // of each query: first key, end
@group(0) @binding(6) var<storage, read_write> dq: array<f32>;

{% set own, other, own_count = "query", "key", "p.queries" %}
{% include "attention_coop_backward.wgsl" %}

@compute @workgroup_size({{ 4 * lanes }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
{{ begin_queries(wide) }}
    var k_least = 0x1p126f;
    var v_least = 0x1p126f;
    for (var key = start + thread; key < end; key = key + {{ 4 * lanes }}u) {
        k_least = min(k_least, key_factors[rows.k + key]);
        v_least = min(v_least, key_factors[rows.v + key]);
    }
    let k_factor = least_of(k_least, subgroup);
    // Packed values are below 2^14: no value of dO * V^T and no delta, once V's factor is undone, exceeds the inverse.
    let range = least_of(v_least, subgroup) * 0x1p-28f / {{ wide }}.0;
{{ begin() }}
    let q_begin = (rows.q + row_base + 16u * subgroup) * {{ wide }}u;
    let do_begin = q_begin + 2u * q_plane;
{{ accumulators(edge, 16, wide) }}

    for (var base = start & ~31u; base < end; base = base + 32u) {
        let k_begin = (rows.k + base) * {{ wide }}u;
        let v_begin = k_begin + 2u * k_plane;
{{ split_scores(edge, wide, "queries", "keys", "q_begin", "k_begin", "q_plane", "k_plane") }}
        workgroupBarrier();
        weigh(rows, row_base, base, subgroup, lane);
        workgroupBarrier();
{{ scores(edge, wide, "queries", "keys", [("do_begin", "v_begin")]) }}
        workgroupBarrier();
        grade(rows, row_base, base, range, k_factor, subgroup, lane);
        workgroupBarrier();
{{ gather(edge, wide, "keys", "k_begin", "sum") }}
    }

{{ in_memory(edge, wide, "sum", "finish", "row_base, rows, range, k_factor, subgroup, lane") }}
}

fn finish(right: u32, row_base: u32, rows: Rows, range: f32, k_factor: f32, subgroup: u32, lane: u32) {
    for (var i = lane; i < 256u; i = i + {{ lanes }}u) {
        let local = 16u * subgroup + i / 16u;
        let query = row_base + local;
        let d = right + i % 16u;
        if (query < p.queries && d < {{ head_dim }}u) {
            let sum = sums[local * {{ sum_stride }}u + i % 16u] / WEIGHT_FACTOR;
            let value = sum / query_factors[rows.d_o + query] / range / k_factor;
            dq[(query * p.heads + rows.head) * {{ head_dim }}u + d] = value * p.scale;
        }
    }
}
