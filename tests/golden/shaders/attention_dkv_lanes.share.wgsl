// attention_dkv_lanes: rows=4 head_dim=8 share

// dK and dV of attention, [keys, Hkv * D], for software drivers. Keys go over the queries that see
// them, in all heads that share the keys.
//
// P = exp(scale * Q * K^T - lse), dS = P * (dO * V^T - delta),
// dV = P^T * dO, dK = scale * dS^T * Q.

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
@group(0) @binding(0) var<storage, read> q: array<f32>;
@group(0) @binding(1) var<storage, read> k: array<f32>;
@group(0) @binding(2) var<storage, read> v: array<f32>;
@group(0) @binding(3) var<storage, read> d_o: array<f32>;
// For each query and head: lse, delta.
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>;
// For each key: the first row of the other side that it sees, and the end.
@group(0) @binding(5) var<storage, read> query_ranges: array<vec2<u32>>;
@group(0) @binding(6) var<storage, read_write> dk: array<f32>;
@group(0) @binding(7) var<storage, read_write> dv: array<f32>;

@compute @workgroup_size(8)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let group = p.first_group + workgroup.y * count.x + workgroup.x;
    if (group >= p.groups) {
        return;
    }
    let block = group / p.kv_heads;
    let kv_head = group - block * p.kv_heads;
    let heads = p.heads / p.kv_heads;
    let key0 = min(block * 4u + 0u, p.keys - 1u);
    let seen0 = query_ranges[key0];
    let row0 = (key0 * p.kv_heads + kv_head) * 8u;
    let key1 = min(block * 4u + 1u, p.keys - 1u);
    let seen1 = query_ranges[key1];
    let row1 = (key1 * p.kv_heads + kv_head) * 8u;
    let key2 = min(block * 4u + 2u, p.keys - 1u);
    let seen2 = query_ranges[key2];
    let row2 = (key2 * p.kv_heads + kv_head) * 8u;
    let key3 = min(block * 4u + 3u, p.keys - 1u);
    let seen3 = query_ranges[key3];
    let row3 = (key3 * p.kv_heads + kv_head) * 8u;
    let end = seen3.y;
    var dk0_0 = 0.0;
    var dk1_0 = 0.0;
    var dk2_0 = 0.0;
    var dk3_0 = 0.0;
    var dv0_0 = 0.0;
    var dv1_0 = 0.0;
    var dv2_0 = 0.0;
    var dv3_0 = 0.0;
    for (var head = kv_head * heads; head < (kv_head + 1u) * heads; head = head + 1u) {
        for (var first = seen0.x; first < end; first = first + 8u) {
            let query = first + lane;
            let at = min(query, p.queries - 1u) * p.heads + head;
            let stat = stats[at];
            let own = at * 8u;
            var score0 = 0.0;
            var score1 = 0.0;
            var score2 = 0.0;
            var score3 = 0.0;
            for (var d = 0u; d < 8u; d = d + 8u) {
                let at = own + d;
                let lo = vec4<f32>(
                    q[at + 0u],
                    q[at + 1u],
                    q[at + 2u],
                    q[at + 3u],
                );
                let hi = vec4<f32>(
                    q[at + 4u],
                    q[at + 5u],
                    q[at + 6u],
                    q[at + 7u],
                );
                {
                    let mine = k[row0 + d + lane];
                    let lo_row = vec4<f32>(
                        subgroupBroadcast(mine, 0u),
                        subgroupBroadcast(mine, 1u),
                        subgroupBroadcast(mine, 2u),
                        subgroupBroadcast(mine, 3u),
                    );
                    let hi_row = vec4<f32>(
                        subgroupBroadcast(mine, 4u),
                        subgroupBroadcast(mine, 5u),
                        subgroupBroadcast(mine, 6u),
                        subgroupBroadcast(mine, 7u),
                    );
                    score0 = score0 + (dot(lo_row, lo) + dot(hi_row, hi));
                }
                {
                    let mine = k[row1 + d + lane];
                    let lo_row = vec4<f32>(
                        subgroupBroadcast(mine, 0u),
                        subgroupBroadcast(mine, 1u),
                        subgroupBroadcast(mine, 2u),
                        subgroupBroadcast(mine, 3u),
                    );
                    let hi_row = vec4<f32>(
                        subgroupBroadcast(mine, 4u),
                        subgroupBroadcast(mine, 5u),
                        subgroupBroadcast(mine, 6u),
                        subgroupBroadcast(mine, 7u),
                    );
                    score1 = score1 + (dot(lo_row, lo) + dot(hi_row, hi));
                }
                {
                    let mine = k[row2 + d + lane];
                    let lo_row = vec4<f32>(
                        subgroupBroadcast(mine, 0u),
                        subgroupBroadcast(mine, 1u),
                        subgroupBroadcast(mine, 2u),
                        subgroupBroadcast(mine, 3u),
                    );
                    let hi_row = vec4<f32>(
                        subgroupBroadcast(mine, 4u),
                        subgroupBroadcast(mine, 5u),
                        subgroupBroadcast(mine, 6u),
                        subgroupBroadcast(mine, 7u),
                    );
                    score2 = score2 + (dot(lo_row, lo) + dot(hi_row, hi));
                }
                {
                    let mine = k[row3 + d + lane];
                    let lo_row = vec4<f32>(
                        subgroupBroadcast(mine, 0u),
                        subgroupBroadcast(mine, 1u),
                        subgroupBroadcast(mine, 2u),
                        subgroupBroadcast(mine, 3u),
                    );
                    let hi_row = vec4<f32>(
                        subgroupBroadcast(mine, 4u),
                        subgroupBroadcast(mine, 5u),
                        subgroupBroadcast(mine, 6u),
                        subgroupBroadcast(mine, 7u),
                    );
                    score3 = score3 + (dot(lo_row, lo) + dot(hi_row, hi));
                }
            }
            var d_weight0 = 0.0;
            var d_weight1 = 0.0;
            var d_weight2 = 0.0;
            var d_weight3 = 0.0;
            for (var d = 0u; d < 8u; d = d + 8u) {
                let at = own + d;
                let lo = vec4<f32>(
                    d_o[at + 0u],
                    d_o[at + 1u],
                    d_o[at + 2u],
                    d_o[at + 3u],
                );
                let hi = vec4<f32>(
                    d_o[at + 4u],
                    d_o[at + 5u],
                    d_o[at + 6u],
                    d_o[at + 7u],
                );
                {
                    let mine = v[row0 + d + lane];
                    let lo_row = vec4<f32>(
                        subgroupBroadcast(mine, 0u),
                        subgroupBroadcast(mine, 1u),
                        subgroupBroadcast(mine, 2u),
                        subgroupBroadcast(mine, 3u),
                    );
                    let hi_row = vec4<f32>(
                        subgroupBroadcast(mine, 4u),
                        subgroupBroadcast(mine, 5u),
                        subgroupBroadcast(mine, 6u),
                        subgroupBroadcast(mine, 7u),
                    );
                    d_weight0 = d_weight0 + (dot(lo_row, lo) + dot(hi_row, hi));
                }
                {
                    let mine = v[row1 + d + lane];
                    let lo_row = vec4<f32>(
                        subgroupBroadcast(mine, 0u),
                        subgroupBroadcast(mine, 1u),
                        subgroupBroadcast(mine, 2u),
                        subgroupBroadcast(mine, 3u),
                    );
                    let hi_row = vec4<f32>(
                        subgroupBroadcast(mine, 4u),
                        subgroupBroadcast(mine, 5u),
                        subgroupBroadcast(mine, 6u),
                        subgroupBroadcast(mine, 7u),
                    );
                    d_weight1 = d_weight1 + (dot(lo_row, lo) + dot(hi_row, hi));
                }
                {
                    let mine = v[row2 + d + lane];
                    let lo_row = vec4<f32>(
                        subgroupBroadcast(mine, 0u),
                        subgroupBroadcast(mine, 1u),
                        subgroupBroadcast(mine, 2u),
                        subgroupBroadcast(mine, 3u),
                    );
                    let hi_row = vec4<f32>(
                        subgroupBroadcast(mine, 4u),
                        subgroupBroadcast(mine, 5u),
                        subgroupBroadcast(mine, 6u),
                        subgroupBroadcast(mine, 7u),
                    );
                    d_weight2 = d_weight2 + (dot(lo_row, lo) + dot(hi_row, hi));
                }
                {
                    let mine = v[row3 + d + lane];
                    let lo_row = vec4<f32>(
                        subgroupBroadcast(mine, 0u),
                        subgroupBroadcast(mine, 1u),
                        subgroupBroadcast(mine, 2u),
                        subgroupBroadcast(mine, 3u),
                    );
                    let hi_row = vec4<f32>(
                        subgroupBroadcast(mine, 4u),
                        subgroupBroadcast(mine, 5u),
                        subgroupBroadcast(mine, 6u),
                        subgroupBroadcast(mine, 7u),
                    );
                    d_weight3 = d_weight3 + (dot(lo_row, lo) + dot(hi_row, hi));
                }
            }
            let visible0 = query >= seen0.x && query < seen0.y;
            let visible1 = query >= seen1.x && query < seen1.y;
            let visible2 = query >= seen2.x && query < seen2.y;
            let visible3 = query >= seen3.x && query < seen3.y;
            let weight0 = select(0.0, exp(score0 * p.scale - stat.x), visible0);
            let d_score0 = weight0 * (d_weight0 - stat.y);
            let weight1 = select(0.0, exp(score1 * p.scale - stat.x), visible1);
            let d_score1 = weight1 * (d_weight1 - stat.y);
            let weight2 = select(0.0, exp(score2 * p.scale - stat.x), visible2);
            let d_score2 = weight2 * (d_weight2 - stat.y);
            let weight3 = select(0.0, exp(score3 * p.scale - stat.x), visible3);
            let d_score3 = weight3 * (d_weight3 - stat.y);
            let other0 = min(first + 0u, p.queries - 1u);
            let at0 = (other0 * p.heads + head) * 8u;
            let other1 = min(first + 1u, p.queries - 1u);
            let at1 = (other1 * p.heads + head) * 8u;
            let other2 = min(first + 2u, p.queries - 1u);
            let at2 = (other2 * p.heads + head) * 8u;
            let other3 = min(first + 3u, p.queries - 1u);
            let at3 = (other3 * p.heads + head) * 8u;
            let other4 = min(first + 4u, p.queries - 1u);
            let at4 = (other4 * p.heads + head) * 8u;
            let other5 = min(first + 5u, p.queries - 1u);
            let at5 = (other5 * p.heads + head) * 8u;
            let other6 = min(first + 6u, p.queries - 1u);
            let at6 = (other6 * p.heads + head) * 8u;
            let other7 = min(first + 7u, p.queries - 1u);
            let at7 = (other7 * p.heads + head) * 8u;
            {
                let value0 = d_o[at0 + 0u + lane];
                let value1 = d_o[at1 + 0u + lane];
                let value2 = d_o[at2 + 0u + lane];
                let value3 = d_o[at3 + 0u + lane];
                let value4 = d_o[at4 + 0u + lane];
                let value5 = d_o[at5 + 0u + lane];
                let value6 = d_o[at6 + 0u + lane];
                let value7 = d_o[at7 + 0u + lane];
                var sum0 = dv0_0;
                sum0 =
                    sum0 + subgroupBroadcast(weight0, 0u) * value0;
                sum0 =
                    sum0 + subgroupBroadcast(weight0, 1u) * value1;
                sum0 =
                    sum0 + subgroupBroadcast(weight0, 2u) * value2;
                sum0 =
                    sum0 + subgroupBroadcast(weight0, 3u) * value3;
                sum0 =
                    sum0 + subgroupBroadcast(weight0, 4u) * value4;
                sum0 =
                    sum0 + subgroupBroadcast(weight0, 5u) * value5;
                sum0 =
                    sum0 + subgroupBroadcast(weight0, 6u) * value6;
                sum0 =
                    sum0 + subgroupBroadcast(weight0, 7u) * value7;
                dv0_0 = sum0;
                var sum1 = dv1_0;
                sum1 =
                    sum1 + subgroupBroadcast(weight1, 0u) * value0;
                sum1 =
                    sum1 + subgroupBroadcast(weight1, 1u) * value1;
                sum1 =
                    sum1 + subgroupBroadcast(weight1, 2u) * value2;
                sum1 =
                    sum1 + subgroupBroadcast(weight1, 3u) * value3;
                sum1 =
                    sum1 + subgroupBroadcast(weight1, 4u) * value4;
                sum1 =
                    sum1 + subgroupBroadcast(weight1, 5u) * value5;
                sum1 =
                    sum1 + subgroupBroadcast(weight1, 6u) * value6;
                sum1 =
                    sum1 + subgroupBroadcast(weight1, 7u) * value7;
                dv1_0 = sum1;
                var sum2 = dv2_0;
                sum2 =
                    sum2 + subgroupBroadcast(weight2, 0u) * value0;
                sum2 =
                    sum2 + subgroupBroadcast(weight2, 1u) * value1;
                sum2 =
                    sum2 + subgroupBroadcast(weight2, 2u) * value2;
                sum2 =
                    sum2 + subgroupBroadcast(weight2, 3u) * value3;
                sum2 =
                    sum2 + subgroupBroadcast(weight2, 4u) * value4;
                sum2 =
                    sum2 + subgroupBroadcast(weight2, 5u) * value5;
                sum2 =
                    sum2 + subgroupBroadcast(weight2, 6u) * value6;
                sum2 =
                    sum2 + subgroupBroadcast(weight2, 7u) * value7;
                dv2_0 = sum2;
                var sum3 = dv3_0;
                sum3 =
                    sum3 + subgroupBroadcast(weight3, 0u) * value0;
                sum3 =
                    sum3 + subgroupBroadcast(weight3, 1u) * value1;
                sum3 =
                    sum3 + subgroupBroadcast(weight3, 2u) * value2;
                sum3 =
                    sum3 + subgroupBroadcast(weight3, 3u) * value3;
                sum3 =
                    sum3 + subgroupBroadcast(weight3, 4u) * value4;
                sum3 =
                    sum3 + subgroupBroadcast(weight3, 5u) * value5;
                sum3 =
                    sum3 + subgroupBroadcast(weight3, 6u) * value6;
                sum3 =
                    sum3 + subgroupBroadcast(weight3, 7u) * value7;
                dv3_0 = sum3;
            }
            {
                let value0 = q[at0 + 0u + lane];
                let value1 = q[at1 + 0u + lane];
                let value2 = q[at2 + 0u + lane];
                let value3 = q[at3 + 0u + lane];
                let value4 = q[at4 + 0u + lane];
                let value5 = q[at5 + 0u + lane];
                let value6 = q[at6 + 0u + lane];
                let value7 = q[at7 + 0u + lane];
                var sum0 = dk0_0;
                sum0 =
                    sum0 + subgroupBroadcast(d_score0, 0u) * value0;
                sum0 =
                    sum0 + subgroupBroadcast(d_score0, 1u) * value1;
                sum0 =
                    sum0 + subgroupBroadcast(d_score0, 2u) * value2;
                sum0 =
                    sum0 + subgroupBroadcast(d_score0, 3u) * value3;
                sum0 =
                    sum0 + subgroupBroadcast(d_score0, 4u) * value4;
                sum0 =
                    sum0 + subgroupBroadcast(d_score0, 5u) * value5;
                sum0 =
                    sum0 + subgroupBroadcast(d_score0, 6u) * value6;
                sum0 =
                    sum0 + subgroupBroadcast(d_score0, 7u) * value7;
                dk0_0 = sum0;
                var sum1 = dk1_0;
                sum1 =
                    sum1 + subgroupBroadcast(d_score1, 0u) * value0;
                sum1 =
                    sum1 + subgroupBroadcast(d_score1, 1u) * value1;
                sum1 =
                    sum1 + subgroupBroadcast(d_score1, 2u) * value2;
                sum1 =
                    sum1 + subgroupBroadcast(d_score1, 3u) * value3;
                sum1 =
                    sum1 + subgroupBroadcast(d_score1, 4u) * value4;
                sum1 =
                    sum1 + subgroupBroadcast(d_score1, 5u) * value5;
                sum1 =
                    sum1 + subgroupBroadcast(d_score1, 6u) * value6;
                sum1 =
                    sum1 + subgroupBroadcast(d_score1, 7u) * value7;
                dk1_0 = sum1;
                var sum2 = dk2_0;
                sum2 =
                    sum2 + subgroupBroadcast(d_score2, 0u) * value0;
                sum2 =
                    sum2 + subgroupBroadcast(d_score2, 1u) * value1;
                sum2 =
                    sum2 + subgroupBroadcast(d_score2, 2u) * value2;
                sum2 =
                    sum2 + subgroupBroadcast(d_score2, 3u) * value3;
                sum2 =
                    sum2 + subgroupBroadcast(d_score2, 4u) * value4;
                sum2 =
                    sum2 + subgroupBroadcast(d_score2, 5u) * value5;
                sum2 =
                    sum2 + subgroupBroadcast(d_score2, 6u) * value6;
                sum2 =
                    sum2 + subgroupBroadcast(d_score2, 7u) * value7;
                dk2_0 = sum2;
                var sum3 = dk3_0;
                sum3 =
                    sum3 + subgroupBroadcast(d_score3, 0u) * value0;
                sum3 =
                    sum3 + subgroupBroadcast(d_score3, 1u) * value1;
                sum3 =
                    sum3 + subgroupBroadcast(d_score3, 2u) * value2;
                sum3 =
                    sum3 + subgroupBroadcast(d_score3, 3u) * value3;
                sum3 =
                    sum3 + subgroupBroadcast(d_score3, 4u) * value4;
                sum3 =
                    sum3 + subgroupBroadcast(d_score3, 5u) * value5;
                sum3 =
                    sum3 + subgroupBroadcast(d_score3, 6u) * value6;
                sum3 =
                    sum3 + subgroupBroadcast(d_score3, 7u) * value7;
                dk3_0 = sum3;
            }
        }
    }

    if (block * 4u + 0u < p.keys) {
        dk[row0 + 0u + lane] = dk0_0 * p.scale;
        dv[row0 + 0u + lane] = dv0_0;
    }
    if (block * 4u + 1u < p.keys) {
        dk[row1 + 0u + lane] = dk1_0 * p.scale;
        dv[row1 + 0u + lane] = dv1_0;
    }
    if (block * 4u + 2u < p.keys) {
        dk[row2 + 0u + lane] = dk2_0 * p.scale;
        dv[row2 + 0u + lane] = dv2_0;
    }
    if (block * 4u + 3u < p.keys) {
        dk[row3 + 0u + lane] = dk3_0 * p.scale;
        dv[row3 + 0u + lane] = dv3_0;
    }
}
