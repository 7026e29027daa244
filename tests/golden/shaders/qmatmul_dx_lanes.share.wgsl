// qmatmul_dx_lanes: kind=quant decoder=offset scales=double mins=double threads=8 tokens=2 words=2 share scale_sets=2 dropout

// dX = dY * W + mask * (G * A), for software drivers: no workgroup memory, no barriers.
//
// Lanes run along K. One invocation owns 2 rows of dX by 2 words of eight
// columns, 8 words apart. Eight rows of W are decoded at a time and serve 2
// rows.
// The workgroup is one subgroup of eight: each lane loads one of eight dY and broadcasts it.
// Drivers that don't detect that an address is the same in all lanes would load it eight times.
// The same applies to scales: the lanes' words of a row use 2 scales together.

// Parameters and operands of every form of the input gradient; `QmatmulDxParams` in
// src/kernels/qmatmul/dx/call.rs.
struct Params {
    first_group: u32,
    groups: u32,
    k: u32,             // columns of dX
    words: u32,         // of eight columns, in a row of dX
    n: u32,             // rows of W in this part
    row: u32,           // first row of dX
    rows: u32,          // rows of dX from there on
    column: u32,        // column of dY for this part's first row of W
    dy_stride: u32,     // columns of dY
    splits: u32,        // parts of the contracted index that are summed separately
    rank: u32,          // 0: no adapter, or an earlier part has added it
    accumulate: u32,    // 1: add to dX
    seed_low: u32,      // of the dropout
    seed_high: u32,
    drop_below: u32,    // values with a hash below this are dropped
    keep_scale: f32,    // 1 / (1 - probability)
    m: Matrix,
}

// Layout of one part of a device matrix in its buffer; `MatrixLayout` in
// src/kernels/matrix/packing.rs. Places are in u32 words.
struct Matrix {
    row_words: u32,    // stride from one row of codes or values to the next
    block_shift: u32,  // log2 of the weights per block
    first_weight: u32, // this part's first weight within its block
    first_block: u32,  // this part's first block within its super-block
    super_shift: u32,  // log2 of the blocks per super-block
    scales: u32,       // place of the scales: f32, bytes of codes, or f16 pairs (Q8_0)
    supers: u32,       // place of the super-scales
    table: u32,        // place of the 256 values that scale codes stand for
    offset: f32,       // added to every double-quantized scale
    mins: u32,         // the same for the minima
    min_supers: u32,
    min_table: u32,
    min_offset: f32,
    factor: f32,       // power of two that brings the largest weight near 256, for f16
}

var<immediate> p: Params;
@group(0) @binding(0) var<storage, read> dy: array<f32>;
@group(0) @binding(1) var<storage, read> w: array<u32>;
@group(0) @binding(2) var<storage, read> g: array<f32>;
@group(0) @binding(3) var<storage, read> a: array<vec4<f32>>;

// Counter-based dropout: whether element i survives depends on (i, seed) alone, so that forward,
// backward, every device and every tier agree. The hash is pcg3d (Jarzynski and Olano, "Hash
// Functions for GPU Rendering", 2020).
fn dropout_factor_of(i: u32, seed_low: u32, seed_high: u32) -> f32 {
    var v = vec3<u32>(i, seed_low, seed_high) * 1664525u + vec3<u32>(1013904223u);
    v.x = v.x + v.y * v.z;
    v.y = v.y + v.z * v.x;
    v.z = v.z + v.x * v.y;
    v = v ^ (v >> vec3<u32>(16u));
    v.x = v.x + v.y * v.z;
    return select(0.0, p.keep_scale, v.x >= p.drop_below);
}

fn dropout_factor(i: u32) -> f32 {
    return dropout_factor_of(i, p.seed_low, p.seed_high);
}

// Dropout factors of the elements [row, k .. k + 4] of X.
fn dropout_factor4(row: u32, k: u32) -> vec4<f32> {
    let i = row * p.k + k;
    return vec4<f32>(
        dropout_factor(i), dropout_factor(i + 1u), dropout_factor(i + 2u), dropout_factor(i + 3u),
    );
}

// dX[row, 4q .. 4q + 4], up to the last column.
fn load4(row: u32, q: u32) -> vec4<f32> {
    let at = row * p.k + 4u * q;
    return vec4<f32>(dx[at], dx[at + 1u], dx[at + 2u], dx[at + 3u]);
}

