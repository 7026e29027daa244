// attention_coop: edge=16 lanes=32 vectors head_dim=64 wide=64 strips=4 staged slice=64 kept=2 held=0

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
// Q in two planes.
@group(0) @binding(0) var<storage, read> queries: array<vec4<f16>>;
// K in two planes, V transposed.
@group(0) @binding(1) var<storage, read> keys: array<vec4<f16>>;
@group(0) @binding(2) var<storage, read> query_scales: array<f32>;     // of Q
@group(0) @binding(3) var<storage, read> key_scales: array<vec4<f32>>; // of K, of V
// For each query: the first row of the other side that it sees, and the end.
@group(0) @binding(4) var<storage, read> key_ranges: array<vec2<u32>>;
@group(0) @binding(5) var<storage, read_write> o: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;

// Below every score. Finite, because WGSL guarantees nothing about infinities.
const LOWEST = -3.0e38;
// A score may exceed m by this: ln 32, so that weights reach 32.
const SLACK = 3.4657359;
// Factor of weights as f16. It keeps weights down to 2^-24 exact and weights of 32 finite.
const WEIGHT_FACTOR = 1024.0;

// For each query: the factor by which O shrinks with this tile, and at the end the factor of O.
var<workgroup> shrink: array<f32, 64>;
// Whether O shrinks for any query of a subgroup's threads.
var<workgroup> shrinks: array<u32, 4>;

