// attention_dkv_tile: tall=2 head_quads=32

// dK and dV of attention, [keys, Hkv * D]. Keys go over tiles of the queries that see them, in all
// heads that share the keys.
//
// P = exp(scale * Q * K^T - lse), dS = P * (dO * V^T - delta),
// dV = P^T * dO, dK = scale * dS^T * Q.
//
// Floor: bytes of Q, dO, K, V, dK and dV, 8 * D * (M * H + 2 * keys * Hkv), over the memory's
// bandwidth; 8 * H * D FLOP per pair of a query and a key that it sees (M * keys pairs, half of
// them in causal order) over the rate of f32.

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
@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> d_o: array<vec4<f32>>;
// For each query and head: lse, delta.
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>;
// For each key: the first row of the other side that it sees, and the end.
@group(0) @binding(5) var<storage, read> query_ranges: array<vec2<u32>>;
@group(0) @binding(6) var<storage, read_write> dk: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> dv: array<vec4<f32>>;

// Tiles of both sides, later weights and what they are multiplied by.
var<workgroup> staged: array<vec4<f32>, 768>;

@compute @workgroup_size(128)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let group = p.first_group + workgroup.y * count.x + workgroup.x;
    if (group >= p.groups) {
        return;
    }
    let block = group / p.kv_heads;
    let kv_head = group - block * p.kv_heads;
    let heads = p.heads / p.kv_heads;
    let base = block * 16u;
    let across = thread % 16u;
    let down = thread / 16u;
    let staged_row = thread / 8u;
    let staged_quad = thread % 8u;
    let start = query_ranges[base].x;
    let end = query_ranges[min(base + 15u, p.keys - 1u)].y;
    let own_row0 =
        min(base + staged_row + 0u, p.keys - 1u);
    let own_begin0 =
        (own_row0 * p.kv_heads + kv_head) * 32u;
    var dk0_0 = vec4<f32>(0.0);
    var dk0_1 = vec4<f32>(0.0);
    var dk1_0 = vec4<f32>(0.0);
    var dk1_1 = vec4<f32>(0.0);
    var dv0_0 = vec4<f32>(0.0);
    var dv0_1 = vec4<f32>(0.0);
    var dv1_0 = vec4<f32>(0.0);
    var dv1_1 = vec4<f32>(0.0);

    for (var head = kv_head * heads; head < (kv_head + 1u) * heads; head = head + 1u) {
        for (var query = start; query < end; query = query + 64u) {
            let other_row0 =
                min(query + staged_row + 0u, p.queries - 1u);
            let other_begin0 =
                (other_row0 * p.heads + head) * 32u;
            let other_row1 =
                min(query + staged_row + 16u, p.queries - 1u);
            let other_begin1 =
                (other_row1 * p.heads + head) * 32u;
            let other_row2 =
                min(query + staged_row + 32u, p.queries - 1u);
            let other_begin2 =
                (other_row2 * p.heads + head) * 32u;
            let other_row3 =
                min(query + staged_row + 48u, p.queries - 1u);
            let other_begin3 =
                (other_row3 * p.heads + head) * 32u;
            var weight0 = vec4<f32>(0.0);
            var weight1 = vec4<f32>(0.0);
            for (var first = 0u; first < 32u; first = first + 8u) {
                let quad = first + staged_quad;
                let left0 = k[own_begin0 + quad];
                let right0 = q[other_begin0 + quad];
                let right1 = q[other_begin1 + quad];
                let right2 = q[other_begin2 + quad];
                let right3 = q[other_begin3 + quad];
                workgroupBarrier();
                {
                    let row = staged_row + 0u;
                    let at = row * 8u + (staged_quad ^ (row / 2u % 8u));
                    staged[at] = left0;
                }
                {
                    let row = staged_row + 0u;
                    let at = row * 8u + (staged_quad ^ (row / 4u % 8u));
                    staged[256u + at] = right0;
                }
                {
                    let row = staged_row + 16u;
                    let at = row * 8u + (staged_quad ^ (row / 4u % 8u));
                    staged[256u + at] = right1;
                }
                {
                    let row = staged_row + 32u;
                    let at = row * 8u + (staged_quad ^ (row / 4u % 8u));
                    staged[256u + at] = right2;
                }
                {
                    let row = staged_row + 48u;
                    let at = row * 8u + (staged_quad ^ (row / 4u % 8u));
                    staged[256u + at] = right3;
                }
                workgroupBarrier();
                let staged_quads = min(32u - first, 8u);
                for (var quad = 0u; quad < staged_quads; quad = quad + 1u) {
                    let left_at = down * 16u + (quad ^ down);
                    let right_at = across * 32u + (quad ^ (across % 8u));
                    let other0 = staged[right_at + 256u];
                    let other1 = staged[right_at + 264u];
                    let other2 = staged[right_at + 272u];
                    let other3 = staged[right_at + 280u];
                    {
                        let own = staged[left_at + 0u];
                        weight0.x = weight0.x + own.x * other0.x + own.y * other0.y + own.z * other0.z + own.w * other0.w;
                        weight0.y = weight0.y + own.x * other1.x + own.y * other1.y + own.z * other1.z + own.w * other1.w;
                        weight0.z = weight0.z + own.x * other2.x + own.y * other2.y + own.z * other2.z + own.w * other2.w;
                        weight0.w = weight0.w + own.x * other3.x + own.y * other3.y + own.z * other3.z + own.w * other3.w;
                    }
                    {
                        let own = staged[left_at + 8u];
                        weight1.x = weight1.x + own.x * other0.x + own.y * other0.y + own.z * other0.z + own.w * other0.w;
                        weight1.y = weight1.y + own.x * other1.x + own.y * other1.y + own.z * other1.z + own.w * other1.w;
                        weight1.z = weight1.z + own.x * other2.x + own.y * other2.y + own.z * other2.z + own.w * other2.w;
                        weight1.w = weight1.w + own.x * other3.x + own.y * other3.y + own.z * other3.z + own.w * other3.w;
                    }
                }
            }
            workgroupBarrier();
            {
                let lse = vec4<f32>(
                    stats[min(query + 4u * across + 0u, p.queries - 1u) * p.heads + head].x,
                    stats[min(query + 4u * across + 1u, p.queries - 1u) * p.heads + head].x,
                    stats[min(query + 4u * across + 2u, p.queries - 1u) * p.heads + head].x,
                    stats[min(query + 4u * across + 3u, p.queries - 1u) * p.heads + head].x,
                );
                let others = vec4<u32>(query + 4u * across) + vec4<u32>(0u, 1u, 2u, 3u);
                let own0 = min(base + down * 2u + 0u, p.keys - 1u);
                let seen0 = query_ranges[own0];
                let visible0 =
                    (others >= vec4<u32>(seen0.x)) & (others < vec4<u32>(seen0.y));
                let own1 = min(base + down * 2u + 1u, p.keys - 1u);
                let seen1 = query_ranges[own1];
                let visible1 =
                    (others >= vec4<u32>(seen1.x)) & (others < vec4<u32>(seen1.y));
                weight0 = select(vec4<f32>(0.0), exp(weight0 * p.scale - lse), visible0);
                weight1 = select(vec4<f32>(0.0), exp(weight1 * p.scale - lse), visible1);
            }
            staged[(down * 2u + 0u) * 16u + across] = weight0;
            staged[(down * 2u + 1u) * 16u + across] = weight1;
            {
                let left = min(end - query, 64u);
                for (var first = 0u; first < left; first = first + 16u) {
                    let row0 =
                        min(query + first + down + 0u, p.queries - 1u);
                    let begin0 =
                        (row0 * p.heads + head) * 32u;
                    let right0_0 = d_o[begin0 + across + 0u];
                    let right0_1 = d_o[begin0 + across + 16u];
                    let row1 =
                        min(query + first + down + 8u, p.queries - 1u);
                    let begin1 =
                        (row1 * p.heads + head) * 32u;
                    let right1_0 = d_o[begin1 + across + 0u];
                    let right1_1 = d_o[begin1 + across + 16u];
                    workgroupBarrier();
                    let to = down * 32u + across;
                    staged[256u + to] =
                        right0_0;
                    staged[272u + to] =
                        right0_1;
                    staged[512u + to] =
                        right1_0;
                    staged[528u + to] =
                        right1_1;
                    workgroupBarrier();
                    let fours = (min(left - first, 16u) + 3u) / 4u;
                    for (var four = 0u; four < fours; four = four + 1u) {
                        let weights_at = down * 32u + first / 4u + four;
                        let weight0 = staged[weights_at + 0u];
                        let weight1 = staged[weights_at + 16u];
                        let at = four * 128u + across;
                        {
                            let value = staged[256u + at];
                            dv0_0 =
                                dv0_0 + weight0.x * value;
                            dv1_0 =
                                dv1_0 + weight1.x * value;
                        }
                        {
                            let value = staged[272u + at];
                            dv0_1 =
                                dv0_1 + weight0.x * value;
                            dv1_1 =
                                dv1_1 + weight1.x * value;
                        }
                        {
                            let value = staged[288u + at];
                            dv0_0 =
                                dv0_0 + weight0.y * value;
                            dv1_0 =
                                dv1_0 + weight1.y * value;
                        }
                        {
                            let value = staged[304u + at];
                            dv0_1 =
                                dv0_1 + weight0.y * value;
                            dv1_1 =
                                dv1_1 + weight1.y * value;
                        }
                        {
                            let value = staged[320u + at];
                            dv0_0 =
                                dv0_0 + weight0.z * value;
                            dv1_0 =
                                dv1_0 + weight1.z * value;
                        }
                        {
                            let value = staged[336u + at];
                            dv0_1 =
                                dv0_1 + weight0.z * value;
                            dv1_1 =
                                dv1_1 + weight1.z * value;
                        }
                        {
                            let value = staged[352u + at];
                            dv0_0 =
                                dv0_0 + weight0.w * value;
                            dv1_0 =
                                dv1_0 + weight1.w * value;
                        }
                        {
                            let value = staged[368u + at];
                            dv0_1 =
                                dv0_1 + weight0.w * value;
                            dv1_1 =
                                dv1_1 + weight1.w * value;
                        }
                    }
                }
            }
            var d_weight0 = vec4<f32>(0.0);
            var d_weight1 = vec4<f32>(0.0);
            for (var first = 0u; first < 32u; first = first + 8u) {
                let quad = first + staged_quad;
                let left0 = v[own_begin0 + quad];
                let right0 = d_o[other_begin0 + quad];
                let right1 = d_o[other_begin1 + quad];
                let right2 = d_o[other_begin2 + quad];
                let right3 = d_o[other_begin3 + quad];
                workgroupBarrier();
                {
                    let row = staged_row + 0u;
                    let at = row * 8u + (staged_quad ^ (row / 2u % 8u));
                    staged[at] = left0;
                }
                {
                    let row = staged_row + 0u;
                    let at = row * 8u + (staged_quad ^ (row / 4u % 8u));
                    staged[256u + at] = right0;
                }
                {
                    let row = staged_row + 16u;
                    let at = row * 8u + (staged_quad ^ (row / 4u % 8u));
                    staged[256u + at] = right1;
                }
                {
                    let row = staged_row + 32u;
                    let at = row * 8u + (staged_quad ^ (row / 4u % 8u));
                    staged[256u + at] = right2;
                }
                {
                    let row = staged_row + 48u;
                    let at = row * 8u + (staged_quad ^ (row / 4u % 8u));
                    staged[256u + at] = right3;
                }
                workgroupBarrier();
                let staged_quads = min(32u - first, 8u);
                for (var quad = 0u; quad < staged_quads; quad = quad + 1u) {
                    let left_at = down * 16u + (quad ^ down);
                    let right_at = across * 32u + (quad ^ (across % 8u));
                    let other0 = staged[right_at + 256u];
                    let other1 = staged[right_at + 264u];
                    let other2 = staged[right_at + 272u];
                    let other3 = staged[right_at + 280u];
                    {
                        let own = staged[left_at + 0u];
                        d_weight0.x = d_weight0.x + own.x * other0.x + own.y * other0.y + own.z * other0.z + own.w * other0.w;
                        d_weight0.y = d_weight0.y + own.x * other1.x + own.y * other1.y + own.z * other1.z + own.w * other1.w;
                        d_weight0.z = d_weight0.z + own.x * other2.x + own.y * other2.y + own.z * other2.z + own.w * other2.w;
                        d_weight0.w = d_weight0.w + own.x * other3.x + own.y * other3.y + own.z * other3.z + own.w * other3.w;
                    }
                    {
                        let own = staged[left_at + 8u];
                        d_weight1.x = d_weight1.x + own.x * other0.x + own.y * other0.y + own.z * other0.z + own.w * other0.w;
                        d_weight1.y = d_weight1.y + own.x * other1.x + own.y * other1.y + own.z * other1.z + own.w * other1.w;
                        d_weight1.z = d_weight1.z + own.x * other2.x + own.y * other2.y + own.z * other2.z + own.w * other2.w;
                        d_weight1.w = d_weight1.w + own.x * other3.x + own.y * other3.y + own.z * other3.z + own.w * other3.w;
                    }
                }
            }
            workgroupBarrier();
            let delta = vec4<f32>(
                stats[min(query + 4u * across + 0u, p.queries - 1u) * p.heads + head].y,
                stats[min(query + 4u * across + 1u, p.queries - 1u) * p.heads + head].y,
                stats[min(query + 4u * across + 2u, p.queries - 1u) * p.heads + head].y,
                stats[min(query + 4u * across + 3u, p.queries - 1u) * p.heads + head].y,
            );
            weight0 = weight0 * (d_weight0 - delta);
            weight1 = weight1 * (d_weight1 - delta);
            staged[(down * 2u + 0u) * 16u + across] = weight0;
            staged[(down * 2u + 1u) * 16u + across] = weight1;
            {
                let left = min(end - query, 64u);
                for (var first = 0u; first < left; first = first + 16u) {
                    let row0 =
                        min(query + first + down + 0u, p.queries - 1u);
                    let begin0 =
                        (row0 * p.heads + head) * 32u;
                    let right0_0 = q[begin0 + across + 0u];
                    let right0_1 = q[begin0 + across + 16u];
                    let row1 =
                        min(query + first + down + 8u, p.queries - 1u);
                    let begin1 =
                        (row1 * p.heads + head) * 32u;
                    let right1_0 = q[begin1 + across + 0u];
                    let right1_1 = q[begin1 + across + 16u];
                    workgroupBarrier();
                    let to = down * 32u + across;
                    staged[256u + to] =
                        right0_0;
                    staged[272u + to] =
                        right0_1;
                    staged[512u + to] =
                        right1_0;
                    staged[528u + to] =
                        right1_1;
                    workgroupBarrier();
                    let fours = (min(left - first, 16u) + 3u) / 4u;
                    for (var four = 0u; four < fours; four = four + 1u) {
                        let weights_at = down * 32u + first / 4u + four;
                        let weight0 = staged[weights_at + 0u];
                        let weight1 = staged[weights_at + 16u];
                        let at = four * 128u + across;
                        {
                            let value = staged[256u + at];
                            dk0_0 =
                                dk0_0 + weight0.x * value;
                            dk1_0 =
                                dk1_0 + weight1.x * value;
                        }
                        {
                            let value = staged[272u + at];
                            dk0_1 =
                                dk0_1 + weight0.x * value;
                            dk1_1 =
                                dk1_1 + weight1.x * value;
                        }
                        {
                            let value = staged[288u + at];
                            dk0_0 =
                                dk0_0 + weight0.y * value;
                            dk1_0 =
                                dk1_0 + weight1.y * value;
                        }
                        {
                            let value = staged[304u + at];
                            dk0_1 =
                                dk0_1 + weight0.y * value;
                            dk1_1 =
                                dk1_1 + weight1.y * value;
                        }
                        {
                            let value = staged[320u + at];
                            dk0_0 =
                                dk0_0 + weight0.z * value;
                            dk1_0 =
                                dk1_0 + weight1.z * value;
                        }
                        {
                            let value = staged[336u + at];
                            dk0_1 =
                                dk0_1 + weight0.z * value;
                            dk1_1 =
                                dk1_1 + weight1.z * value;
                        }
                        {
                            let value = staged[352u + at];
                            dk0_0 =
                                dk0_0 + weight0.w * value;
                            dk1_0 =
                                dk1_0 + weight1.w * value;
                        }
                        {
                            let value = staged[368u + at];
                            dk0_1 =
                                dk0_1 + weight0.w * value;
                            dk1_1 =
                                dk1_1 + weight1.w * value;
                        }
                    }
                }
            }
        }
    }

    let scale0 = p.scale;
    let one0 = 1.0;
    let scale1 = p.scale;
    let one1 = 1.0;
    {
        let row = base + down * 2u + 0u;
        if (row < p.keys) {
            let begin = (row * p.kv_heads + kv_head) * 32u + across;
            dk[begin + 0u] = dk0_0 * scale0;
            dk[begin + 16u] = dk0_1 * scale0;
        }
    }
    {
        let row = base + down * 2u + 1u;
        if (row < p.keys) {
            let begin = (row * p.kv_heads + kv_head) * 32u + across;
            dk[begin + 0u] = dk1_0 * scale1;
            dk[begin + 16u] = dk1_1 * scale1;
        }
    }
    {
        let row = base + down * 2u + 0u;
        if (row < p.keys) {
            let begin = (row * p.kv_heads + kv_head) * 32u + across;
            dv[begin + 0u] = dv0_0 * one0;
            dv[begin + 16u] = dv0_1 * one0;
        }
    }
    {
        let row = base + down * 2u + 1u;
        if (row < p.keys) {
            let begin = (row * p.kv_heads + kv_head) * 32u + across;
            dv[begin + 0u] = dv1_0 * one1;
            dv[begin + 16u] = dv1_1 * one1;
        }
    }
}
