// rope_append: threads=64

// Adds the next tokens of a sequence to the cache: queries and keys are rotated by the angles of
// their positions, and keys and values are stored in the cache. Y = rope(Q), keys[first + i] =
// rope(K)[i], values[first + i] = V[i].

struct Params {
    first_group: u32,
    groups: u32,
    pairs: u32,      // of Q
    kv_pairs: u32,   // of K, and of V
    row_pairs: u32,  // of one token's query
    kv_row_pairs: u32,
    first: u32,      // position of the first token, and its row in the cache
    half: u32,       // of a head, D / 2
    positions: u32,  // rows of the table
}

var<immediate> p: Params;
@group(0) @binding(0) var<storage, read> q: array<f32>;
@group(0) @binding(1) var<storage, read> k: array<f32>;
@group(0) @binding(2) var<storage, read> v: array<f32>;
@group(0) @binding(3) var<storage, read> cosines: array<f32>; // [positions, D / 2]
@group(0) @binding(4) var<storage, read> sines: array<f32>;   // [positions, D / 2]
@group(0) @binding(5) var<storage, read_write> y: array<f32>;
@group(0) @binding(6) var<storage, read_write> keys: array<f32>;
@group(0) @binding(7) var<storage, read_write> values: array<f32>;

// Pairs of a head's values and their rotation angles. The including shader has `p.half`,
// `p.positions`, `cosines` and `sines`.

// Places of the two values of a pair.
fn places(pair: u32) -> vec2<u32> {
    // Half a head apart: (i, i + D / 2).
    let first = 2u * pair - pair % p.half;
    return vec2<u32>(first, first + p.half);
}

// Cosine and sine for a pair of a token at a position; past the table's end those of the last
// position.
fn angle(pair: u32, position: u32) -> vec2<f32> {
    let at = min(position, p.positions - 1u) * p.half + pair % p.half;
    return vec2<f32>(cosines[at], sines[at]);
}

// A pair, rotated by the angle with this cosine and sine.
fn turned(a: f32, b: f32, angle: vec2<f32>) -> vec2<f32> {
    return vec2<f32>(a * angle.x - b * angle.y, b * angle.x + a * angle.y);
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
    let i = group * 64u + thread;
    if (i >= p.pairs + 2u * p.kv_pairs) {
        return;
    }
    if (i < p.pairs) {
        let at = places(i);
        let result = turned(q[at.x], q[at.y], angle(i, p.first + i / p.row_pairs));
        y[at.x] = result.x;
        y[at.y] = result.y;
        return;
    }
    let pair = (i - p.pairs) % p.kv_pairs;
    let at = places(pair);
    let to = at + 2u * p.kv_row_pairs * p.first;
    if (i < p.pairs + p.kv_pairs) {
        let result = turned(k[at.x], k[at.y], angle(pair, p.first + pair / p.kv_row_pairs));
        keys[to.x] = result.x;
        keys[to.y] = result.y;
    } else {
        values[to.x] = v[at.x];
        values[to.y] = v[at.y];
    }
}