// Scores, or results before they are stored: [own row][other row].
var<workgroup> sums: array<vec4<f32>, 576>;
// Values derived from the scores, as the next product reads them: [own row][other row].
var<workgroup> weights: array<vec4<f16>, 640>;
// Tiles of the other rows (own rows before the first of them).
var<workgroup> others: array<vec4<f16>, 1152>;
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
            lse[0] = f32(f32(subgroup_size));
        }
        return;
    }
    let block = group / p.heads;
    let head = group - block * p.heads;
    let kv_head = head / (p.heads / p.kv_heads);
    let row_base = block * 64u;
    let q_rows = padded(p.queries);
    let q_row = head * q_rows;
    let do_row = (p.heads + head) * q_rows;
    let q_plane = p.heads * q_rows * 64u;
    let k_rows = padded(p.keys);
    let k_row = kv_head * k_rows;
    let v_row = (p.kv_heads + kv_head) * k_rows;
    let k_plane = p.kv_heads * k_rows * 64u;
    // This subgroup's part of the products, and this thread's rows between products.
    let strip = subgroup / 1u;
    let half = subgroup % 1u;
    // All of the workgroup's rows are copied together.
    let strip_row = 0u;
    let half_row = 0u;
    let sums_begin = strip * 144u + half * 8u;
    let weights_begin = strip * 160u;
    let worker = subgroup * 32u + lane;
    let segment = worker % 2u;
    let local0 = worker / 2u + 0u;
    let row0 = row_base + local0;
    let range0 = key_ranges[min(row0, p.queries - 1u)];
    let seen0 = select(vec2<u32>(0u), range0, row0 < p.queries);
    let start = key_ranges[row_base].x;
    let end = key_ranges[min(row_base + 63u, p.queries - 1u)].y;
    // Smaller values lose precision: `weight_factor` must not overflow.
    var v_most = 0x1p-116f;
    for (var key = start + thread; key < end; key = key + 128u) {
        v_most = max(v_most, key_scales[(v_row + key) / 4u][key % 4u]);
    }
    // Brings all rows of V to one scale; weights are multiplied by it.
    let v_scale = -least_of(-v_most, subgroup);
    let weight_factor = WEIGHT_FACTOR / v_scale;
    let undo0 = query_scales[q_row + row_base + local0] * p.scale;
    var most0 = LOWEST;
    var total0 = 0.0; // sum of this thread's weights
    let q_begin = (q_row + row_base + strip_row) * 64u;
    {
        let origin = (q_begin + 0u) / 4u + 0u + thread % 32u * 2u;
        // Plane, row of tiles, and tile.
        let tile0 = vec3<u32>(
            0u,
            0u,
            thread / 32u + 0u,
        );
        let origin0 =
            origin + tile0.y * 256u + tile0.z * 64u;
        let lo0 = queries[origin0];
        let hi0 = queries[origin0 + 1u];
        // Plane, row of tiles, and tile.
        let tile1 = vec3<u32>(
            0u,
            1u,
            thread / 32u + 0u,
        );
        let origin1 =
            origin + tile1.y * 256u + tile1.z * 64u;
        let lo1 = queries[origin1];
        let hi1 = queries[origin1 + 1u];
        // Plane, row of tiles, and tile.
        let tile2 = vec3<u32>(
            0u,
            2u,
            thread / 32u + 0u,
        );
        let origin2 =
            origin + tile2.y * 256u + tile2.z * 64u;
        let lo2 = queries[origin2];
        let hi2 = queries[origin2 + 1u];
        // Plane, row of tiles, and tile.
        let tile3 = vec3<u32>(
            0u,
            3u,
            thread / 32u + 0u,
        );
        let origin3 =
            origin + tile3.y * 256u + tile3.z * 64u;
        let lo3 = queries[origin3];
        let hi3 = queries[origin3 + 1u];
        workgroupBarrier();
        let place = 0u + thread % 32u / 2u * 18u + thread % 2u * 2u;
        let row0 = tile0.x * 4u + tile0.y;
        let place0 = place + row0 * 288u + tile0.z * 4u;
        others[place0] = lo0;
        others[place0 + 1u] = hi0;
        let row1 = tile1.x * 4u + tile1.y;
        let place1 = place + row1 * 288u + tile1.z * 4u;
        others[place1] = lo1;
        others[place1 + 1u] = hi1;
        let row2 = tile2.x * 4u + tile2.y;
        let place2 = place + row2 * 288u + tile2.z * 4u;
        others[place2] = lo2;
        others[place2 + 1u] = hi2;
        let row3 = tile3.x * 4u + tile3.y;
        let place3 = place + row3 * 288u + tile3.z * 4u;
        others[place3] = lo3;
        others[place3 + 1u] = hi3;
        workgroupBarrier();
    }
    let own0_0_0 = coopLoadT<coop_mat16x16<f16, A>>(
        &others[strip * 288u + 0u], 18u);
    let own0_0_16 = coopLoadT<coop_mat16x16<f16, A>>(
        &others[strip * 288u + 4u], 18u);
    let own0_0_32 = coopLoadT<coop_mat16x16<f16, A>>(
        &others[strip * 288u + 8u], 18u);
    let own0_0_48 = coopLoadT<coop_mat16x16<f16, A>>(
        &others[strip * 288u + 12u], 18u);
    {
        let origin = (q_begin + q_plane) / 4u + 0u + thread % 32u * 2u;
        // Plane, row of tiles, and tile.
        let tile0 = vec3<u32>(
            0u,
            0u,
            thread / 32u + 0u,
        );
        let origin0 =
            origin + tile0.y * 256u + tile0.z * 64u;
        let lo0 = queries[origin0];
        let hi0 = queries[origin0 + 1u];
        // Plane, row of tiles, and tile.
        let tile1 = vec3<u32>(
            0u,
            1u,
            thread / 32u + 0u,
        );
        let origin1 =
            origin + tile1.y * 256u + tile1.z * 64u;
        let lo1 = queries[origin1];
        let hi1 = queries[origin1 + 1u];
        // Plane, row of tiles, and tile.
        let tile2 = vec3<u32>(
            0u,
            2u,
            thread / 32u + 0u,
        );
        let origin2 =
            origin + tile2.y * 256u + tile2.z * 64u;
        let lo2 = queries[origin2];
        let hi2 = queries[origin2 + 1u];
        // Plane, row of tiles, and tile.
        let tile3 = vec3<u32>(
            0u,
            3u,
            thread / 32u + 0u,
        );
        let origin3 =
            origin + tile3.y * 256u + tile3.z * 64u;
        let lo3 = queries[origin3];
        let hi3 = queries[origin3 + 1u];
        workgroupBarrier();
        let place = 0u + thread % 32u / 2u * 18u + thread % 2u * 2u;
        let row0 = tile0.x * 4u + tile0.y;
        let place0 = place + row0 * 288u + tile0.z * 4u;
        others[place0] = lo0;
        others[place0 + 1u] = hi0;
        let row1 = tile1.x * 4u + tile1.y;
        let place1 = place + row1 * 288u + tile1.z * 4u;
        others[place1] = lo1;
        others[place1 + 1u] = hi1;
        let row2 = tile2.x * 4u + tile2.y;
        let place2 = place + row2 * 288u + tile2.z * 4u;
        others[place2] = lo2;
        others[place2 + 1u] = hi2;
        let row3 = tile3.x * 4u + tile3.y;
        let place3 = place + row3 * 288u + tile3.z * 4u;
        others[place3] = lo3;
        others[place3 + 1u] = hi3;
        workgroupBarrier();
    }
    let own1_0_0 = coopLoadT<coop_mat16x16<f16, A>>(
        &others[strip * 288u + 0u], 18u);
    let own1_0_16 = coopLoadT<coop_mat16x16<f16, A>>(
        &others[strip * 288u + 4u], 18u);
    let own1_0_32 = coopLoadT<coop_mat16x16<f16, A>>(
        &others[strip * 288u + 8u], 18u);
    let own1_0_48 = coopLoadT<coop_mat16x16<f16, A>>(
        &others[strip * 288u + 12u], 18u);
    var sum0_0 = coop_mat16x16<f32, C>();
    var sum0_1 = coop_mat16x16<f32, C>();
    var sum0_2 = coop_mat16x16<f32, C>();
    var sum0_3 = coop_mat16x16<f32, C>();

    let first_base = start & ~31u;
    for (var base = first_base; base < end; base = base + 32u) {
        let k_begin = (k_row + base + half_row) * 64u;
        let v_begin = 2u * k_plane + (k_row + base) * 64u;
        {
            var score0_0 = coop_mat16x16<f32, C>();
            var score0_1 = coop_mat16x16<f32, C>();
            {
                let origin = (k_begin + 0u) / 4u + 0u + thread % 32u * 2u;
                // Plane, row of tiles, and tile.
                let tile0 = vec3<u32>(
                    0u,
                    0u,
                    thread / 32u + 0u,
                );
                let origin0 = origin + tile0.x * (k_plane / 4u)
                    + tile0.y * 256u + tile0.z * 64u;
                let lo0 = keys[origin0];
                let hi0 = keys[origin0 + 1u];
                // Plane, row of tiles, and tile.
                let tile1 = vec3<u32>(
                    0u,
                    1u,
                    thread / 32u + 0u,
                );
                let origin1 = origin + tile1.x * (k_plane / 4u)
                    + tile1.y * 256u + tile1.z * 64u;
                let lo1 = keys[origin1];
                let hi1 = keys[origin1 + 1u];
                // Plane, row of tiles, and tile.
                let tile2 = vec3<u32>(
                    1u,
                    0u,
                    thread / 32u + 0u,
                );
                let origin2 = origin + tile2.x * (k_plane / 4u)
                    + tile2.y * 256u + tile2.z * 64u;
                let lo2 = keys[origin2];
                let hi2 = keys[origin2 + 1u];
                // Plane, row of tiles, and tile.
                let tile3 = vec3<u32>(
                    1u,
                    1u,
                    thread / 32u + 0u,
                );
                let origin3 = origin + tile3.x * (k_plane / 4u)
                    + tile3.y * 256u + tile3.z * 64u;
                let lo3 = keys[origin3];
                let hi3 = keys[origin3 + 1u];
                workgroupBarrier();
                let place = 0u + thread % 32u / 2u * 18u + thread % 2u * 2u;
                let row0 = tile0.x * 2u + tile0.y;
                let place0 = place + row0 * 288u + tile0.z * 4u;
                others[place0] = lo0;
                others[place0 + 1u] = hi0;
                let row1 = tile1.x * 2u + tile1.y;
                let place1 = place + row1 * 288u + tile1.z * 4u;
                others[place1] = lo1;
                others[place1 + 1u] = hi1;
                let row2 = tile2.x * 2u + tile2.y;
                let place2 = place + row2 * 288u + tile2.z * 4u;
                others[place2] = lo2;
                others[place2 + 1u] = hi2;
                let row3 = tile3.x * 2u + tile3.y;
                let place3 = place + row3 * 288u + tile3.z * 4u;
                others[place3] = lo3;
                others[place3 + 1u] = hi3;
                workgroupBarrier();
            }
            {
                let a0 =
                    own0_0_0;
                let a_rest0 =
                    own1_0_0;
                {
                    let at = half * 576u + 0u;
                    let b = coopLoad<coop_mat16x16<f16, B>>(&others[at], 18u);
                    let rest_at = at + 576u;
                    let b_rest = coopLoad<coop_mat16x16<f16, B>>(&others[rest_at], 18u);
                    score0_0 = coopMultiplyAdd(a_rest0, b, score0_0);
                    score0_0 = coopMultiplyAdd(a0, b_rest, score0_0);
                    score0_0 = coopMultiplyAdd(a0, b, score0_0);
                }
                {
                    let at = half * 576u + 288u;
                    let b = coopLoad<coop_mat16x16<f16, B>>(&others[at], 18u);
                    let rest_at = at + 576u;
                    let b_rest = coopLoad<coop_mat16x16<f16, B>>(&others[rest_at], 18u);
                    score0_1 = coopMultiplyAdd(a_rest0, b, score0_1);
                    score0_1 = coopMultiplyAdd(a0, b_rest, score0_1);
                    score0_1 = coopMultiplyAdd(a0, b, score0_1);
                }
            }
            {
                let a0 =
                    own0_0_16;
                let a_rest0 =
                    own1_0_16;
                {
                    let at = half * 576u + 4u;
                    let b = coopLoad<coop_mat16x16<f16, B>>(&others[at], 18u);
                    let rest_at = at + 576u;
                    let b_rest = coopLoad<coop_mat16x16<f16, B>>(&others[rest_at], 18u);
                    score0_0 = coopMultiplyAdd(a_rest0, b, score0_0);
                    score0_0 = coopMultiplyAdd(a0, b_rest, score0_0);
                    score0_0 = coopMultiplyAdd(a0, b, score0_0);
                }
                {
                    let at = half * 576u + 292u;
                    let b = coopLoad<coop_mat16x16<f16, B>>(&others[at], 18u);
                    let rest_at = at + 576u;
                    let b_rest = coopLoad<coop_mat16x16<f16, B>>(&others[rest_at], 18u);
                    score0_1 = coopMultiplyAdd(a_rest0, b, score0_1);
                    score0_1 = coopMultiplyAdd(a0, b_rest, score0_1);
                    score0_1 = coopMultiplyAdd(a0, b, score0_1);
                }
            }
            {
                let a0 =
                    own0_0_32;
                let a_rest0 =
                    own1_0_32;
                {
                    let at = half * 576u + 8u;
                    let b = coopLoad<coop_mat16x16<f16, B>>(&others[at], 18u);
                    let rest_at = at + 576u;
                    let b_rest = coopLoad<coop_mat16x16<f16, B>>(&others[rest_at], 18u);
                    score0_0 = coopMultiplyAdd(a_rest0, b, score0_0);
                    score0_0 = coopMultiplyAdd(a0, b_rest, score0_0);
                    score0_0 = coopMultiplyAdd(a0, b, score0_0);
                }
                {
                    let at = half * 576u + 296u;
                    let b = coopLoad<coop_mat16x16<f16, B>>(&others[at], 18u);
                    let rest_at = at + 576u;
                    let b_rest = coopLoad<coop_mat16x16<f16, B>>(&others[rest_at], 18u);
                    score0_1 = coopMultiplyAdd(a_rest0, b, score0_1);
                    score0_1 = coopMultiplyAdd(a0, b_rest, score0_1);
                    score0_1 = coopMultiplyAdd(a0, b, score0_1);
                }
            }
            {
                let a0 =
                    own0_0_48;
                let a_rest0 =
                    own1_0_48;
                {
                    let at = half * 576u + 12u;
                    let b = coopLoad<coop_mat16x16<f16, B>>(&others[at], 18u);
                    let rest_at = at + 576u;
                    let b_rest = coopLoad<coop_mat16x16<f16, B>>(&others[rest_at], 18u);
                    score0_0 = coopMultiplyAdd(a_rest0, b, score0_0);
                    score0_0 = coopMultiplyAdd(a0, b_rest, score0_0);
                    score0_0 = coopMultiplyAdd(a0, b, score0_0);
                }
                {
                    let at = half * 576u + 300u;
                    let b = coopLoad<coop_mat16x16<f16, B>>(&others[at], 18u);
                    let rest_at = at + 576u;
                    let b_rest = coopLoad<coop_mat16x16<f16, B>>(&others[rest_at], 18u);
                    score0_1 = coopMultiplyAdd(a_rest0, b, score0_1);
                    score0_1 = coopMultiplyAdd(a0, b_rest, score0_1);
                    score0_1 = coopMultiplyAdd(a0, b, score0_1);
                }
            }
            {
                let at = sums_begin + 0u;
                let value = score0_0;
                coopStoreT(value, &sums[at], 9u);
            }
            {
                let at = sums_begin + 4u;
                let value = score0_1;
                coopStoreT(value, &sums[at], 9u);
            }
        }
        workgroupBarrier();
        var shrinking = false;
        {
            var highest = vec4<f32>(LOWEST);
            for (var n = 0u; n < 4u; n = n + 1u) {
                let local_other = 4u * (segment + n * 2u);
                let at = local0 * 9u + local_other / 4u;
                let to = local0 * 10u + local_other / 4u;
                let other = base + local_other;
                let sum = vec4<f32>(sums[at]);
                let score = sum * undo0 * key_scales[(k_row + other) / 4u];
                let seen = select(vec4<f32>(LOWEST), score, visible(other, seen0));
                highest = max(highest, seen);
                sums[at] = vec4<f32>(seen);
            }
            var of_row = max(max(highest.x, highest.y), max(highest.z, highest.w));
            of_row = max(of_row, subgroupShuffleXor(of_row, 1u));
            let rises = of_row > most0 + SLACK;
            let by = select(1.0, exp(most0 - of_row), rises);
            shrinking = shrinking || (rises && most0 > LOWEST);
            most0 = select(most0, of_row, rises);
            total0 = total0 * by;
            if (segment == 0u) { shrink[local0] = by; }
            for (var n = 0u; n < 4u; n = n + 1u) {
                let local_other = 4u * (segment + n * 2u);
                let at = local0 * 9u + local_other / 4u;
                let to = local0 * 10u + local_other / 4u;
                let other = base + local_other;
                let score = vec4<f32>(sums[at]);
                let seen = score > vec4<f32>(LOWEST);
                let weight = select(vec4<f32>(0.0), exp(score - vec4<f32>(most0)), seen);
                total0 = total0 + dot(weight, vec4<f32>(1.0));
                let staged = weight * weight_factor * key_scales[(v_row + other) / 4u];
                weights[to] = vec4<f16>(staged);
            }
        }
        let any_shrinking = subgroupMax(u32(shrinking));
        if (lane == 0u) { shrinks[subgroup] = any_shrinking; }
        let shrinking_ones = workgroupUniformLoad(&shrinks);
        if ((shrinking_ones[0] | shrinking_ones[1] | shrinking_ones[2] | shrinking_ones[3]) != 0u) {
            workgroupBarrier();
            {
                let at = sums_begin + 0u;
                let value = sum0_0;
                coopStoreT(value, &sums[at], 9u);
            }
            workgroupBarrier();
            {
                let d = half * 64u + 0u;
                rescale(strip, sums_begin, lane);
            }
            workgroupBarrier();
            {
                let at = sums_begin + 0u;
                sum0_0 =
                    coopLoadT<coop_mat16x16<f32, C>>(&sums[at], 9u);
            }
            workgroupBarrier();
            {
                let at = sums_begin + 0u;
                let value = sum0_1;
                coopStoreT(value, &sums[at], 9u);
            }
            workgroupBarrier();
            {
                let d = half * 64u + 16u;
                rescale(strip, sums_begin, lane);
            }
            workgroupBarrier();
            {
                let at = sums_begin + 0u;
                sum0_1 =
                    coopLoadT<coop_mat16x16<f32, C>>(&sums[at], 9u);
            }
            workgroupBarrier();
            {
                let at = sums_begin + 0u;
                let value = sum0_2;
                coopStoreT(value, &sums[at], 9u);
            }
            workgroupBarrier();
            {
                let d = half * 64u + 32u;
                rescale(strip, sums_begin, lane);
            }
            workgroupBarrier();
            {
                let at = sums_begin + 0u;
                sum0_2 =
                    coopLoadT<coop_mat16x16<f32, C>>(&sums[at], 9u);
            }
            workgroupBarrier();
            {
                let at = sums_begin + 0u;
                let value = sum0_3;
                coopStoreT(value, &sums[at], 9u);
            }
            workgroupBarrier();
            {
                let d = half * 64u + 48u;
                rescale(strip, sums_begin, lane);
            }
            workgroupBarrier();
            {
                let at = sums_begin + 0u;
                sum0_3 =
                    coopLoadT<coop_mat16x16<f32, C>>(&sums[at], 9u);
            }
        }
        {
            let origin = (v_begin + 0u) / 4u + 0u + thread % 32u * 2u;
            // Plane, row of tiles, and tile.
            let tile0 = vec3<u32>(
                0u,
                0u,
                thread / 32u + 0u,
            );
            let origin0 =
                origin + tile0.y * 256u + tile0.z * 64u;
            let lo0 = keys[origin0];
            let hi0 = keys[origin0 + 1u];
            // Plane, row of tiles, and tile.
            let tile1 = vec3<u32>(
                0u,
                1u,
                thread / 32u + 0u,
            );
            let origin1 =
                origin + tile1.y * 256u + tile1.z * 64u;
            let lo1 = keys[origin1];
            let hi1 = keys[origin1 + 1u];
            workgroupBarrier();
            let place = 0u + thread % 32u / 2u * 10u + thread % 2u * 2u;
            let place0 = place + tile0.z * 160u + tile0.y * 4u;
            others[place0] = lo0;
            others[place0 + 1u] = hi0;
            let place1 = place + tile1.z * 160u + tile1.y * 4u;
            others[place1] = lo1;
            others[place1 + 1u] = hi1;
            workgroupBarrier();
        }
        for (var k = 0u; k < 8u; k = k + 4u) {
            let a0 = coopLoadT<coop_mat16x16<f16, A>>(
                &weights[weights_begin + k + 0u],
                10u);
            {
                let tile = (half * 4u + 0u);
                let at = tile * 160u + 0u + k;
                let b = coopLoad<coop_mat16x16<f16, B>>(&others[at], 10u);
                sum0_0 = coopMultiplyAdd(a0, b, sum0_0);
            }
            {
                let tile = (half * 4u + 1u);
                let at = tile * 160u + 0u + k;
                let b = coopLoad<coop_mat16x16<f16, B>>(&others[at], 10u);
                sum0_1 = coopMultiplyAdd(a0, b, sum0_1);
            }
            {
                let tile = (half * 4u + 2u);
                let at = tile * 160u + 0u + k;
                let b = coopLoad<coop_mat16x16<f16, B>>(&others[at], 10u);
                sum0_2 = coopMultiplyAdd(a0, b, sum0_2);
            }
            {
                let tile = (half * 4u + 3u);
                let at = tile * 160u + 0u + k;
                let b = coopLoad<coop_mat16x16<f16, B>>(&others[at], 10u);
                sum0_3 = coopMultiplyAdd(a0, b, sum0_3);
            }
        }
    }

    {
        var sum = total0;
        sum = sum + subgroupShuffleXor(sum, 1u);
        if (segment == 0u) {
            shrink[local0] = select(1.0 / sum, 0.0, sum == 0.0);
            if (row0 < p.queries) {
                lse[row0 * p.heads + head] =
                    select(most0 + log(sum), p.no_key, sum == 0.0);
            }
        }
    }
    workgroupBarrier();
    {
        let at = sums_begin + 0u;
        let value = sum0_0;
        coopStoreT(value, &sums[at], 9u);
    }
    workgroupBarrier();
    {
        let d = half * 64u + 0u;
        finish(d, strip, sums_begin, lane, row_base, head, v_scale);
    }
    workgroupBarrier();
    {
        let at = sums_begin + 0u;
        let value = sum0_1;
        coopStoreT(value, &sums[at], 9u);
    }
    workgroupBarrier();
    {
        let d = half * 64u + 16u;
        finish(d, strip, sums_begin, lane, row_base, head, v_scale);
    }
    workgroupBarrier();
    {
        let at = sums_begin + 0u;
        let value = sum0_2;
        coopStoreT(value, &sums[at], 9u);
    }
    workgroupBarrier();
    {
        let d = half * 64u + 32u;
        finish(d, strip, sums_begin, lane, row_base, head, v_scale);
    }
    workgroupBarrier();
    {
        let at = sums_begin + 0u;
        let value = sum0_3;
        coopStoreT(value, &sums[at], 9u);
    }
    workgroupBarrier();
    {
        let d = half * 64u + 48u;
        finish(d, strip, sums_begin, lane, row_base, head, v_scale);
    }
}

fn rescale(strip: u32, sums_begin: u32, lane: u32) {
    for (var i = lane; i < 64u; i = i + 32u) {
        let row = i / 4u;
        let column = i % 4u;
        let at = sums_begin + row * 9u + column;
        sums[at] = sums[at] * shrink[16u * strip + row];
    }
}

fn finish(
    d: u32, strip: u32, sums_begin: u32, lane: u32, row_base: u32, head: u32, v_scale: f32,
) {
    for (var i = lane; i < 64u; i = i + 32u) {
        let local = 16u * strip + i / 4u;
        let own = row_base + local;
        let first = d + i % 4u * 4u;
        if (own < p.queries && first < 64u) {
            let at = sums_begin + i / 4u * 9u + i % 4u * 1u;
            let to = (own * p.heads + head) * 16u + first / 4u;
            let value = vec4<f32>(sums[at]) / WEIGHT_FACTOR * v_scale;
            o[to] = value * shrink[local];
        }
    }
}
