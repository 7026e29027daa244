// attention_dkv_coop: edge=16 lanes=32 vectors head_dim=8 wide=16 strips=4

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

// Parameters of the attention kernels, `AttentionParams` in src/kernels/attention/call.rs.
struct Params {
    first_group: u32,
    groups: u32,
    queries: u32,   // M, rows of Q and O
    keys: u32,      // rows of K and V
    heads: u32,     // H
    kv_heads: u32,  // of K and V; H / kv_heads consecutive query heads share one
    scale: f32,     // of the scores
    // log-sum-exp of a query that sees no key: minus infinity, which WGSL cannot spell
    no_key: f32,
}

var<immediate> p: Params;
// Q in two planes and transposed, dO in one and transposed.
@group(0) @binding(0) var<storage, read> queries: array<f16>;
// K in two planes and transposed, V.
@group(0) @binding(1) var<storage, read> keys: array<f16>;
@group(0) @binding(2) var<storage, read> query_scales: array<f32>;       // of Q, of dO
@group(0) @binding(3) var<storage, read> key_scales: array<f32>;         // of K, of V
// For each query and head: lse, delta.
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>;
// For each key: the first row of the other side that it sees, and the end.
@group(0) @binding(5) var<storage, read> query_ranges: array<vec2<u32>>;
@group(0) @binding(6) var<storage, read_write> dk: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> dv: array<vec4<f32>>;

// Factor of weights as f16.
const WEIGHT_FACTOR = 16384.0;

// For each query of a step: Q's scale and lse; the factors that bring dO and Q to one scale for
// all; and delta over dO's scale.
var<workgroup> q_scale: array<f32, 32>;
var<workgroup> lse: array<f32, 32>;
var<workgroup> do_ratio: array<f32, 32>;
var<workgroup> q_ratio: array<f32, 32>;
var<workgroup> delta: array<f32, 32>;

// Scores, or results before they are stored: [own row][other row].
var<workgroup> sums: array<f32, 2304>;
// Values derived from the scores, as the next product reads them: [own row][other row].
var<workgroup> weights: array<f16, 2560>;
var<workgroup> least: array<f32, 4>; // of each subgroup

fn least_of(value: f32, subgroup: u32) -> f32 {
    workgroupBarrier();
    least[subgroup] = subgroupMin(value);
    workgroupBarrier();
    return min(min(least[0], least[1]), min(least[2], least[3]));
}

// Rows of a head, as attention/pack.wgsl pads them.
fn padded(rows: u32) -> u32 {
    return (rows + 63u) / 64u * 64u;
}

// Which of the four rows from `other` on lie in the range that a row sees.
fn visible(other: u32, seen: vec2<u32>) -> vec4<bool> {
    let others = vec4<u32>(other) + vec4<u32>(0u, 1u, 2u, 3u);
    return (others >= vec4<u32>(seen.x)) & (others < vec4<u32>(seen.y));
}

