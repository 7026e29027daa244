enable f16;
enable wgpu_cooperative_matrix;
// dK and dV of attention by cooperative matrices: keys over the queries that see them, of every head that shares them. With
// P = exp(scale * Q * K^T - lse) and dS = P * (dO * V^T - delta): dV = P^T * dO, dK = scale * dS^T * Q. Scores are as exact as
// the forward's, all else is one f16; sums are f32.
{{ "" }}
{% from "coop.wgsl" import enter, accumulators, least %}
{% from "attention_strips.wgsl" import sum_stride, weight_stride, packed_rows, begin, scores, split_scores, gather, in_memory %}

{% include "attention_coop.wgsl" %}
@group(0) @binding(0) var<storage, read> queries: array<f16>;            // Q in two planes, dO
@group(0) @binding(1) var<storage, read> keys: array<f16>;               // K in two planes, V
@group(0) @binding(2) var<storage, read> query_factors: array<f32>;      // of Q, of dO
@group(0) @binding(3) var<storage, read> key_factors: array<f32>;        // of K, of V
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>;        // of each query and head: lse, delta
@group(0) @binding(5) var<storage, read> query_ranges: array<vec2<u32>>; // of each key: first query, end
@group(0) @binding(6) var<storage, read_write> dk: array<f32>;
@group(0) @binding(7) var<storage, read_write> dv: array<f32>;

{% set own, other, own_count = "key", "query", "p.keys" %}
{% include "attention_coop_backward.wgsl" %}

@compute @workgroup_size({{ 4 * lanes }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
{{ enter() }}
    let block = group / p.kv_heads;
    let kv_head = group - block * p.kv_heads;
    let heads = p.heads / p.kv_heads;
    let row_base = block * 64u;
    // Ranges never go back from a key to the next: these are the queries of all the workgroup's keys.
    let start = query_ranges[row_base].x;
    let end = query_ranges[min(row_base + 63u, p.keys - 1u)].y;
    var q_least = 0x1p126f;
    var do_least = 0x1p126f;
    var v_least = 0x1p126f;
    var delta_most = 0.0;
    for (var head = kv_head * heads; head < (kv_head + 1u) * heads; head = head + 1u) {
{{ packed_rows(wide) }}
        for (var query = start + thread; query < end; query = query + {{ 4 * lanes }}u) {
            let do_factor = query_factors[rows.d_o + query];
            q_least = min(q_least, query_factors[rows.q + query]);
            do_least = min(do_least, do_factor);
            delta_most = max(delta_most, abs(stats[query * p.heads + head].y) * do_factor);
        }
        for (var local = thread; local < 64u; local = local + {{ 4 * lanes }}u) {
            v_least = min(v_least, key_factors[rows.v + row_base + local]);
        }
    }
    let q_factor = least_of(q_least, subgroup);
    let do_factor = least_of(do_least, subgroup);
    // Packed values are below 2^14: no value of dO * V^T, once V's factor is undone, and no delta exceeds the inverse.
    let range = min(least_of(v_least, subgroup) * 0x1p-28f / {{ wide }}.0, 1.0 / max(-least_of(-delta_most, subgroup), 0x1p-126f));
{{ begin() }}
{{ accumulators(edge, 16, wide, "dk_sum") }}
{{ accumulators(edge, 16, wide, "dv_sum") }}

    for (var head = kv_head * heads; head < (kv_head + 1u) * heads; head = head + 1u) {
{{ packed_rows(wide) }}
        let k_begin = (rows.k + row_base + 16u * subgroup) * {{ wide }}u;
        let v_begin = k_begin + 2u * k_plane;
        for (var base = start & ~31u; base < end; base = base + 32u) {
            let q_begin = (rows.q + base) * {{ wide }}u;
            let do_begin = q_begin + 2u * q_plane;
{{ split_scores(edge, wide, "keys", "queries", "k_begin", "q_begin", "k_plane", "q_plane") }}
            workgroupBarrier();
            weigh(rows, row_base, base, do_factor, subgroup, lane);
            workgroupBarrier();
{{ gather(edge, wide, "queries", "do_begin", "dv_sum") }}
{{ scores(edge, wide, "keys", "queries", [("v_begin", "do_begin")]) }}
            workgroupBarrier();
            grade(rows, row_base, base, range, q_factor, subgroup, lane);
            workgroupBarrier();
{{ gather(edge, wide, "queries", "q_begin", "dk_sum") }}
        }
    }

{{ in_memory(edge, wide, "dv_sum", "finish_dv", "row_base, kv_head, do_factor, subgroup, lane") }}
{{ in_memory(edge, wide, "dk_sum", "finish_dk", "row_base, kv_head, do_factor, range, q_factor, subgroup, lane") }}
}

fn finish_dv(right: u32, row_base: u32, kv_head: u32, do_factor: f32, subgroup: u32, lane: u32) {
    for (var i = lane; i < 256u; i = i + {{ lanes }}u) {
        let local = 16u * subgroup + i / 16u;
        let d = right + i % 16u;
        if (row_base + local < p.keys && d < {{ head_dim }}u) {
            let value = sums[local * {{ sum_stride }}u + i % 16u] / WEIGHT_FACTOR / do_factor;
            dv[((row_base + local) * p.kv_heads + kv_head) * {{ head_dim }}u + d] = value;
        }
    }
}

fn finish_dk(
    right: u32, row_base: u32, kv_head: u32, do_factor: f32, range: f32, q_factor: f32, subgroup: u32, lane: u32,
) {
    for (var i = lane; i < 256u; i = i + {{ lanes }}u) {
        let local = 16u * subgroup + i / 16u;
        let d = right + i % 16u;
        if (row_base + local < p.keys && d < {{ head_dim }}u) {
            let sum = sums[local * {{ sum_stride }}u + i % 16u] / WEIGHT_FACTOR;
            let value = sum / do_factor / range / q_factor;
            dk[((row_base + local) * p.kv_heads + kv_head) * {{ head_dim }}u + d] = value * p.scale;
        }
    }
}
