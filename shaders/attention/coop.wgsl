enable f16;
enable wgpu_cooperative_matrix;
// O = softmax(scale * Q * K^T) * V for the keys that each query sees, and the log-sum-exp of its
// scores, by cooperative matrices. For the scores, Q and K are two f16 each, so that the softmax
// is accurate even for scores in the thousands. Weights and V are one f16 each; sums are f32.
//
// Online softmax: weights are exp(score - m), where m is a score of the query that no later score
// exceeds by much. If one does, which is rare after the first keys, m becomes that score, and O
// and the sum shrink.
//
// Floor: bytes of packed Q, K and V and of O, D * (8 * M * H + 6 * keys * Hkv), over the memory's
// bandwidth; 8 * H * D FLOP of f16 matrices per pair of a query and a key that it sees (M * keys
// pairs, half of them in causal order) over their rate: three products for the scores and one for
// O.
{{ "" }}
{% from "shared/coop.wgsl" import enter, accumulators, least %}
{% from "attention/shared/strips.wgsl" import own_rows, other_rows, sum_stride, weight_stride, own_tiles, of_strip, of_half, share, rows_each, unit, memory, each_quad, query_rows, key_rows, begin, ranges, fetch_own, scores, gather, in_memory, four, stage, result_at %}

{% include "attention/shared/coop_memory.wgsl" %}
// Q in two planes.
@group(0) @binding(0) var<storage, read> queries: array<{{ "vec4<f16>" if staged else "f16" }}>;
// K in two planes, V transposed.
@group(0) @binding(1) var<storage, read> keys: array<{{ "vec4<f16>" if staged else "f16" }}>;
@group(0) @binding(2) var<storage, read> query_scales: array<f32>;     // of Q
@group(0) @binding(3) var<storage, read> key_scales: array<vec4<f32>>; // of K, of V
@group(0) @binding(4) var<storage, read> key_ranges: array<vec2<u32>>; // for each query: first key, end
@group(0) @binding(5) var<storage, read_write> o: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;

// Below every score. Finite, because WGSL guarantees nothing about infinities.
const LOWEST = -3.0e38;
// A score may exceed m by this: ln 32, so that weights reach 32.
const SLACK = 3.4657359;
// Factor of weights as f16. It keeps weights down to 2^-24 exact and weights of 32 finite.
const WEIGHT_FACTOR = 1024.0;

{{ memory() }}
// For each query: the factor by which O shrinks with this tile, and at the end the factor of O.
var<workgroup> shrink: array<f32, {{ own_rows }}>;
// Whether O shrinks for any query of a subgroup's threads.
var<workgroup> shrinks: array<u32, 4>;

