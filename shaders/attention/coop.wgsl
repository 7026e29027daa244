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
{% import "shared/coop.wgsl" as coop %}
{% import "attention/shared/buffers.wgsl" as buffers %}
{% import "attention/shared/sides.wgsl" as sides %}
{% import "attention/shared/coop_strips.wgsl" as tiles %}

{% include "attention/shared/params.wgsl" %}

// Q in two planes.
@group(0) @binding(0) var<storage, read> queries: array<{{ tiles.packed_type }}>;
// K in two planes, V transposed.
@group(0) @binding(1) var<storage, read> keys: array<{{ tiles.packed_type }}>;
@group(0) @binding(2) var<storage, read> query_scales: array<f32>;     // of Q
@group(0) @binding(3) var<storage, read> key_scales: array<vec4<f32>>; // of K, of V
{{ buffers.ranges(4, sides.queries) }}
@group(0) @binding(5) var<storage, read_write> o: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;

// Below every score. Finite, because WGSL guarantees nothing about infinities.
const LOWEST = -3.0e38;
// A score may exceed m by this: ln 32, so that weights reach 32.
const SLACK = 3.4657359;
// Factor of weights as f16. It keeps weights down to 2^-24 exact and weights of 32 finite.
const WEIGHT_FACTOR = 1024.0;

// For each query: the factor by which O shrinks with this tile, and at the end the factor of O.
var<workgroup> shrink: array<f32, {{ tiles.own_rows }}>;
// Whether O shrinks for any query of a subgroup's threads.
var<workgroup> shrinks: array<u32, 4>;

{% call tiles.each_block(sides.queries, "lse", "f32") %}
    // Smaller values lose precision: `weight_factor` must not overflow.
    var v_most = 0x1p-116f;
    for (var key = start + thread; key < end; key = key + {{ 4 * lanes }}u) {
        v_most = max(v_most, key_scales[(v_row + key) / 4u][key % 4u]);
    }
    // Brings all rows of V to one scale; weights are multiplied by it.
    let v_scale = -least_of(-v_most, subgroup);
    let weight_factor = WEIGHT_FACTOR / v_scale;
{% for r in range(tiles.rows_each) %}
    let undo{{ r }} = query_scales[q_row + row_base + local{{ r }}] * p.scale;
    var most{{ r }} = LOWEST;
    var total{{ r }} = 0.0; // sum of this thread's weights
{% endfor %}
    let q_begin = (q_row + row_base + strip_row) * {{ wide }}u;
{{ tiles.fetch_own("queries", "q_begin", 0, 2, "q_plane") }}
{{ coop.accumulators(16, 16 * tiles.own_tiles) }}

    let first_base = start & ~{{ tiles.other_rows - 1 }}u;
    for (var base = first_base; base < end; base = base + {{ tiles.other_rows }}u) {
        let k_begin = (k_row + base + half_row) * {{ wide }}u;
        let v_begin = 2u * k_plane + (k_row + base) * {{ wide }}u;
{{ tiles.scores("queries", "q_begin", "keys", "k_begin", 0, "q_plane", "k_plane") }}
        workgroupBarrier();
        var shrinking = false;
{% for r in range(tiles.rows_each) %}
        {
            var highest = vec4<f32>(LOWEST);
{% call tiles.each_quad(r) %}
                let sum = {{ tiles.four("sums", "at") }};
                let score = sum * undo{{ r }} * key_scales[(k_row + other) / 4u];
                let seen = select(vec4<f32>(LOWEST), score, visible(other, seen{{ r }}));
                highest = max(highest, seen);
{{ tiles.stage("at", "seen", "sums", "f32") }}
{% endcall %}
            var of_row = max(max(highest.x, highest.y), max(highest.z, highest.w));
{% for step in [1, 2, 4, 8] if step < tiles.share %}
            of_row = max(of_row, subgroupShuffleXor(of_row, {{ step }}u));
{% endfor %}
            let rises = of_row > most{{ r }} + SLACK;
            let by = select(1.0, exp(most{{ r }} - of_row), rises);
            shrinking = shrinking || (rises && most{{ r }} > LOWEST);
            most{{ r }} = select(most{{ r }}, of_row, rises);
            total{{ r }} = total{{ r }} * by;
            if (segment == 0u) { shrink[local{{ r }}] = by; }
{% call tiles.each_quad(r) %}
                let score = {{ tiles.four("sums", "at") }};
                let seen = score > vec4<f32>(LOWEST);
                let weight = select(vec4<f32>(0.0), exp(score - vec4<f32>(most{{ r }})), seen);
                total{{ r }} = total{{ r }} + dot(weight, vec4<f32>(1.0));
                let staged = weight * weight_factor * key_scales[(v_row + other) / 4u];
{{ tiles.stage("to", "staged") }}
{% endcall %}
        }
{% endfor %}
        let any_shrinking = subgroupMax(u32(shrinking));
        if (lane == 0u) { shrinks[subgroup] = any_shrinking; }
        let shrinking_ones = workgroupUniformLoad(&shrinks);
        if ((shrinking_ones[0] | shrinking_ones[1] | shrinking_ones[2] | shrinking_ones[3]) != 0u) {
{% call tiles.in_memory("sum", again=true) %}
        rescale(strip, sums_begin, lane);
{% endcall %}
        }
{{ tiles.gather("keys", "v_begin", "sum") }}
    }

{% for r in range(tiles.rows_each) %}
    {
        var sum = total{{ r }};
{% for step in [1, 2, 4, 8] if step < tiles.share %}
        sum = sum + subgroupShuffleXor(sum, {{ step }}u);
{% endfor %}
        if (segment == 0u) {
            shrink[local{{ r }}] = select(1.0 / sum, 0.0, sum == 0.0);
            if (row{{ r }} < p.queries) {
                lse[row{{ r }} * p.heads + head] =
                    select(most{{ r }} + log(sum), p.no_key, sum == 0.0);
            }
        }
    }
{% endfor %}
{% call tiles.in_memory("sum") %}
        finish(d, strip, sums_begin, lane, row_base, head, v_scale);
{% endcall %}
{% endcall %}

fn rescale(strip: u32, sums_begin: u32, lane: u32) {
    for (var i = lane; i < {{ 256 // tiles.unit }}u; i = i + {{ lanes }}u) {
        let row = i / {{ 16 // tiles.unit }}u;
        let column = i % {{ 16 // tiles.unit }}u;
        let at = sums_begin + row * {{ tiles.sum_stride // tiles.unit }}u + column;
        sums[at] = sums[at] * shrink[16u * strip + row];
    }
}

fn finish(
    d: u32, strip: u32, sums_begin: u32, lane: u32, row_base: u32, head: u32, v_scale: f32,
) {
{% call tiles.each_result(sides.queries) %}
            let value = {{ tiles.four("sums", "at") }} / WEIGHT_FACTOR * v_scale;
            o[to] = value * shrink[local];
{% endcall %}
}
