// attention_pack: wide=48 backward f16

enable f16;
// Packs Q, K, V and, if `backward`, dO for attention by cooperative matrices, each [M, H * D]. For
// every head and row, values become f16 times a power of two found from the row's own largest
// value. Rows are padded with zeros to 48 values and to whole tiles of 16 x 16. Each tile
// is contiguous: packed[plane][head][row / 16][d / 16][row % 16][d % 16].
//
// Q and K have two planes of f16, with 22 bits together: the value rounded to 11 bits, and the
// remainder. V and dO have one plane of values rounded to f16. Products that contract over rows
// read a transposed plane: [row / 16][d / 16][d % 16][row % 16].
//
// Floor: bytes of the input and of its planes, (4 + 2 per plane) * M * H * D each, over the
// memory's bandwidth; M * H * D FLOP each.

struct Params {
    first_group: u32,
    groups: u32,
    queries: u32,    // M of Q and dO
    keys: u32,       // M of K and V
    heads: u32,      // H of Q and dO
    kv_heads: u32,   // H of K and V
    head_quads: u32, // D / 4
}

var<immediate> p: Params;
@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> d_o: array<vec4<f32>>; // unused, unless `backward`
@group(0) @binding(4) var<storage, read_write> queries: array<vec4<f16>>; // planes of Q, of dO
@group(0) @binding(5) var<storage, read_write> keys: array<vec4<f16>>;    // planes of K, of V
// The factors of a packed row's values: of Q, then dO, or of K, then V. 2^-126 for a row of zeros.
@group(0) @binding(6) var<storage, read_write> query_scales: array<f32>;
@group(0) @binding(7) var<storage, read_write> key_scales: array<f32>;

// The power of two that brings a largest value into [2^13, 2^14). There f16 is most exact, and
// products with similar values, or with W (near 2^8), stay far from overflow in f32. 2^126 for
// zeros and subnormals, which a driver may flush.
fn factor_of(largest: f32) -> f32 {
    // Biased exponents of the largest value and of the factor, within the range of normal numbers.
    let exponent = i32(bitcast<u32>(largest) >> 23u) & 255;
    return bitcast<f32>(u32(clamp(127 + 13 + 127 - exponent, 1, 253)) << 23u);
}