@compute @workgroup_size({{ 4 * lanes }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) subgroup_size: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
{{ enter("lse") }}
    let block = group / p.heads;
    let head = group - block * p.heads;
    let kv_head = head / (p.heads / p.kv_heads);
    let row_base = block * {{ own_rows }}u;
{{ query_rows() }}
{{ key_rows() }}
{{ begin() }}
{{ ranges("key_ranges", "p.queries") }}
    // Smaller values lose precision: `weight_factor` must not overflow.
    var v_most = 0x1p-116f;
    for (var key = start + thread; key < end; key = key + {{ 4 * lanes }}u) {
        v_most = max(v_most, key_scales[(v_row + key) / 4u][key % 4u]);
    }
    // Brings all rows of V to one scale; weights are multiplied by it.
    let v_scale = -least_of(-v_most, subgroup);
    let weight_factor = WEIGHT_FACTOR / v_scale;
{% for r in range(rows_each) %}
    let undo{{ r }} = query_scales[q_row + row_base + local{{ r }}] * p.scale;
    var most{{ r }} = LOWEST;
    var total{{ r }} = 0.0; // sum of this thread's weights
{% endfor %}
    let q_begin = (q_row + row_base{{ of_strip }}) * {{ wide }}u;
{{ fetch_own(edge, "queries", "q_begin", 0, 2, "q_plane") }}
{{ accumulators(edge, 16, 16 * own_tiles) }}

    for (var base = start & ~{{ other_rows - 1 }}u; base < end; base = base + {{ other_rows }}u) {
        let k_begin = (k_row + base{{ of_half }}) * {{ wide }}u;
        let v_begin = 2u * k_plane + (k_row + base) * {{ wide }}u;
{{ scores(edge, "queries", "q_begin", "keys", "k_begin", 0, "q_plane", "k_plane") }}
        workgroupBarrier();
        var shrinking = false;
{% for r in range(rows_each) %}
        {
            var highest = vec4<f32>(LOWEST);
{{ each_quad(r) }}
                let score = {{ four("sums", "at") }} * undo{{ r }} * key_scales[(k_row + other) / 4u];
                let seen = select(vec4<f32>(LOWEST), score, visible(other, seen{{ r }}));
                highest = max(highest, seen);
{{ stage("at", "seen", "sums", "f32") }}
            }
            var of_row = max(max(highest.x, highest.y), max(highest.z, highest.w));
{% for step in [1, 2, 4, 8] if step < share %}
            of_row = max(of_row, subgroupShuffleXor(of_row, {{ step }}u));
{% endfor %}
            let rises = of_row > most{{ r }} + SLACK;
            let by = select(1.0, exp(most{{ r }} - of_row), rises);
            shrinking = shrinking || (rises && most{{ r }} > LOWEST);
            most{{ r }} = select(most{{ r }}, of_row, rises);
            total{{ r }} = total{{ r }} * by;
            if (segment == 0u) { shrink[local{{ r }}] = by; }
{{ each_quad(r) }}
                let score = {{ four("sums", "at") }};
                let weight = select(vec4<f32>(0.0), exp(score - vec4<f32>(most{{ r }})), score > vec4<f32>(LOWEST));
                total{{ r }} = total{{ r }} + dot(weight, vec4<f32>(1.0));
                let staged = weight * weight_factor * key_scales[(v_row + other) / 4u];
{{ stage("to", "staged") }}
            }
        }
{% endfor %}
        let any_shrinking = subgroupMax(u32(shrinking));
        if (lane == 0u) { shrinks[subgroup] = any_shrinking; }
        let shrinking_ones = workgroupUniformLoad(&shrinks);
        if ((shrinking_ones[0] | shrinking_ones[1] | shrinking_ones[2] | shrinking_ones[3]) != 0u) {
{{ in_memory(edge, "sum", "rescale", again=true) }}
        }
{{ gather(edge, "keys", "v_begin", "sum") }}
    }

{% for r in range(rows_each) %}
    {
        var sum = total{{ r }};
{% for step in [1, 2, 4, 8] if step < share %}
        sum = sum + subgroupShuffleXor(sum, {{ step }}u);
{% endfor %}
        let query = row_base + local{{ r }};
        if (segment == 0u) {
            shrink[local{{ r }}] = select(1.0 / sum, 0.0, sum == 0.0);
            if (query < p.queries) { lse[query * p.heads + head] = select(most{{ r }} + log(sum), p.no_key, sum == 0.0); }
        }
    }
{% endfor %}
{{ in_memory(edge, "sum", "finish", "row_base, head, v_scale") }}
}

fn rescale(d: u32, strip: u32, sums_begin: u32, lane: u32) {
    for (var i = lane; i < {{ 256 // unit }}u; i = i + {{ lanes }}u) {
        let row = i / {{ 16 // unit }}u;
        let at = sums_begin + row * {{ sum_stride // unit }}u + i % {{ 16 // unit }}u;
        sums[at] = sums[at] * shrink[16u * strip + row];
    }
}

fn finish(d: u32, strip: u32, sums_begin: u32, lane: u32, row_base: u32, head: u32, v_scale: f32) {
    for (var i = lane; i < 64u; i = i + {{ lanes }}u) {
        let local = 16u * strip + i / 4u;
        let first = d + i % 4u * 4u;
        if (row_base + local < p.queries && first < {{ head_dim }}u) {
            let at = {{ result_at("i / 4u", "i % 4u") }};
            let value = {{ four("sums", "at") }} / WEIGHT_FACTOR * v_scale;
            o[((row_base + local) * p.heads + head) * {{ head_dim // 4 }}u + first / 4u] = value * shrink[local];
        }
    }
}
