// attention: rows=16 parts=4 quads=16 tile=4

// O = softmax(scale * Q * K^T) * V for the keys that each query sees, and the log-sum-exp of its
// scores: Q and O [M, H * D], K and V [keys, Hkv * D], lse [M, H]. Online softmax goes key after
// key, so a query's result does not depend on where its keys lie among other keys. For software
// drivers. See attention/tile.wgsl for the floor.

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
// For each query: the first row of the other side that it sees, and the end.
@group(0) @binding(3) var<storage, read> key_ranges: array<vec2<u32>>;
@group(0) @binding(4) var<storage, read_write> o: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> lse: array<f32>;

// Below every score. Finite, because WGSL guarantees nothing about infinities.
const LOWEST = -3.0e38;

// 16 rows per workgroup, 4 threads per row, 64 values per thread.
var<workgroup> of_part: array<vec4<f32>, 64>;

// Sums `value` over the threads that share this thread's row. All threads of the workgroup must
// call it together.
fn over_parts(value: vec4<f32>, thread: u32) -> vec4<f32> {
    workgroupBarrier();
    of_part[thread] = value;
    workgroupBarrier();
    let row = thread % 16u;
    return of_part[row] + of_part[row + 16u] + of_part[row + 32u] + of_part[row + 48u];
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let group = p.first_group + workgroup.y * count.x + workgroup.x;
    if (group >= p.groups) {
        return;
    }
    let block = group / p.heads;
    let head = group - block * p.heads;
    let kv_head = head / (p.heads / p.kv_heads);
    let part = thread / 16u;
    let row = block * 16u + thread % 16u;
    let query = min(row, p.queries - 1u);
    let seen = key_ranges[query];
    let start = key_ranges[block * 16u].x;
    let last = min(block * 16u + 15u, p.queries - 1u);
    let end = key_ranges[last].y;
    let own_row = query * p.heads + head;
    let own = own_row * 64u + part * 16u;
    let q0 = q[own + 0u] * p.scale;
    var o0 = vec4<f32>(0.0);
    let q1 = q[own + 1u] * p.scale;
    var o1 = vec4<f32>(0.0);
    let q2 = q[own + 2u] * p.scale;
    var o2 = vec4<f32>(0.0);
    let q3 = q[own + 3u] * p.scale;
    var o3 = vec4<f32>(0.0);
    let q4 = q[own + 4u] * p.scale;
    var o4 = vec4<f32>(0.0);
    let q5 = q[own + 5u] * p.scale;
    var o5 = vec4<f32>(0.0);
    let q6 = q[own + 6u] * p.scale;
    var o6 = vec4<f32>(0.0);
    let q7 = q[own + 7u] * p.scale;
    var o7 = vec4<f32>(0.0);
    let q8 = q[own + 8u] * p.scale;
    var o8 = vec4<f32>(0.0);
    let q9 = q[own + 9u] * p.scale;
    var o9 = vec4<f32>(0.0);
    let q10 = q[own + 10u] * p.scale;
    var o10 = vec4<f32>(0.0);
    let q11 = q[own + 11u] * p.scale;
    var o11 = vec4<f32>(0.0);
    let q12 = q[own + 12u] * p.scale;
    var o12 = vec4<f32>(0.0);
    let q13 = q[own + 13u] * p.scale;
    var o13 = vec4<f32>(0.0);
    let q14 = q[own + 14u] * p.scale;
    var o14 = vec4<f32>(0.0);
    let q15 = q[own + 15u] * p.scale;
    var o15 = vec4<f32>(0.0);
    var most = LOWEST;
    var sum = 0.0;
    for (var key = start; key < end; key = key + 4u) {
        var scores = vec4<f32>(0.0);
        let key0 = min(key + 0u, p.keys - 1u);
        let other_row0 = key0 * p.kv_heads + kv_head;
        let at0 = other_row0 * 64u + part * 16u;
        {
            var even = q0 * k[at0];
            var odd = q1 * k[at0 + 1u];
            even = even + q2 * k[at0 + 2u];
            odd = odd + q3 * k[at0 + 3u];
            even = even + q4 * k[at0 + 4u];
            odd = odd + q5 * k[at0 + 5u];
            even = even + q6 * k[at0 + 6u];
            odd = odd + q7 * k[at0 + 7u];
            even = even + q8 * k[at0 + 8u];
            odd = odd + q9 * k[at0 + 9u];
            even = even + q10 * k[at0 + 10u];
            odd = odd + q11 * k[at0 + 11u];
            even = even + q12 * k[at0 + 12u];
            odd = odd + q13 * k[at0 + 13u];
            even = even + q14 * k[at0 + 14u];
            odd = odd + q15 * k[at0 + 15u];
            scores.x = dot(even + odd, vec4<f32>(1.0));
        }
        let key1 = min(key + 1u, p.keys - 1u);
        let other_row1 = key1 * p.kv_heads + kv_head;
        let at1 = other_row1 * 64u + part * 16u;
        {
            var even = q0 * k[at1];
            var odd = q1 * k[at1 + 1u];
            even = even + q2 * k[at1 + 2u];
            odd = odd + q3 * k[at1 + 3u];
            even = even + q4 * k[at1 + 4u];
            odd = odd + q5 * k[at1 + 5u];
            even = even + q6 * k[at1 + 6u];
            odd = odd + q7 * k[at1 + 7u];
            even = even + q8 * k[at1 + 8u];
            odd = odd + q9 * k[at1 + 9u];
            even = even + q10 * k[at1 + 10u];
            odd = odd + q11 * k[at1 + 11u];
            even = even + q12 * k[at1 + 12u];
            odd = odd + q13 * k[at1 + 13u];
            even = even + q14 * k[at1 + 14u];
            odd = odd + q15 * k[at1 + 15u];
            scores.y = dot(even + odd, vec4<f32>(1.0));
        }
        let key2 = min(key + 2u, p.keys - 1u);
        let other_row2 = key2 * p.kv_heads + kv_head;
        let at2 = other_row2 * 64u + part * 16u;
        {
            var even = q0 * k[at2];
            var odd = q1 * k[at2 + 1u];
            even = even + q2 * k[at2 + 2u];
            odd = odd + q3 * k[at2 + 3u];
            even = even + q4 * k[at2 + 4u];
            odd = odd + q5 * k[at2 + 5u];
            even = even + q6 * k[at2 + 6u];
            odd = odd + q7 * k[at2 + 7u];
            even = even + q8 * k[at2 + 8u];
            odd = odd + q9 * k[at2 + 9u];
            even = even + q10 * k[at2 + 10u];
            odd = odd + q11 * k[at2 + 11u];
            even = even + q12 * k[at2 + 12u];
            odd = odd + q13 * k[at2 + 13u];
            even = even + q14 * k[at2 + 14u];
            odd = odd + q15 * k[at2 + 15u];
            scores.z = dot(even + odd, vec4<f32>(1.0));
        }
        let key3 = min(key + 3u, p.keys - 1u);
        let other_row3 = key3 * p.kv_heads + kv_head;
        let at3 = other_row3 * 64u + part * 16u;
        {
            var even = q0 * k[at3];
            var odd = q1 * k[at3 + 1u];
            even = even + q2 * k[at3 + 2u];
            odd = odd + q3 * k[at3 + 3u];
            even = even + q4 * k[at3 + 4u];
            odd = odd + q5 * k[at3 + 5u];
            even = even + q6 * k[at3 + 6u];
            odd = odd + q7 * k[at3 + 7u];
            even = even + q8 * k[at3 + 8u];
            odd = odd + q9 * k[at3 + 9u];
            even = even + q10 * k[at3 + 10u];
            odd = odd + q11 * k[at3 + 11u];
            even = even + q12 * k[at3 + 12u];
            odd = odd + q13 * k[at3 + 13u];
            even = even + q14 * k[at3 + 14u];
            odd = odd + q15 * k[at3 + 15u];
            scores.w = dot(even + odd, vec4<f32>(1.0));
        }
        scores = over_parts(scores, thread);
        {
            let other = key + 0u;
            let visible = other >= seen.x && other < seen.y;
            let score = select(LOWEST, scores.x, visible);
            if (score > most) {
                let shrink = exp(most - score);
                most = score;
                sum = sum * shrink;
                o0 = o0 * shrink;
                o1 = o1 * shrink;
                o2 = o2 * shrink;
                o3 = o3 * shrink;
                o4 = o4 * shrink;
                o5 = o5 * shrink;
                o6 = o6 * shrink;
                o7 = o7 * shrink;
                o8 = o8 * shrink;
                o9 = o9 * shrink;
                o10 = o10 * shrink;
                o11 = o11 * shrink;
                o12 = o12 * shrink;
                o13 = o13 * shrink;
                o14 = o14 * shrink;
                o15 = o15 * shrink;
            }
            let weight = select(0.0, exp(score - most), visible);
            sum = sum + weight;
            o0 = o0 + weight * v[at0 + 0u];
            o1 = o1 + weight * v[at0 + 1u];
            o2 = o2 + weight * v[at0 + 2u];
            o3 = o3 + weight * v[at0 + 3u];
            o4 = o4 + weight * v[at0 + 4u];
            o5 = o5 + weight * v[at0 + 5u];
            o6 = o6 + weight * v[at0 + 6u];
            o7 = o7 + weight * v[at0 + 7u];
            o8 = o8 + weight * v[at0 + 8u];
            o9 = o9 + weight * v[at0 + 9u];
            o10 = o10 + weight * v[at0 + 10u];
            o11 = o11 + weight * v[at0 + 11u];
            o12 = o12 + weight * v[at0 + 12u];
            o13 = o13 + weight * v[at0 + 13u];
            o14 = o14 + weight * v[at0 + 14u];
            o15 = o15 + weight * v[at0 + 15u];
        }
        {
            let other = key + 1u;
            let visible = other >= seen.x && other < seen.y;
            let score = select(LOWEST, scores.y, visible);
            if (score > most) {
                let shrink = exp(most - score);
                most = score;
                sum = sum * shrink;
                o0 = o0 * shrink;
                o1 = o1 * shrink;
                o2 = o2 * shrink;
                o3 = o3 * shrink;
                o4 = o4 * shrink;
                o5 = o5 * shrink;
                o6 = o6 * shrink;
                o7 = o7 * shrink;
                o8 = o8 * shrink;
                o9 = o9 * shrink;
                o10 = o10 * shrink;
                o11 = o11 * shrink;
                o12 = o12 * shrink;
                o13 = o13 * shrink;
                o14 = o14 * shrink;
                o15 = o15 * shrink;
            }
            let weight = select(0.0, exp(score - most), visible);
            sum = sum + weight;
            o0 = o0 + weight * v[at1 + 0u];
            o1 = o1 + weight * v[at1 + 1u];
            o2 = o2 + weight * v[at1 + 2u];
            o3 = o3 + weight * v[at1 + 3u];
            o4 = o4 + weight * v[at1 + 4u];
            o5 = o5 + weight * v[at1 + 5u];
            o6 = o6 + weight * v[at1 + 6u];
            o7 = o7 + weight * v[at1 + 7u];
            o8 = o8 + weight * v[at1 + 8u];
            o9 = o9 + weight * v[at1 + 9u];
            o10 = o10 + weight * v[at1 + 10u];
            o11 = o11 + weight * v[at1 + 11u];
            o12 = o12 + weight * v[at1 + 12u];
            o13 = o13 + weight * v[at1 + 13u];
            o14 = o14 + weight * v[at1 + 14u];
            o15 = o15 + weight * v[at1 + 15u];
        }
        {
            let other = key + 2u;
            let visible = other >= seen.x && other < seen.y;
            let score = select(LOWEST, scores.z, visible);
            if (score > most) {
                let shrink = exp(most - score);
                most = score;
                sum = sum * shrink;
                o0 = o0 * shrink;
                o1 = o1 * shrink;
                o2 = o2 * shrink;
                o3 = o3 * shrink;
                o4 = o4 * shrink;
                o5 = o5 * shrink;
                o6 = o6 * shrink;
                o7 = o7 * shrink;
                o8 = o8 * shrink;
                o9 = o9 * shrink;
                o10 = o10 * shrink;
                o11 = o11 * shrink;
                o12 = o12 * shrink;
                o13 = o13 * shrink;
                o14 = o14 * shrink;
                o15 = o15 * shrink;
            }
            let weight = select(0.0, exp(score - most), visible);
            sum = sum + weight;
            o0 = o0 + weight * v[at2 + 0u];
            o1 = o1 + weight * v[at2 + 1u];
            o2 = o2 + weight * v[at2 + 2u];
            o3 = o3 + weight * v[at2 + 3u];
            o4 = o4 + weight * v[at2 + 4u];
            o5 = o5 + weight * v[at2 + 5u];
            o6 = o6 + weight * v[at2 + 6u];
            o7 = o7 + weight * v[at2 + 7u];
            o8 = o8 + weight * v[at2 + 8u];
            o9 = o9 + weight * v[at2 + 9u];
            o10 = o10 + weight * v[at2 + 10u];
            o11 = o11 + weight * v[at2 + 11u];
            o12 = o12 + weight * v[at2 + 12u];
            o13 = o13 + weight * v[at2 + 13u];
            o14 = o14 + weight * v[at2 + 14u];
            o15 = o15 + weight * v[at2 + 15u];
        }
        {
            let other = key + 3u;
            let visible = other >= seen.x && other < seen.y;
            let score = select(LOWEST, scores.w, visible);
            if (score > most) {
                let shrink = exp(most - score);
                most = score;
                sum = sum * shrink;
                o0 = o0 * shrink;
                o1 = o1 * shrink;
                o2 = o2 * shrink;
                o3 = o3 * shrink;
                o4 = o4 * shrink;
                o5 = o5 * shrink;
                o6 = o6 * shrink;
                o7 = o7 * shrink;
                o8 = o8 * shrink;
                o9 = o9 * shrink;
                o10 = o10 * shrink;
                o11 = o11 * shrink;
                o12 = o12 * shrink;
                o13 = o13 * shrink;
                o14 = o14 * shrink;
                o15 = o15 * shrink;
            }
            let weight = select(0.0, exp(score - most), visible);
            sum = sum + weight;
            o0 = o0 + weight * v[at3 + 0u];
            o1 = o1 + weight * v[at3 + 1u];
            o2 = o2 + weight * v[at3 + 2u];
            o3 = o3 + weight * v[at3 + 3u];
            o4 = o4 + weight * v[at3 + 4u];
            o5 = o5 + weight * v[at3 + 5u];
            o6 = o6 + weight * v[at3 + 6u];
            o7 = o7 + weight * v[at3 + 7u];
            o8 = o8 + weight * v[at3 + 8u];
            o9 = o9 + weight * v[at3 + 9u];
            o10 = o10 + weight * v[at3 + 10u];
            o11 = o11 + weight * v[at3 + 11u];
            o12 = o12 + weight * v[at3 + 12u];
            o13 = o13 + weight * v[at3 + 13u];
            o14 = o14 + weight * v[at3 + 14u];
            o15 = o15 + weight * v[at3 + 15u];
        }
    }

    if (row < p.queries) {
        let none = sum == 0.0;
        let inverse = select(1.0 / sum, 0.0, none);
        o[own + 0u] = o0 * inverse;
        o[own + 1u] = o1 * inverse;
        o[own + 2u] = o2 * inverse;
        o[own + 3u] = o3 * inverse;
        o[own + 4u] = o4 * inverse;
        o[own + 5u] = o5 * inverse;
        o[own + 6u] = o6 * inverse;
        o[own + 7u] = o7 * inverse;
        o[own + 8u] = o8 * inverse;
        o[own + 9u] = o9 * inverse;
        o[own + 10u] = o10 * inverse;
        o[own + 11u] = o11 * inverse;
        o[own + 12u] = o12 * inverse;
        o[own + 13u] = o13 * inverse;
        o[own + 14u] = o14 * inverse;
        o[own + 15u] = o15 * inverse;
        if (part == 0u) {
            lse[own_row] = select(most + log(sum), p.no_key, none);
        }
    }
}