// The workgroup's 16 rows, multiplied by their factors.
var<workgroup> rows: array<vec4<f32>, 208>;
// The largest value of each thread.
var<workgroup> largest: array<f32, 64>;

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
    // Rows of a packed head, and the number of tiles of 16 rows in all heads.
    let query_padded = (p.queries + 63u) / 64u * 64u;
    let key_padded = (p.keys + 63u) / 64u * 64u;
    let query_tiles = p.heads * (query_padded / 16u);
    let key_tiles = p.kv_heads * (key_padded / 16u);
    // Number of tiles of 16 rows before those of K, of V and of dO.
    let k_first = query_tiles;
    let v_first = k_first + key_tiles;
    let do_first = v_first + key_tiles;

    let of_keys = group >= k_first && group < do_first;
    let padded = select(query_padded, key_padded, of_keys);
    let heads = select(p.heads, p.kv_heads, of_keys);
    let tiles = select(query_tiles, key_tiles, of_keys);
    let first = select(
        select(0u, k_first, group >= k_first),
        select(v_first, do_first, group >= do_first),
        group >= v_first,
    );
    let tile = group - first;
    // Four threads share a row.
    let row = tile * 16u + thread / 4u;
    let head = row / padded;
    let m = row - head * padded;
    let rows_of_x = select(p.queries, p.keys, of_keys);
    let begin = (min(m, rows_of_x - 1u) * heads + head) * p.head_quads;
    let at = thread / 4u * 13u;
    let quad0 = thread % 4u + 0u;
    var value0: vec4<f32>;
    let quad1 = thread % 4u + 4u;
    var value1: vec4<f32>;
    let quad2 = thread % 4u + 8u;
    var value2: vec4<f32>;
    if (group < k_first) {
        value0 = q[begin + min(quad0, p.head_quads - 1u)];
        value1 = q[begin + min(quad1, p.head_quads - 1u)];
        value2 = q[begin + min(quad2, p.head_quads - 1u)];
    }
    else if (group < v_first) {
        value0 = k[begin + min(quad0, p.head_quads - 1u)];
        value1 = k[begin + min(quad1, p.head_quads - 1u)];
        value2 = k[begin + min(quad2, p.head_quads - 1u)];
    }
    else if (group < do_first) {
        value0 = v[begin + min(quad0, p.head_quads - 1u)];
        value1 = v[begin + min(quad1, p.head_quads - 1u)];
        value2 = v[begin + min(quad2, p.head_quads - 1u)];
    }
    else if (group < p.groups) {
        value0 = d_o[begin + min(quad0, p.head_quads - 1u)];
        value1 = d_o[begin + min(quad1, p.head_quads - 1u)];
        value2 = d_o[begin + min(quad2, p.head_quads - 1u)];
    }
    var most = vec4<f32>(0.0);
    let known0 = vec4<bool>(m < rows_of_x && quad0 < p.head_quads);
    value0 = select(vec4<f32>(0.0), value0, known0);
    most = max(most, abs(value0));
    let known1 = vec4<bool>(m < rows_of_x && quad1 < p.head_quads);
    value1 = select(vec4<f32>(0.0), value1, known1);
    most = max(most, abs(value1));
    let known2 = vec4<bool>(m < rows_of_x && quad2 < p.head_quads);
    value2 = select(vec4<f32>(0.0), value2, known2);
    most = max(most, abs(value2));
    largest[thread] = max(max(most.x, most.y), max(most.z, most.w));
    workgroupBarrier();
    let of_row = thread & ~3u;
    let factor = factor_of(max(
        max(largest[of_row], largest[of_row + 1u]),
        max(largest[of_row + 2u], largest[of_row + 3u]),
    ));
    rows[at + quad0] = value0 * factor;
    rows[at + quad1] = value1 * factor;
    rows[at + quad2] = value2 * factor;
    workgroupBarrier();

    // The exact inverse of a power of two.
    let scale = bitcast<f32>(0x7f000000u - bitcast<u32>(factor));
    // One vec4 of every tile.
    let plane = tiles * 192u;
    let to = tile * 192u + thread;
    if (group < k_first) {
        if (thread % 4u == 0u) {
            query_scales[row] = scale;
        }
        {
            let to = to + 0u * plane + 0u;
            let value = rows[at + 0u + thread % 4u];
            // Rounds to 11 bits, all of which f16 holds. Converting to f16 and back doesn't work
            // here: Mesa optimizes it away.
            let near = bitcast<vec4<u32>>(value) + vec4<u32>(0x1000u);
            let larger = bitcast<vec4<f32>>(near & vec4<u32>(0xffffe000u));
            queries[to] = vec4<f16>(larger);
            queries[to + plane] = vec4<f16>(value - larger);
            // Takes a value from each of four rows.
            let from_row = thread % 4u * 52u + 0u + thread / 16u;
            let e = thread / 4u % 4u;
            let column = vec4<f32>(
                rows[from_row][e],
                rows[from_row + 13u][e],
                rows[from_row + 26u][e],
                rows[from_row + 39u][e],
            );
            queries[to + 2u * plane] =
                vec4<f16>(column);
        }
        {
            let to = to + 0u * plane + 64u;
            let value = rows[at + 4u + thread % 4u];
            // Rounds to 11 bits, all of which f16 holds. Converting to f16 and back doesn't work
            // here: Mesa optimizes it away.
            let near = bitcast<vec4<u32>>(value) + vec4<u32>(0x1000u);
            let larger = bitcast<vec4<f32>>(near & vec4<u32>(0xffffe000u));
            queries[to] = vec4<f16>(larger);
            queries[to + plane] = vec4<f16>(value - larger);
            // Takes a value from each of four rows.
            let from_row = thread % 4u * 52u + 4u + thread / 16u;
            let e = thread / 4u % 4u;
            let column = vec4<f32>(
                rows[from_row][e],
                rows[from_row + 13u][e],
                rows[from_row + 26u][e],
                rows[from_row + 39u][e],
            );
            queries[to + 2u * plane] =
                vec4<f16>(column);
        }
        {
            let to = to + 0u * plane + 128u;
            let value = rows[at + 8u + thread % 4u];
            // Rounds to 11 bits, all of which f16 holds. Converting to f16 and back doesn't work
            // here: Mesa optimizes it away.
            let near = bitcast<vec4<u32>>(value) + vec4<u32>(0x1000u);
            let larger = bitcast<vec4<f32>>(near & vec4<u32>(0xffffe000u));
            queries[to] = vec4<f16>(larger);
            queries[to + plane] = vec4<f16>(value - larger);
            // Takes a value from each of four rows.
            let from_row = thread % 4u * 52u + 8u + thread / 16u;
            let e = thread / 4u % 4u;
            let column = vec4<f32>(
                rows[from_row][e],
                rows[from_row + 13u][e],
                rows[from_row + 26u][e],
                rows[from_row + 39u][e],
            );
            queries[to + 2u * plane] =
                vec4<f16>(column);
        }
    }
    else if (group < v_first) {
        if (thread % 4u == 0u) {
            key_scales[row] = scale;
        }
        {
            let to = to + 0u * plane + 0u;
            let value = rows[at + 0u + thread % 4u];
            // Rounds to 11 bits, all of which f16 holds. Converting to f16 and back doesn't work
            // here: Mesa optimizes it away.
            let near = bitcast<vec4<u32>>(value) + vec4<u32>(0x1000u);
            let larger = bitcast<vec4<f32>>(near & vec4<u32>(0xffffe000u));
            keys[to] = vec4<f16>(larger);
            keys[to + plane] = vec4<f16>(value - larger);
            // Takes a value from each of four rows.
            let from_row = thread % 4u * 52u + 0u + thread / 16u;
            let e = thread / 4u % 4u;
            let column = vec4<f32>(
                rows[from_row][e],
                rows[from_row + 13u][e],
                rows[from_row + 26u][e],
                rows[from_row + 39u][e],
            );
            keys[to + 2u * plane] =
                vec4<f16>(column);
        }
        {
            let to = to + 0u * plane + 64u;
            let value = rows[at + 4u + thread % 4u];
            // Rounds to 11 bits, all of which f16 holds. Converting to f16 and back doesn't work
            // here: Mesa optimizes it away.
            let near = bitcast<vec4<u32>>(value) + vec4<u32>(0x1000u);
            let larger = bitcast<vec4<f32>>(near & vec4<u32>(0xffffe000u));
            keys[to] = vec4<f16>(larger);
            keys[to + plane] = vec4<f16>(value - larger);
            // Takes a value from each of four rows.
            let from_row = thread % 4u * 52u + 4u + thread / 16u;
            let e = thread / 4u % 4u;
            let column = vec4<f32>(
                rows[from_row][e],
                rows[from_row + 13u][e],
                rows[from_row + 26u][e],
                rows[from_row + 39u][e],
            );
            keys[to + 2u * plane] =
                vec4<f16>(column);
        }
        {
            let to = to + 0u * plane + 128u;
            let value = rows[at + 8u + thread % 4u];
            // Rounds to 11 bits, all of which f16 holds. Converting to f16 and back doesn't work
            // here: Mesa optimizes it away.
            let near = bitcast<vec4<u32>>(value) + vec4<u32>(0x1000u);
            let larger = bitcast<vec4<f32>>(near & vec4<u32>(0xffffe000u));
            keys[to] = vec4<f16>(larger);
            keys[to + plane] = vec4<f16>(value - larger);
            // Takes a value from each of four rows.
            let from_row = thread % 4u * 52u + 8u + thread / 16u;
            let e = thread / 4u % 4u;
            let column = vec4<f32>(
                rows[from_row][e],
                rows[from_row + 13u][e],
                rows[from_row + 26u][e],
                rows[from_row + 39u][e],
            );
            keys[to + 2u * plane] =
                vec4<f16>(column);
        }
    }
    else if (group < do_first) {
        if (thread % 4u == 0u) {
            key_scales[16u * tiles + row] = scale;
        }
        {
            let to = to + 3u * plane + 0u;
            let value = rows[at + 0u + thread % 4u];
            keys[to] = vec4<f16>(value);
        }
        {
            let to = to + 3u * plane + 64u;
            let value = rows[at + 4u + thread % 4u];
            keys[to] = vec4<f16>(value);
        }
        {
            let to = to + 3u * plane + 128u;
            let value = rows[at + 8u + thread % 4u];
            keys[to] = vec4<f16>(value);
        }
    }
    else if (group < p.groups) {
        if (thread % 4u == 0u) {
            query_scales[16u * tiles + row] = scale;
        }
        {
            let to = to + 3u * plane + 0u;
            let value = rows[at + 0u + thread % 4u];
            queries[to] = vec4<f16>(value);
            // Takes a value from each of four rows.
            let from_row = thread % 4u * 52u + 0u + thread / 16u;
            let e = thread / 4u % 4u;
            let column = vec4<f32>(
                rows[from_row][e],
                rows[from_row + 13u][e],
                rows[from_row + 26u][e],
                rows[from_row + 39u][e],
            );
            queries[to + 1u * plane] =
                vec4<f16>(column);
        }
        {
            let to = to + 3u * plane + 64u;
            let value = rows[at + 4u + thread % 4u];
            queries[to] = vec4<f16>(value);
            // Takes a value from each of four rows.
            let from_row = thread % 4u * 52u + 4u + thread / 16u;
            let e = thread / 4u % 4u;
            let column = vec4<f32>(
                rows[from_row][e],
                rows[from_row + 13u][e],
                rows[from_row + 26u][e],
                rows[from_row + 39u][e],
            );
            queries[to + 1u * plane] =
                vec4<f16>(column);
        }
        {
            let to = to + 3u * plane + 128u;
            let value = rows[at + 8u + thread % 4u];
            queries[to] = vec4<f16>(value);
            // Takes a value from each of four rows.
            let from_row = thread % 4u * 52u + 8u + thread / 16u;
            let e = thread / 4u % 4u;
            let column = vec4<f32>(
                rows[from_row][e],
                rows[from_row + 13u][e],
                rows[from_row + 26u][e],
                rows[from_row + 39u][e],
            );
            queries[to + 1u * plane] =
                vec4<f16>(column);
        }
    }
}