fn store4(row: u32, q: u32, values: vec4<f32>) {
    let at = row * p.k + 4u * q;
    dx[at + 0u] = values.x;
    dx[at + 1u] = values.y;
    dx[at + 2u] = values.z;
    dx[at + 3u] = values.w;
}

@group(0) @binding(4) var<storage, read_write> dx: array<f32>;

// A matrix W [N, K] in one buffer of u32 words, `w`, decoded four or eight weights at a time.
//
//   kind = "quant":  w[n, k] = codebook[nibble] * scale[block] (+ min[block]), the canonical 4-bit
//   form
//   kind = "f32" | "f16" | "bf16" | "q8_0":  a dense matrix in its own precision
//
// Rows of codes (or values) are `row_words` words apart. Blocks run over the flat index n * K + k.
// `ragged` (K is not a multiple of 8): a word may straddle two blocks, and weights past K must
// read as zero. Include after `Params`, which holds `m: Matrix` and `k: u32`, and after the
// binding `w`.
//
// `wide`: the form for hardware. The same buffer is bound a second time as `w4`, with loads 16
// bytes wide. If the codebook needs a table, it is in workgroup memory: call
// `fill_codebook(thread)` first, with a barrier before anything is decoded. `chunked`: 32 weights
// that one such load brings, and that begin at a multiple of 32, lie in one block.

struct W8 {
    lo: vec4<f32>, // k, k + 1, k + 2, k + 3
    hi: vec4<f32>, // k + 4 ... k + 7
}

fn word_as_f32(at: u32) -> f32 {
    return bitcast<f32>(w[at]);
}

// Stored form of a block's scale: the word with its code, which starts at bit `shift`, and
// its super-scale.
struct StoredScale {
    word: u32,
    shift: u32,
    above: f32,
}

fn stored_scale(block: u32) -> StoredScale {
    let super_block = (block + p.m.first_block) >> p.m.super_shift;
    let above = word_as_f32(p.m.supers + super_block);
    return StoredScale(w[p.m.scales + (block >> 2u)], 8u * (block & 3u), above);
}

fn scale_from(stored: StoredScale) -> f32 {
    // Rounded after the product and again after the sum, like the reference.
    let code = (stored.word >> stored.shift) & 255u;
    let scaled = word_as_f32(p.m.table + code) * stored.above;
    return scaled + p.m.offset;
}

// The scale of a block, counted from the first block of this part of the matrix.
fn scale_of(block: u32) -> f32 {
    return scale_from(stored_scale(block));
}

// Stored form of a block's min: the word with its code, which starts at bit `shift`, and
// its super-scale.
struct StoredMin {
    word: u32,
    shift: u32,
    above: f32,
}

fn stored_min(block: u32) -> StoredMin {
    let super_block = (block + p.m.first_block) >> p.m.super_shift;
    let above = word_as_f32(p.m.min_supers + super_block);
    return StoredMin(w[p.m.mins + (block >> 2u)], 8u * (block & 3u), above);
}

fn min_from(stored: StoredMin) -> f32 {
    // Rounded after the product and again after the sum, like the reference.
    let code = (stored.word >> stored.shift) & 255u;
    let scaled = word_as_f32(p.m.min_table + code) * stored.above;
    return scaled + p.m.min_offset;
}

// The min of a block, counted from the first block of this part of the matrix.
fn min_of(block: u32) -> f32 {
    return min_from(stored_min(block));
}

// Codebook values of four codes of a word, which start at these bits.
fn decode(word: u32, start: vec4<u32>) -> vec4<f32> {
    // The codebook counts up by one from its first value.
    return vec4<f32>((vec4<u32>(word) >> start) & vec4<u32>(15u)) + vec4<f32>(-8.0f);
}

// Values of codes 0 to 3, the low half of a word.
fn decode_low(word: u32) -> vec4<f32> {
    return decode(word, vec4<u32>(0u, 4u, 8u, 12u));
}

// Values of codes 4 to 7.
fn decode_high(word: u32) -> vec4<f32> {
    return decode(word, vec4<u32>(16u, 20u, 24u, 28u));
}

// The block of weight [n, k].
fn block_of(n: u32, k: u32) -> u32 {
    return (n * p.k + k + p.m.first_weight) >> p.m.block_shift;
}

// Eight weights of a word that lies within `block`.
fn decode_word(word: u32, block: u32) -> W8 {
    let scale = vec4<f32>(scale_of(block));
    var lo = decode_low(word) * scale;
    var hi = decode_high(word) * scale;
    let low = vec4<f32>(min_of(block));
    lo = lo + low;
    hi = hi + low;
    return W8(lo, hi);
}

