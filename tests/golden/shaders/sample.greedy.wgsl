// sample: threads=256 greedy

// ids[0] = a token chosen by its logit:
// the likeliest one. 0xffffffff if
// a logit is NaN.
// A single workgroup does everything.

struct Params {
    first_group: u32,
    groups: u32,
    len: u32,      // logits
    top_k: u32,    // number of tokens to keep; 0: all
    cut_p: u32,    // 1: keep only the likeliest tokens whose weights reach top_p
    top_p: u32,    // as a share of all weights, in units of 2^-32
    random: u32,   // random number in units of 2^-32
    steps: f32,    // steps per logit difference of 1
    farthest: f32, // difference from the largest logit at which weights become 0
}

var<immediate> p: Params;
@group(0) @binding(0) var<storage, read> logits: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> ids: array<u32>;

const NONE = 0xffffffffu;

// The largest key of some threads, and the first token with that key.
var<workgroup> best: array<vec2<u32>, 256>;

// Keys have the order of the logits; both zeros are equal. NaN has the largest key. Past the last
// logit the key is 0, the smallest.
fn keys4(quad: u32) -> vec4<u32> {
    let bits = logits[quad];
    let keys = select(bits | vec4<u32>(0x80000000u), ~bits, bits > vec4<u32>(0x80000000u));
    let is_nan = (bits & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
    let exists = vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(p.len);
    return select(vec4<u32>(0u), select(keys, vec4<u32>(NONE), is_nan), exists);
}

// Puts the largest key, and the first token with that key, in best[0].
fn likeliest(thread: u32, quads: u32) {
    var keys = vec4<u32>(0u);
    var at = vec4<u32>(0u);
    for (var quad = thread; quad < quads; quad = quad + 256u) {
        let next = keys4(quad);
        at = select(at, vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u), next > keys);
        keys = max(keys, next);
    }
    let key = max(max(keys.x, keys.y), max(keys.z, keys.w));
    let first = select(vec4<u32>(NONE), at, keys == vec4<u32>(key));
    best[thread] = vec2<u32>(key, min(min(first.x, first.y), min(first.z, first.w)));
    for (var half = 128u; half > 0u; half = half >> 1u) {
        workgroupBarrier();
        if (thread < half) {
            let other = best[thread + half];
            let ties = other.x == best[thread].x && other.y < best[thread].y;
            if (other.x > best[thread].x || ties) {
                best[thread] = other;
            }
        }
    }
    workgroupBarrier();
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let group = p.first_group + workgroup.y * count.x + workgroup.x;
    if (group >= p.groups) {
        return;
    }
    let quads = (p.len + 3u) >> 2u;
    likeliest(thread, quads);
    if (thread == 0u) {
        ids[0] = select(best[0].y, NONE, best[0].x == NONE);
    }
}