@compute @workgroup_size(128)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) subgroup_size: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let group = p.first_group + workgroup.y * count.x + workgroup.x;
    if (group >= p.groups) {
        if (p.groups == 0u && thread == 0u) {
            dv[0] = vec4<f32>(f32(subgroup_size));
        }
        return;
    }
    let block = group / p.kv_heads;
    let kv_head = group - block * p.kv_heads;
    let heads = p.heads / p.kv_heads;
    let row_base = block * 64u;
    let k_rows = padded(p.keys);
    let k_row = kv_head * k_rows;
    let v_row = (p.kv_heads + kv_head) * k_rows;
    let k_plane = p.kv_heads * k_rows * 16u;
    // This subgroup's part of the products, and this thread's rows between products.
    let strip = subgroup / 1u;
    let half = subgroup % 1u;
    let strip_row = 16u * strip;
    let half_row = 32u * half;
    let sums_begin = strip * 576u + half * 32u;
    let weights_begin = strip * 640u;
    let worker = subgroup * 32u + lane;
    let segment = worker % 2u;
    let local0 = worker / 2u + 0u;
    let row0 = row_base + local0;
    let range0 = query_ranges[min(row0, p.keys - 1u)];
    let seen0 = select(vec2<u32>(0u), range0, row0 < p.keys);
    let start = query_ranges[row_base].x;
    let end = query_ranges[min(row_base + 63u, p.keys - 1u)].y;
    var q_most = 0x1p-126f;
    var do_most = 0x1p-126f;
    var v_most = 0x1p-126f;
    var delta_most = 0x1p-126f;
    for (var head = kv_head * heads; head < (kv_head + 1u) * heads; head = head + 1u) {
        let q_rows = padded(p.queries);
        let q_row = head * q_rows;
        let do_row = (p.heads + head) * q_rows;
        let q_plane = p.heads * q_rows * 16u;
        for (var query = start + thread; query < end; query = query + 128u) {
            let of_do = query_scales[do_row + query];
            q_most = max(q_most, query_scales[q_row + query]);
            do_most = max(do_most, of_do);
            delta_most = max(delta_most, abs(stats[query * p.heads + head].y) / of_do);
        }
        for (var local = thread; local < 64u; local = local + 128u) {
            v_most = max(v_most, key_scales[v_row + row_base + local]);
        }
    }
    let all_q = -least_of(-q_most, subgroup);
    let all_do = -least_of(-do_most, subgroup);
    // Packed values are below 2^14. Multiplied by this, no value of dO * V^T with V's scale, and
    // no delta, exceeds 1.
    let v_range = 0x1p-28f / 16.0 / -least_of(-v_most, subgroup);
    let range = min(v_range, 1.0 / -least_of(-delta_most, subgroup));
    let undo0 = key_scales[k_row + row_base + local0] * p.scale;
    let v_scale0 = key_scales[v_row + row_base + local0];
    let k_begin = (k_row + row_base + strip_row) * 16u;
    let v_begin = 3u * k_plane + k_begin;
    var dk_sum0_0 = coop_mat16x16<f32, C>();
    var dv_sum0_0 = coop_mat16x16<f32, C>();

    for (var head = kv_head * heads; head < (kv_head + 1u) * heads; head = head + 1u) {
        let q_rows = padded(p.queries);
        let q_row = head * q_rows;
        let do_row = (p.heads + head) * q_rows;
        let q_plane = p.heads * q_rows * 16u;
        let first_base = start & ~31u;
        for (var base = first_base; base < end; base = base + 32u) {
            let q_begin = (q_row + base + half_row) * 16u;
            let do_begin = 3u * q_plane + q_begin;
            let q_transposed = 2u * q_plane + (q_row + base) * 16u;
            let do_transposed = q_transposed + 2u * q_plane;
            for (var i = thread; i < 32u; i = i + 128u) {
                let stat = stats[min(base + i, p.queries - 1u) * p.heads + head];
                let of_q = query_scales[q_row + base + i];
                let of_do = query_scales[do_row + base + i];
                q_scale[i] = of_q;
                lse[i] = stat.x;
                do_ratio[i] = of_do / all_do;
                q_ratio[i] = of_q / all_q;
                delta[i] = stat.y / of_do;
            }
            {
                var score0_0 = coop_mat16x16<f32, C>();
                var score0_1 = coop_mat16x16<f32, C>();
                for (var k = 0u; k < 16u; k = k + 16u) {
                    let step = k * 16u;
                    let a0 = coopLoadT<coop_mat16x16<f16, A>>(
                        &keys[k_begin + step + 0u], 16u);
                    let a_rest0 = coopLoadT<coop_mat16x16<f16, A>>(
                        &keys[k_begin + k_plane + step + 0u], 16u);
                    {
                        let at = q_begin + step
                            + 0u;
                        let b = coopLoad<coop_mat16x16<f16, B>>(&queries[at], 16u);
                        let rest_at = at + q_plane;
                        let b_rest = coopLoad<coop_mat16x16<f16, B>>(&queries[rest_at], 16u);
                        score0_0 = coopMultiplyAdd(a_rest0, b, score0_0);
                        score0_0 = coopMultiplyAdd(a0, b_rest, score0_0);
                        score0_0 = coopMultiplyAdd(a0, b, score0_0);
                    }
                    {
                        let at = q_begin + step
                            + 256u;
                        let b = coopLoad<coop_mat16x16<f16, B>>(&queries[at], 16u);
                        let rest_at = at + q_plane;
                        let b_rest = coopLoad<coop_mat16x16<f16, B>>(&queries[rest_at], 16u);
                        score0_1 = coopMultiplyAdd(a_rest0, b, score0_1);
                        score0_1 = coopMultiplyAdd(a0, b_rest, score0_1);
                        score0_1 = coopMultiplyAdd(a0, b, score0_1);
                    }
                }
                {
                    let at = sums_begin + 0u;
                    let value = score0_0;
                    coopStoreT(value, &sums[at], 36u);
                }
                {
                    let at = sums_begin + 16u;
                    let value = score0_1;
                    coopStoreT(value, &sums[at], 36u);
                }
            }
            workgroupBarrier();
            for (var n = 0u; n < 4u; n = n + 1u) {
                let local_other = 4u * (segment + n * 2u);
                let at = local0 * 36u + local_other / 1u;
                let to = local0 * 40u + local_other / 1u;
                let other = base + local_other;
                let sum = vec4<f32>(
                    f32(sums[at]), f32(sums[at + 1u]),
                    f32(sums[at + 2u]), f32(sums[at + 3u]));
                let q_scales = vec4<f32>(
                    f32(q_scale[local_other]), f32(q_scale[local_other + 1u]),
                    f32(q_scale[local_other + 2u]), f32(q_scale[local_other + 3u]));
                let score = sum * undo0 * q_scales;
                let lses = vec4<f32>(
                    f32(lse[local_other]), f32(lse[local_other + 1u]),
                    f32(lse[local_other + 2u]), f32(lse[local_other + 3u]));
                let seen = select(vec4<f32>(0.0), exp(score - lses), visible(other, seen0));
                let do_ratios = vec4<f32>(
                    f32(do_ratio[local_other]), f32(do_ratio[local_other + 1u]),
                    f32(do_ratio[local_other + 2u]), f32(do_ratio[local_other + 3u]));
                let weight = seen * WEIGHT_FACTOR * do_ratios;
                weights[to + 0u] = f16(weight.x);
                weights[to + 1u] = f16(weight.y);
                weights[to + 2u] = f16(weight.z);
                weights[to + 3u] = f16(weight.w);
            }
            workgroupBarrier();
            for (var k = 0u; k < 32u; k = k + 16u) {
                let step = k * 16u;
                let a0 = coopLoadT<coop_mat16x16<f16, A>>(
                    &weights[weights_begin + k + 0u],
                    40u);
                {
                    let tile = (half * 1u + 0u);
                    let at = do_transposed + step + tile * 256u + 0u;
                    let b = coopLoad<coop_mat16x16<f16, B>>(&queries[at], 16u);
                    dv_sum0_0 = coopMultiplyAdd(a0, b, dv_sum0_0);
                }
            }
            {
                var score0_0 = coop_mat16x16<f32, C>();
                var score0_1 = coop_mat16x16<f32, C>();
                for (var k = 0u; k < 16u; k = k + 16u) {
                    let step = k * 16u;
                    let a0 = coopLoadT<coop_mat16x16<f16, A>>(
                        &keys[v_begin + step + 0u], 16u);
                    {
                        let at = do_begin + step
                            + 0u;
                        let b = coopLoad<coop_mat16x16<f16, B>>(&queries[at], 16u);
                        score0_0 = coopMultiplyAdd(a0, b, score0_0);
                    }
                    {
                        let at = do_begin + step
                            + 256u;
                        let b = coopLoad<coop_mat16x16<f16, B>>(&queries[at], 16u);
                        score0_1 = coopMultiplyAdd(a0, b, score0_1);
                    }
                }
                {
                    let at = sums_begin + 0u;
                    let value = score0_0;
                    coopStoreT(value, &sums[at], 36u);
                }
                {
                    let at = sums_begin + 16u;
                    let value = score0_1;
                    coopStoreT(value, &sums[at], 36u);
                }
            }
            workgroupBarrier();
            for (var n = 0u; n < 4u; n = n + 1u) {
                let local_other = 4u * (segment + n * 2u);
                let at = local0 * 36u + local_other / 1u;
                let to = local0 * 40u + local_other / 1u;
                let other = base + local_other;
                let weight = vec4<f32>(
                    f32(weights[to]), f32(weights[to + 1u]),
                    f32(weights[to + 2u]), f32(weights[to + 3u]));
                let d_weight = vec4<f32>(
                    f32(sums[at]), f32(sums[at + 1u]),
                    f32(sums[at + 2u]), f32(sums[at + 3u])) * v_scale0;
                let deltas = vec4<f32>(
                    f32(delta[local_other]), f32(delta[local_other + 1u]),
                    f32(delta[local_other + 2u]), f32(delta[local_other + 3u]));
                let graded = weight * ((d_weight - deltas) * range);
                // With a weight of 0 the pair isn't visible, or as good as invisible.
                let q_ratios = vec4<f32>(
                    f32(q_ratio[local_other]), f32(q_ratio[local_other + 1u]),
                    f32(q_ratio[local_other + 2u]), f32(q_ratio[local_other + 3u]));
                let d_score = select(vec4<f32>(0.0), graded, weight > vec4<f32>(0.0)) * q_ratios;
                weights[to + 0u] = f16(d_score.x);
                weights[to + 1u] = f16(d_score.y);
                weights[to + 2u] = f16(d_score.z);
                weights[to + 3u] = f16(d_score.w);
            }
            workgroupBarrier();
            for (var k = 0u; k < 32u; k = k + 16u) {
                let step = k * 16u;
                let a0 = coopLoadT<coop_mat16x16<f16, A>>(
                    &weights[weights_begin + k + 0u],
                    40u);
                {
                    let tile = (half * 1u + 0u);
                    let at = q_transposed + step + tile * 256u + 0u;
                    let b = coopLoad<coop_mat16x16<f16, B>>(&queries[at], 16u);
                    dk_sum0_0 = coopMultiplyAdd(a0, b, dk_sum0_0);
                }
            }
        }
    }

    workgroupBarrier();
    {
        let at = sums_begin + 0u;
        let value = dv_sum0_0;
        coopStoreT(value, &sums[at], 36u);
    }
    workgroupBarrier();
    {
        let d = half * 16u + 0u;
        finish_dv(d, strip, sums_begin, lane, row_base, kv_head, all_do);
    }
    workgroupBarrier();
    {
        let at = sums_begin + 0u;
        let value = dk_sum0_0;
        coopStoreT(value, &sums[at], 36u);
    }
    workgroupBarrier();
    {
        let d = half * 16u + 0u;
        finish_dk(d, strip, sums_begin, lane, row_base, kv_head, all_do, range, all_q);
    }
}

