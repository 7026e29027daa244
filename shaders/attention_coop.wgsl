enable f16;
enable wgpu_cooperative_matrix;
// O = softmax(scale * Q * K^T) * V for the keys that each query sees, and the log-sum-exp of its scores, by cooperative matrices.
// Scores are products of Q and K as two f16 each, so that a softmax of scores of thousands is right too; weights and V are
// one f16 each; sums are f32.
//
// Online softmax: weights are exp(score - m), where m is a score of the query that no later one exceeds by much. Where one does,
// which is rare after the first keys, m becomes that score and O and the sum shrink.
{{ "" }}
{% from "coop.wgsl" import accumulators, least %}
{% from "attention_strips.wgsl" import sum_stride, weight_stride, begin_queries, begin, split_scores, gather, in_memory %}

{% include "attention_coop.wgsl" %}
@group(0) @binding(0) var<storage, read> queries: array<f16>;          // Q in two planes
@group(0) @binding(1) var<storage, read> keys: array<f16>;             // K in two planes, V
@group(0) @binding(2) var<storage, read> query_factors: array<f32>;    // of Q
@group(0) @binding(3) var<storage, read> key_factors: array<f32>;      // of K, of V
@group(0) @binding(4) var<storage, read> key_ranges: array<vec2<u32>>; // of each query: first key, end
@group(0) @binding(5) var<storage, read_write> o: array<f32>;
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;

// Below every score; finite, since WGSL promises nothing of infinities.
const LOWEST = -3.0e38;
// By so much a score may exceed m: ln 32, so that weights reach 32.
const SLACK = 3.4657359;
// Of weights as f16, which keeps those down to 2^-24 exact and those of 32 finite.
const WEIGHT_FACTOR = 1024.0;

// Of each query: m, the sum of the weights, and by what both and O shrink with this tile.
var<workgroup> most: array<f32, 64>;
var<workgroup> total: array<f32, 64>;
var<workgroup> shrink: array<f32, 64>;
// Whether O of any query of a subgroup shrinks.
var<workgroup> shrinks: array<u32, 4>;

@compute @workgroup_size({{ 4 * lanes }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
{{ begin_queries(wide) }}
    var v_least = 0x1p126f;
    for (var key = start + thread; key < end; key = key + {{ 4 * lanes }}u) {
        v_least = min(v_least, key_factors[rows.v + key]);
    }
    let v_factor = least_of(v_least, subgroup);
    for (var local = thread; local < 64u; local = local + {{ 4 * lanes }}u) {
        most[local] = LOWEST;
        total[local] = 0.0;
    }
{{ begin() }}
    let q_begin = (rows.q + row_base + 16u * subgroup) * {{ wide }}u;
{{ accumulators(edge, 16, wide) }}

    for (var base = start & ~31u; base < end; base = base + 32u) {
        let k_begin = (rows.k + base) * {{ wide }}u;
        let v_begin = k_begin + 2u * k_plane;
{{ split_scores(edge, wide, "queries", "keys", "q_begin", "k_begin", "q_plane", "k_plane") }}
        workgroupBarrier();
        let own_shrinks = weigh(rows, row_base, base, v_factor, subgroup, lane);
        if (lane == 0u) { shrinks[subgroup] = own_shrinks; }
        let shrinking = workgroupUniformLoad(&shrinks);
        if ((shrinking[0] | shrinking[1] | shrinking[2] | shrinking[3]) != 0u) {
{{ in_memory(edge, wide, "sum", "rescale", "subgroup, lane", true) }}
        }
{{ gather(edge, wide, "keys", "v_begin", "sum") }}
    }

{{ in_memory(edge, wide, "sum", "finish", "row_base, head, v_factor, subgroup, lane") }}
    for (var local = thread; local < 64u; local = local + {{ 4 * lanes }}u) {
        if (row_base + local < p.queries) {
            let sum = total[local];
            lse[(row_base + local) * p.heads + head] = select(most[local] + log(sum), p.no_key, sum == 0.0);
        }
    }
}

// From scores to weights, a query after the other. Returns whether O of any of them shrinks.
fn weigh(rows: Rows, row_base: u32, base: u32, v_factor: f32, subgroup: u32, lane: u32) -> u32 {
    var shrinking = false;
    for (var local = 16u * subgroup; local < 16u * (subgroup + 1u); local = local + 1u) {
        let seen = key_ranges[min(row_base + local, p.queries - 1u)];
        let undo = p.scale / query_factors[rows.q + row_base + local];
        var highest = LOWEST;
        for (var i = lane; i < 32u; i = i + {{ lanes }}u) {
            let key = base + i;
            var score = LOWEST;
            if (key >= seen.x && key < seen.y) {
                score = sums[local * {{ sum_stride }}u + i] * undo / key_factors[rows.k + key];
            }
            sums[local * {{ sum_stride }}u + i] = score;
            highest = max(highest, score);
        }
        highest = subgroupMax(highest);
        let before = most[local];
        let rises = highest > before + SLACK;
        let now = select(before, highest, rises);
        var sum = 0.0;
        for (var i = lane; i < 32u; i = i + {{ lanes }}u) {
            let score = sums[local * {{ sum_stride }}u + i];
            var weight = 0.0;
            var staged = 0.0;
            if (score > LOWEST) {
                weight = exp(score - now);
                staged = weight * (WEIGHT_FACTOR * (v_factor / key_factors[rows.v + base + i]));
            }
            sum = sum + weight;
            weights[local * {{ weight_stride }}u + i] = f16(staged);
        }
        // After this all lanes have read what the first one writes.
        sum = subgroupAdd(sum);
        if (lane == 0u) {
            let by = select(1.0, exp(before - now), rises);
            most[local] = now;
            total[local] = total[local] * by + sum;
            shrink[local] = by;
        }
        shrinking = shrinking || (rises && before > LOWEST);
    }
    return u32(shrinking);
}

fn rescale(right: u32, subgroup: u32, lane: u32) {
    for (var i = lane; i < 256u; i = i + {{ lanes }}u) {
        let local = 16u * subgroup + i / 16u;
        let at = local * {{ sum_stride }}u + i % 16u;
        sums[at] = sums[at] * shrink[local];
    }
}

fn finish(right: u32, row_base: u32, head: u32, v_factor: f32, subgroup: u32, lane: u32) {
    for (var i = lane; i < 256u; i = i + {{ lanes }}u) {
        let local = 16u * subgroup + i / 16u;
        let d = right + i % 16u;
        if (row_base + local < p.queries && d < {{ head_dim }}u) {
            let sum = total[local];
            let inverse = select(1.0 / sum, 0.0, sum == 0.0);
            let value = sums[local * {{ sum_stride }}u + i % 16u] / WEIGHT_FACTOR / v_factor;
            o[((row_base + local) * p.heads + head) * {{ head_dim }}u + d] = value * inverse;
        }
    }
}