// w[n, 8g .. 8g + 8]
fn weights8(n: u32, g: u32) -> W8 {
    return decode_word(w[n * p.m.row_words + g], block_of(n, 8u * g));
}

// w[n, 4q .. 4q + 4]
fn weights4(n: u32, q: u32) -> vec4<f32> {
    let word = w[n * p.m.row_words + (q >> 1u)] >> (16u * (q & 1u));
    let block = block_of(n, 4u * q);
    return decode_low(word) * vec4<f32>(scale_of(block)) + vec4<f32>(min_of(block));
}

fn a4(row: u32, q: u32) -> vec4<f32> {
    return a[row * (p.k >> 2u) + q];
}

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
    let row_groups = p.rows / 2u;
    let column_group = group / row_groups;
    let row_group = group - column_group * row_groups;
    let row_base = p.row + row_group * 2u;
    let word_base = column_group * 16u;
    let upper = thread >= 4u;

    // Words past the end are computed from the last one and not stored; rows always come in whole
    // groups.
    let word0 = min(word_base + 0u + thread, p.words - 1u);
    let word1 = min(word_base + 8u + thread, p.words - 1u);
    let row0 = row_base + 0u;
    var lo_sum0_0 = vec4<f32>(0.0);
    var hi_sum0_0 = vec4<f32>(0.0);
    var lo_sum0_1 = vec4<f32>(0.0);
    var hi_sum0_1 = vec4<f32>(0.0);
    let row1 = row_base + 1u;
    var lo_sum1_0 = vec4<f32>(0.0);
    var hi_sum1_0 = vec4<f32>(0.0);
    var lo_sum1_1 = vec4<f32>(0.0);
    var hi_sum1_1 = vec4<f32>(0.0);

    // The adapter, which only the first part adds, comes first, because its mask must not affect
    // the rest.
    for (var j = 0u; j < p.rank; j = j + 1u) {
        let lo0 = a4(j, 2u * word0);
        let hi0 = a4(j, 2u * word0 + 1u);
        let lo1 = a4(j, 2u * word1);
        let hi1 = a4(j, 2u * word1 + 1u);
        {
            let left = g[row0 * p.rank + j];
            lo_sum0_0 = lo_sum0_0 + left * lo0;
            hi_sum0_0 = hi_sum0_0 + left * hi0;
            lo_sum0_1 = lo_sum0_1 + left * lo1;
            hi_sum0_1 = hi_sum0_1 + left * hi1;
        }
        {
            let left = g[row1 * p.rank + j];
            lo_sum1_0 = lo_sum1_0 + left * lo0;
            hi_sum1_0 = hi_sum1_0 + left * hi0;
            lo_sum1_1 = lo_sum1_1 + left * lo1;
            hi_sum1_1 = hi_sum1_1 + left * hi1;
        }
    }
    lo_sum0_0 = lo_sum0_0 * dropout_factor4(row0, 8u * word0);
    hi_sum0_0 =
        hi_sum0_0 * dropout_factor4(row0, 8u * word0 + 4u);
    lo_sum0_1 = lo_sum0_1 * dropout_factor4(row0, 8u * word1);
    hi_sum0_1 =
        hi_sum0_1 * dropout_factor4(row0, 8u * word1 + 4u);
    lo_sum1_0 = lo_sum1_0 * dropout_factor4(row1, 8u * word0);
    hi_sum1_0 =
        hi_sum1_0 * dropout_factor4(row1, 8u * word0 + 4u);
    lo_sum1_1 = lo_sum1_1 * dropout_factor4(row1, 8u * word1);
    hi_sum1_1 =
        hi_sum1_1 * dropout_factor4(row1, 8u * word1 + 4u);

    // Rows of W past the end are the last one, multiplied by zero.
    let last = p.n - 1u;
    for (var n = 0u; n < p.n; n = n + 8u) {
        let n0 = min(n + 0u, last);
        let n1 = min(n + 1u, last);
        let n2 = min(n + 2u, last);
        let n3 = min(n + 3u, last);
        let n4 = min(n + 4u, last);
        let n5 = min(n + 5u, last);
        let n6 = min(n + 6u, last);
        let n7 = min(n + 7u, last);
        let n_mine = min(n + lane, last);
        let is_mine = n + lane <= last;
        let word0_0 = word_base + 0u;
        let block0_0 = block_of(n_mine, 8u * min(word0_0, p.words - 1u));
        let scale0_0 = scale_of(block0_0);
        let low0_0 = min_of(block0_0);
        let word0_1 = word_base + 4u;
        let block0_1 = block_of(n_mine, 8u * min(word0_1, p.words - 1u));
        let scale0_1 = scale_of(block0_1);
        let low0_1 = min_of(block0_1);
        let word1_0 = word_base + 8u;
        let block1_0 = block_of(n_mine, 8u * min(word1_0, p.words - 1u));
        let scale1_0 = scale_of(block1_0);
        let low1_0 = min_of(block1_0);
        let word1_1 = word_base + 12u;
        let block1_1 = block_of(n_mine, 8u * min(word1_1, p.words - 1u));
        let scale1_1 = scale_of(block1_1);
        let low1_1 = min_of(block1_1);
        let codes0_0 = w[n0 * p.m.row_words + word0];
        let scale0_0_0 =
            subgroupBroadcast(scale0_0, 0u);
        let scale0_0_1 =
            subgroupBroadcast(scale0_1, 0u);
        let scale_of0_0 =
            vec4<f32>(select(scale0_0_0, scale0_0_1, upper));
        let low0_0_0 =
            subgroupBroadcast(low0_0, 0u);
        let low0_0_1 =
            subgroupBroadcast(low0_1, 0u);
        let low_of0_0 =
            vec4<f32>(select(low0_0_0, low0_0_1, upper));
        let lo0_0 = decode_low(codes0_0)
            * scale_of0_0 + low_of0_0;
        let hi0_0 = decode_high(codes0_0)
            * scale_of0_0 + low_of0_0;
        let codes0_1 = w[n0 * p.m.row_words + word1];
        let scale0_1_0 =
            subgroupBroadcast(scale1_0, 0u);
        let scale0_1_1 =
            subgroupBroadcast(scale1_1, 0u);
        let scale_of0_1 =
            vec4<f32>(select(scale0_1_0, scale0_1_1, upper));
        let low0_1_0 =
            subgroupBroadcast(low1_0, 0u);
        let low0_1_1 =
            subgroupBroadcast(low1_1, 0u);
        let low_of0_1 =
            vec4<f32>(select(low0_1_0, low0_1_1, upper));
        let lo0_1 = decode_low(codes0_1)
            * scale_of0_1 + low_of0_1;
        let hi0_1 = decode_high(codes0_1)
            * scale_of0_1 + low_of0_1;
        let codes1_0 = w[n1 * p.m.row_words + word0];
        let scale1_0_0 =
            subgroupBroadcast(scale0_0, 1u);
        let scale1_0_1 =
            subgroupBroadcast(scale0_1, 1u);
        let scale_of1_0 =
            vec4<f32>(select(scale1_0_0, scale1_0_1, upper));
        let low1_0_0 =
            subgroupBroadcast(low0_0, 1u);
        let low1_0_1 =
            subgroupBroadcast(low0_1, 1u);
        let low_of1_0 =
            vec4<f32>(select(low1_0_0, low1_0_1, upper));
        let lo1_0 = decode_low(codes1_0)
            * scale_of1_0 + low_of1_0;
        let hi1_0 = decode_high(codes1_0)
            * scale_of1_0 + low_of1_0;
        let codes1_1 = w[n1 * p.m.row_words + word1];
        let scale1_1_0 =
            subgroupBroadcast(scale1_0, 1u);
        let scale1_1_1 =
            subgroupBroadcast(scale1_1, 1u);
        let scale_of1_1 =
            vec4<f32>(select(scale1_1_0, scale1_1_1, upper));
        let low1_1_0 =
            subgroupBroadcast(low1_0, 1u);
        let low1_1_1 =
            subgroupBroadcast(low1_1, 1u);
        let low_of1_1 =
            vec4<f32>(select(low1_1_0, low1_1_1, upper));
        let lo1_1 = decode_low(codes1_1)
            * scale_of1_1 + low_of1_1;
        let hi1_1 = decode_high(codes1_1)
            * scale_of1_1 + low_of1_1;
        let codes2_0 = w[n2 * p.m.row_words + word0];
        let scale2_0_0 =
            subgroupBroadcast(scale0_0, 2u);
        let scale2_0_1 =
            subgroupBroadcast(scale0_1, 2u);
        let scale_of2_0 =
            vec4<f32>(select(scale2_0_0, scale2_0_1, upper));
        let low2_0_0 =
            subgroupBroadcast(low0_0, 2u);
        let low2_0_1 =
            subgroupBroadcast(low0_1, 2u);
        let low_of2_0 =
            vec4<f32>(select(low2_0_0, low2_0_1, upper));
        let lo2_0 = decode_low(codes2_0)
            * scale_of2_0 + low_of2_0;
        let hi2_0 = decode_high(codes2_0)
            * scale_of2_0 + low_of2_0;
        let codes2_1 = w[n2 * p.m.row_words + word1];
        let scale2_1_0 =
            subgroupBroadcast(scale1_0, 2u);
        let scale2_1_1 =
            subgroupBroadcast(scale1_1, 2u);
        let scale_of2_1 =
            vec4<f32>(select(scale2_1_0, scale2_1_1, upper));
        let low2_1_0 =
            subgroupBroadcast(low1_0, 2u);
        let low2_1_1 =
            subgroupBroadcast(low1_1, 2u);
        let low_of2_1 =
            vec4<f32>(select(low2_1_0, low2_1_1, upper));
        let lo2_1 = decode_low(codes2_1)
            * scale_of2_1 + low_of2_1;
        let hi2_1 = decode_high(codes2_1)
            * scale_of2_1 + low_of2_1;
        let codes3_0 = w[n3 * p.m.row_words + word0];
        let scale3_0_0 =
            subgroupBroadcast(scale0_0, 3u);
        let scale3_0_1 =
            subgroupBroadcast(scale0_1, 3u);
        let scale_of3_0 =
            vec4<f32>(select(scale3_0_0, scale3_0_1, upper));
        let low3_0_0 =
            subgroupBroadcast(low0_0, 3u);
        let low3_0_1 =
            subgroupBroadcast(low0_1, 3u);
        let low_of3_0 =
            vec4<f32>(select(low3_0_0, low3_0_1, upper));
        let lo3_0 = decode_low(codes3_0)
            * scale_of3_0 + low_of3_0;
        let hi3_0 = decode_high(codes3_0)
            * scale_of3_0 + low_of3_0;
        let codes3_1 = w[n3 * p.m.row_words + word1];
        let scale3_1_0 =
            subgroupBroadcast(scale1_0, 3u);
        let scale3_1_1 =
            subgroupBroadcast(scale1_1, 3u);
        let scale_of3_1 =
            vec4<f32>(select(scale3_1_0, scale3_1_1, upper));
        let low3_1_0 =
            subgroupBroadcast(low1_0, 3u);
        let low3_1_1 =
            subgroupBroadcast(low1_1, 3u);
        let low_of3_1 =
            vec4<f32>(select(low3_1_0, low3_1_1, upper));
        let lo3_1 = decode_low(codes3_1)
            * scale_of3_1 + low_of3_1;
        let hi3_1 = decode_high(codes3_1)
            * scale_of3_1 + low_of3_1;
        let codes4_0 = w[n4 * p.m.row_words + word0];
        let scale4_0_0 =
            subgroupBroadcast(scale0_0, 4u);
        let scale4_0_1 =
            subgroupBroadcast(scale0_1, 4u);
        let scale_of4_0 =
            vec4<f32>(select(scale4_0_0, scale4_0_1, upper));
        let low4_0_0 =
            subgroupBroadcast(low0_0, 4u);
        let low4_0_1 =
            subgroupBroadcast(low0_1, 4u);
        let low_of4_0 =
            vec4<f32>(select(low4_0_0, low4_0_1, upper));
        let lo4_0 = decode_low(codes4_0)
            * scale_of4_0 + low_of4_0;
        let hi4_0 = decode_high(codes4_0)
            * scale_of4_0 + low_of4_0;
        let codes4_1 = w[n4 * p.m.row_words + word1];
        let scale4_1_0 =
            subgroupBroadcast(scale1_0, 4u);
        let scale4_1_1 =
            subgroupBroadcast(scale1_1, 4u);
        let scale_of4_1 =
            vec4<f32>(select(scale4_1_0, scale4_1_1, upper));
        let low4_1_0 =
            subgroupBroadcast(low1_0, 4u);
        let low4_1_1 =
            subgroupBroadcast(low1_1, 4u);
        let low_of4_1 =
            vec4<f32>(select(low4_1_0, low4_1_1, upper));
        let lo4_1 = decode_low(codes4_1)
            * scale_of4_1 + low_of4_1;
        let hi4_1 = decode_high(codes4_1)
            * scale_of4_1 + low_of4_1;
        let codes5_0 = w[n5 * p.m.row_words + word0];
        let scale5_0_0 =
            subgroupBroadcast(scale0_0, 5u);
        let scale5_0_1 =
            subgroupBroadcast(scale0_1, 5u);
        let scale_of5_0 =
            vec4<f32>(select(scale5_0_0, scale5_0_1, upper));
        let low5_0_0 =
            subgroupBroadcast(low0_0, 5u);
        let low5_0_1 =
            subgroupBroadcast(low0_1, 5u);
        let low_of5_0 =
            vec4<f32>(select(low5_0_0, low5_0_1, upper));
        let lo5_0 = decode_low(codes5_0)
            * scale_of5_0 + low_of5_0;
        let hi5_0 = decode_high(codes5_0)
            * scale_of5_0 + low_of5_0;
        let codes5_1 = w[n5 * p.m.row_words + word1];
        let scale5_1_0 =
            subgroupBroadcast(scale1_0, 5u);
        let scale5_1_1 =
            subgroupBroadcast(scale1_1, 5u);
        let scale_of5_1 =
            vec4<f32>(select(scale5_1_0, scale5_1_1, upper));
        let low5_1_0 =
            subgroupBroadcast(low1_0, 5u);
        let low5_1_1 =
            subgroupBroadcast(low1_1, 5u);
        let low_of5_1 =
            vec4<f32>(select(low5_1_0, low5_1_1, upper));
        let lo5_1 = decode_low(codes5_1)
            * scale_of5_1 + low_of5_1;
        let hi5_1 = decode_high(codes5_1)
            * scale_of5_1 + low_of5_1;
        let codes6_0 = w[n6 * p.m.row_words + word0];
        let scale6_0_0 =
            subgroupBroadcast(scale0_0, 6u);
        let scale6_0_1 =
            subgroupBroadcast(scale0_1, 6u);
        let scale_of6_0 =
            vec4<f32>(select(scale6_0_0, scale6_0_1, upper));
        let low6_0_0 =
            subgroupBroadcast(low0_0, 6u);
        let low6_0_1 =
            subgroupBroadcast(low0_1, 6u);
        let low_of6_0 =
            vec4<f32>(select(low6_0_0, low6_0_1, upper));
        let lo6_0 = decode_low(codes6_0)
            * scale_of6_0 + low_of6_0;
        let hi6_0 = decode_high(codes6_0)
            * scale_of6_0 + low_of6_0;
        let codes6_1 = w[n6 * p.m.row_words + word1];
        let scale6_1_0 =
            subgroupBroadcast(scale1_0, 6u);
        let scale6_1_1 =
            subgroupBroadcast(scale1_1, 6u);
        let scale_of6_1 =
            vec4<f32>(select(scale6_1_0, scale6_1_1, upper));
        let low6_1_0 =
            subgroupBroadcast(low1_0, 6u);
        let low6_1_1 =
            subgroupBroadcast(low1_1, 6u);
        let low_of6_1 =
            vec4<f32>(select(low6_1_0, low6_1_1, upper));
        let lo6_1 = decode_low(codes6_1)
            * scale_of6_1 + low_of6_1;
        let hi6_1 = decode_high(codes6_1)
            * scale_of6_1 + low_of6_1;
        let codes7_0 = w[n7 * p.m.row_words + word0];
        let scale7_0_0 =
            subgroupBroadcast(scale0_0, 7u);
        let scale7_0_1 =
            subgroupBroadcast(scale0_1, 7u);
        let scale_of7_0 =
            vec4<f32>(select(scale7_0_0, scale7_0_1, upper));
        let low7_0_0 =
            subgroupBroadcast(low0_0, 7u);
        let low7_0_1 =
            subgroupBroadcast(low0_1, 7u);
        let low_of7_0 =
            vec4<f32>(select(low7_0_0, low7_0_1, upper));
        let lo7_0 = decode_low(codes7_0)
            * scale_of7_0 + low_of7_0;
        let hi7_0 = decode_high(codes7_0)
            * scale_of7_0 + low_of7_0;
        let codes7_1 = w[n7 * p.m.row_words + word1];
        let scale7_1_0 =
            subgroupBroadcast(scale1_0, 7u);
        let scale7_1_1 =
            subgroupBroadcast(scale1_1, 7u);
        let scale_of7_1 =
            vec4<f32>(select(scale7_1_0, scale7_1_1, upper));
        let low7_1_0 =
            subgroupBroadcast(low1_0, 7u);
        let low7_1_1 =
            subgroupBroadcast(low1_1, 7u);
        let low_of7_1 =
            vec4<f32>(select(low7_1_0, low7_1_1, upper));
        let lo7_1 = decode_low(codes7_1)
            * scale_of7_1 + low_of7_1;
        let hi7_1 = decode_high(codes7_1)
            * scale_of7_1 + low_of7_1;
        {
            let at = row0 * p.dy_stride + p.column;
            let mine = select(0.0, dy[at + n_mine], is_mine);
            let d0 = subgroupBroadcast(mine, 0u);
            let d1 = subgroupBroadcast(mine, 1u);
            let d2 = subgroupBroadcast(mine, 2u);
            let d3 = subgroupBroadcast(mine, 3u);
            let d4 = subgroupBroadcast(mine, 4u);
            let d5 = subgroupBroadcast(mine, 5u);
            let d6 = subgroupBroadcast(mine, 6u);
            let d7 = subgroupBroadcast(mine, 7u);
            lo_sum0_0 = fma(vec4<f32>(d0), lo0_0, lo_sum0_0);
            lo_sum0_0 = fma(vec4<f32>(d1), lo1_0, lo_sum0_0);
            lo_sum0_0 = fma(vec4<f32>(d2), lo2_0, lo_sum0_0);
            lo_sum0_0 = fma(vec4<f32>(d3), lo3_0, lo_sum0_0);
            lo_sum0_0 = fma(vec4<f32>(d4), lo4_0, lo_sum0_0);
            lo_sum0_0 = fma(vec4<f32>(d5), lo5_0, lo_sum0_0);
            lo_sum0_0 = fma(vec4<f32>(d6), lo6_0, lo_sum0_0);
            lo_sum0_0 = fma(vec4<f32>(d7), lo7_0, lo_sum0_0);
            hi_sum0_0 = fma(vec4<f32>(d0), hi0_0, hi_sum0_0);
            hi_sum0_0 = fma(vec4<f32>(d1), hi1_0, hi_sum0_0);
            hi_sum0_0 = fma(vec4<f32>(d2), hi2_0, hi_sum0_0);
            hi_sum0_0 = fma(vec4<f32>(d3), hi3_0, hi_sum0_0);
            hi_sum0_0 = fma(vec4<f32>(d4), hi4_0, hi_sum0_0);
            hi_sum0_0 = fma(vec4<f32>(d5), hi5_0, hi_sum0_0);
            hi_sum0_0 = fma(vec4<f32>(d6), hi6_0, hi_sum0_0);
            hi_sum0_0 = fma(vec4<f32>(d7), hi7_0, hi_sum0_0);
            lo_sum0_1 = fma(vec4<f32>(d0), lo0_1, lo_sum0_1);
            lo_sum0_1 = fma(vec4<f32>(d1), lo1_1, lo_sum0_1);
            lo_sum0_1 = fma(vec4<f32>(d2), lo2_1, lo_sum0_1);
            lo_sum0_1 = fma(vec4<f32>(d3), lo3_1, lo_sum0_1);
            lo_sum0_1 = fma(vec4<f32>(d4), lo4_1, lo_sum0_1);
            lo_sum0_1 = fma(vec4<f32>(d5), lo5_1, lo_sum0_1);
            lo_sum0_1 = fma(vec4<f32>(d6), lo6_1, lo_sum0_1);
            lo_sum0_1 = fma(vec4<f32>(d7), lo7_1, lo_sum0_1);
            hi_sum0_1 = fma(vec4<f32>(d0), hi0_1, hi_sum0_1);
            hi_sum0_1 = fma(vec4<f32>(d1), hi1_1, hi_sum0_1);
            hi_sum0_1 = fma(vec4<f32>(d2), hi2_1, hi_sum0_1);
            hi_sum0_1 = fma(vec4<f32>(d3), hi3_1, hi_sum0_1);
            hi_sum0_1 = fma(vec4<f32>(d4), hi4_1, hi_sum0_1);
            hi_sum0_1 = fma(vec4<f32>(d5), hi5_1, hi_sum0_1);
            hi_sum0_1 = fma(vec4<f32>(d6), hi6_1, hi_sum0_1);
            hi_sum0_1 = fma(vec4<f32>(d7), hi7_1, hi_sum0_1);
        }
        {
            let at = row1 * p.dy_stride + p.column;
            let mine = select(0.0, dy[at + n_mine], is_mine);
            let d0 = subgroupBroadcast(mine, 0u);
            let d1 = subgroupBroadcast(mine, 1u);
            let d2 = subgroupBroadcast(mine, 2u);
            let d3 = subgroupBroadcast(mine, 3u);
            let d4 = subgroupBroadcast(mine, 4u);
            let d5 = subgroupBroadcast(mine, 5u);
            let d6 = subgroupBroadcast(mine, 6u);
            let d7 = subgroupBroadcast(mine, 7u);
            lo_sum1_0 = fma(vec4<f32>(d0), lo0_0, lo_sum1_0);
            lo_sum1_0 = fma(vec4<f32>(d1), lo1_0, lo_sum1_0);
            lo_sum1_0 = fma(vec4<f32>(d2), lo2_0, lo_sum1_0);
            lo_sum1_0 = fma(vec4<f32>(d3), lo3_0, lo_sum1_0);
            lo_sum1_0 = fma(vec4<f32>(d4), lo4_0, lo_sum1_0);
            lo_sum1_0 = fma(vec4<f32>(d5), lo5_0, lo_sum1_0);
            lo_sum1_0 = fma(vec4<f32>(d6), lo6_0, lo_sum1_0);
            lo_sum1_0 = fma(vec4<f32>(d7), lo7_0, lo_sum1_0);
            hi_sum1_0 = fma(vec4<f32>(d0), hi0_0, hi_sum1_0);
            hi_sum1_0 = fma(vec4<f32>(d1), hi1_0, hi_sum1_0);
            hi_sum1_0 = fma(vec4<f32>(d2), hi2_0, hi_sum1_0);
            hi_sum1_0 = fma(vec4<f32>(d3), hi3_0, hi_sum1_0);
            hi_sum1_0 = fma(vec4<f32>(d4), hi4_0, hi_sum1_0);
            hi_sum1_0 = fma(vec4<f32>(d5), hi5_0, hi_sum1_0);
            hi_sum1_0 = fma(vec4<f32>(d6), hi6_0, hi_sum1_0);
            hi_sum1_0 = fma(vec4<f32>(d7), hi7_0, hi_sum1_0);
            lo_sum1_1 = fma(vec4<f32>(d0), lo0_1, lo_sum1_1);
            lo_sum1_1 = fma(vec4<f32>(d1), lo1_1, lo_sum1_1);
            lo_sum1_1 = fma(vec4<f32>(d2), lo2_1, lo_sum1_1);
            lo_sum1_1 = fma(vec4<f32>(d3), lo3_1, lo_sum1_1);
            lo_sum1_1 = fma(vec4<f32>(d4), lo4_1, lo_sum1_1);
            lo_sum1_1 = fma(vec4<f32>(d5), lo5_1, lo_sum1_1);
            lo_sum1_1 = fma(vec4<f32>(d6), lo6_1, lo_sum1_1);
            lo_sum1_1 = fma(vec4<f32>(d7), lo7_1, lo_sum1_1);
            hi_sum1_1 = fma(vec4<f32>(d0), hi0_1, hi_sum1_1);
            hi_sum1_1 = fma(vec4<f32>(d1), hi1_1, hi_sum1_1);
            hi_sum1_1 = fma(vec4<f32>(d2), hi2_1, hi_sum1_1);
            hi_sum1_1 = fma(vec4<f32>(d3), hi3_1, hi_sum1_1);
            hi_sum1_1 = fma(vec4<f32>(d4), hi4_1, hi_sum1_1);
            hi_sum1_1 = fma(vec4<f32>(d5), hi5_1, hi_sum1_1);
            hi_sum1_1 = fma(vec4<f32>(d6), hi6_1, hi_sum1_1);
            hi_sum1_1 = fma(vec4<f32>(d7), hi7_1, hi_sum1_1);
        }
    }

    if (word_base + 0u + thread < p.words) {
        store4(row0, 2u * word0, lo_sum0_0);
        store4(row0, 2u * word0 + 1u, hi_sum0_0);
        store4(row1, 2u * word0, lo_sum1_0);
        store4(row1, 2u * word0 + 1u, hi_sum1_0);
    }
    if (word_base + 8u + thread < p.words) {
        store4(row0, 2u * word1, lo_sum0_1);
        store4(row0, 2u * word1 + 1u, hi_sum0_1);
        store4(row1, 2u * word1, lo_sum1_1);
        store4(row1, 2u * word1 + 1u, hi_sum1_1);
    }
}