fn finish_dv(
    d: u32, strip: u32, sums_begin: u32, lane: u32, row_base: u32, kv_head: u32, all_do: f32,
) {
    for (var i = lane; i < 64u; i = i + 32u) {
        let local = 16u * strip + i / 4u;
        let own = row_base + local;
        let first = d + i % 4u * 4u;
        if (own < p.keys && first < 8u) {
            let at = sums_begin + i / 4u * 36u + i % 4u * 4u;
            let to = (own * p.kv_heads + kv_head) * 2u + first / 4u;
            dv[to] = vec4<f32>(
                f32(sums[at]), f32(sums[at + 1u]),
                f32(sums[at + 2u]), f32(sums[at + 3u])) / WEIGHT_FACTOR * all_do;
        }
    }
}

fn finish_dk(
    d: u32, strip: u32, sums_begin: u32, lane: u32,
    row_base: u32, kv_head: u32, all_do: f32, range: f32, all_q: f32,
) {
    for (var i = lane; i < 64u; i = i + 32u) {
        let local = 16u * strip + i / 4u;
        let own = row_base + local;
        let first = d + i % 4u * 4u;
        if (own < p.keys && first < 8u) {
            let at = sums_begin + i / 4u * 36u + i % 4u * 4u;
            let to = (own * p.kv_heads + kv_head) * 2u + first / 4u;
            let value = vec4<f32>(
                f32(sums[at]), f32(sums[at + 1u]),
                f32(sums[at + 2u]), f32(sums[at + 3u])) / WEIGHT_FACTOR;
            dk[to] = value * all_do / range * all_q * p.scale;
        }
    }
}
