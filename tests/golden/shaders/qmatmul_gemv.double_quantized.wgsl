// qmatmul_gemv: kind=quant decoder=select scales=double mins=none wide chunked tokens=1 lanes=64 threads=128 rows=4

// Y = X * W^T + bias + s * H * B^T for few rows of X (at most 1): a matrix-vector
// product.
//
// Floor: bytes of W (K N / 2 and its scales) over the memory's bandwidth, or 2 M N K FLOP over the
// rate of f32, whichever is longer.
//
// 64 threads share 4 rows of W. Each decodes
// 32 weights of a row from one 16-byte load at a time
// and multiplies them with X, which is staged in workgroup memory once for all rows. The number of
// threads that share rows, and so the order of a result's sums, depends on the rows of X alone.

// Parameters, operands and result of every form of the fused product; `QmatmulParams` in
// src/kernels/qmatmul/call.rs.
struct Params {
    first_group: u32,
    groups: u32,
    k: u32,
    n: u32,             // rows of W in this part
    row: u32,           // first row of X
    rows: u32,          // rows of X from there on
    column: u32,        // column of Y for this part's first row of W
    y_stride: u32,      // columns of Y
    splits: u32,        // parts of the contracted index that are summed separately
    rank: u32,          // 0: no adapter
    bias_rows: u32,     // 0: no bias; 1: all rows of Y share it; else one for each row
    lora_scale: f32,
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
@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> w: array<u32>;
@group(0) @binding(2) var<storage, read> bias: array<f32>;
@group(0) @binding(3) var<storage, read> h: array<f32>;
@group(0) @binding(4) var<storage, read> b: array<f32>;

// Place of the bias for a row of Y and a column.
fn bias_at(row: u32, column: u32) -> u32 {
    return select(0u, row * p.y_stride, p.bias_rows > 1u) + column;
}

@group(0) @binding(5) var<storage, read> w4: array<vec4<u32>>; // W, bound again
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

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

// The codebook in workgroup memory. Sixteen words lie in sixteen banks, so lookups never collide.
var<workgroup> codebook: array<f32, 16>;

fn fill_codebook(thread: u32) {
    if (thread < 16u) {
        var value = 0.0f;
        value = select(value, 0.0052083335f, thread == 1u);
        value = select(value, 0.6666667f, thread == 2u);
        value = select(value, 1.0f, thread == 3u);
        value = select(value, 0.33333334f, thread == 4u);
        value = select(value, 0.5f, thread == 5u);
        value = select(value, 0.16666667f, thread == 6u);
        value = select(value, 0.25f, thread == 7u);
        value = select(value, 0.0f, thread == 8u);
        value = select(value, -0.0052083335f, thread == 9u);
        value = select(value, -0.6666667f, thread == 10u);
        value = select(value, -1.0f, thread == 11u);
        value = select(value, -0.33333334f, thread == 12u);
        value = select(value, -0.5f, thread == 13u);
        value = select(value, -0.16666667f, thread == 14u);
        value = select(value, -0.25f, thread == 15u);
        codebook[thread] = value;
    }
}

// Values of codes 0 to 3, the low half of a word.
fn decode_low(word: u32) -> vec4<f32> {
    return vec4<f32>(
        codebook[word & 15u],
        codebook[(word >> 4u) & 15u],
        codebook[(word >> 8u) & 15u],
        codebook[(word >> 12u) & 15u],
    );
}

// Values of codes 4 to 7.
fn decode_high(word: u32) -> vec4<f32> {
    return decode_low(word >> 16u);
}

// The block of weight [n, k].
fn block_of(n: u32, k: u32) -> u32 {
    return (n * p.k + k + p.m.first_weight) >> p.m.block_shift;
}

// The codes of w[n, 32c .. 32c + 32].
fn codes_of(n: u32, c: u32) -> vec4<u32> {
    return w4[n * (p.m.row_words >> 2u) + c];
}

// Eight weights of a word that lies within `block`.
fn decode_word(word: u32, block: u32) -> W8 {
    let scale = vec4<f32>(scale_of(block));
    var lo = decode_low(word) * scale;
    var hi = decode_high(word) * scale;
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
    return decode_low(word) * vec4<f32>(scale_of(block));
}

fn x4(row: u32, q: u32) -> vec4<f32> {
    return x[row * (p.k >> 2u) + q];
}

var<workgroup> x_tile: array<vec4<f32>, 576>;
// [row of W][row of X][thread]
var<workgroup> partial: array<f32, 512>;

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
    fill_codebook(thread);
    let lane = thread % 64u;
    let n_base = group * 8u + thread / 64u;
    // Rows past the end repeat the last one and are not stored.
    let n0 = min(n_base + 0u, p.n - 1u);
    var sum0_0 = 0.0;
    let n1 = min(n_base + 2u, p.n - 1u);
    var sum1_0 = 0.0;
    let n2 = min(n_base + 4u, p.n - 1u);
    var sum2_0 = 0.0;
    let n3 = min(n_base + 6u, p.n - 1u);
    var sum3_0 = 0.0;

    let quads = (p.k + 3u) >> 2u;
    let words = (p.k + 7u) >> 3u;
    for (var start = 0u; start < words; start = start + 256u) {
        // Loads of W run while X is staged. Past K the last weights are repeated, and X is zero.
        let chunk = min((start >> 2u) + lane, (words - 1u) >> 2u);
        var codes0 = codes_of(n0, chunk);
        let block0 = block_of(n0, 32u * chunk);
        let stored_scale0 = stored_scale(block0);
        var codes1 = codes_of(n1, chunk);
        let block1 = block_of(n1, 32u * chunk);
        let stored_scale1 = stored_scale(block1);
        var codes2 = codes_of(n2, chunk);
        let block2 = block_of(n2, 32u * chunk);
        let stored_scale2 = stored_scale(block2);
        var codes3 = codes_of(n3, chunk);
        let block3 = block_of(n3, 32u * chunk);
        let stored_scale3 = stored_scale(block3);
        workgroupBarrier();
        for (var turn = 0u; turn < 4u; turn = turn + 1u) {
            let i = thread + turn * 128u;
            let t = i / 512u;
            let local = i % 512u;
            let q = 2u * start + local;
            let values = x4(p.row + min(t, p.rows - 1u), min(q, quads - 1u));
            {
                let at = t * 576u + local + local / 8u;
                x_tile[at] = select(vec4<f32>(0.0), values, q < quads);
            }
        }
        workgroupBarrier();
        let scale0 = scale_from(stored_scale0);
        let scale1 = scale_from(stored_scale1);
        let scale2 = scale_from(stored_scale2);
        let scale3 = scale_from(stored_scale3);
        for (var word = 0u; word < 4u; word = word + 1u) {
            let lo0 = decode_low(codes0.x);
            let hi0 = decode_high(codes0.x);
            codes0 = codes0.yzwx;
            let lo1 = decode_low(codes1.x);
            let hi1 = decode_high(codes1.x);
            codes1 = codes1.yzwx;
            let lo2 = decode_low(codes2.x);
            let hi2 = decode_high(codes2.x);
            codes2 = codes2.yzwx;
            let lo3 = decode_low(codes3.x);
            let hi3 = decode_high(codes3.x);
            codes3 = codes3.yzwx;
            let at = 9u * lane + 2u * word;
            {
                let a = x_tile[0u + at];
                let b = x_tile[0u + at + 1u];
                var dot0 = a.x * lo0.x;
                dot0 = dot0 + a.y * lo0.y;
                dot0 = dot0 + a.z * lo0.z;
                dot0 = dot0 + a.w * lo0.w;
                dot0 = dot0 + b.x * hi0.x;
                dot0 = dot0 + b.y * hi0.y;
                dot0 = dot0 + b.z * hi0.z;
                dot0 = dot0 + b.w * hi0.w;
                sum0_0 = sum0_0 + dot0 * scale0;
                var dot1 = a.x * lo1.x;
                dot1 = dot1 + a.y * lo1.y;
                dot1 = dot1 + a.z * lo1.z;
                dot1 = dot1 + a.w * lo1.w;
                dot1 = dot1 + b.x * hi1.x;
                dot1 = dot1 + b.y * hi1.y;
                dot1 = dot1 + b.z * hi1.z;
                dot1 = dot1 + b.w * hi1.w;
                sum1_0 = sum1_0 + dot1 * scale1;
                var dot2 = a.x * lo2.x;
                dot2 = dot2 + a.y * lo2.y;
                dot2 = dot2 + a.z * lo2.z;
                dot2 = dot2 + a.w * lo2.w;
                dot2 = dot2 + b.x * hi2.x;
                dot2 = dot2 + b.y * hi2.y;
                dot2 = dot2 + b.z * hi2.z;
                dot2 = dot2 + b.w * hi2.w;
                sum2_0 = sum2_0 + dot2 * scale2;
                var dot3 = a.x * lo3.x;
                dot3 = dot3 + a.y * lo3.y;
                dot3 = dot3 + a.z * lo3.z;
                dot3 = dot3 + a.w * lo3.w;
                dot3 = dot3 + b.x * hi3.x;
                dot3 = dot3 + b.y * hi3.y;
                dot3 = dot3 + b.z * hi3.z;
                dot3 = dot3 + b.w * hi3.w;
                sum3_0 = sum3_0 + dot3 * scale3;
            }
        }
    }
    for (var j = lane; j < p.rank; j = j + 64u) {
        let h0 = h[(p.row + min(0u, p.rows - 1u)) * p.rank + j] * p.lora_scale;
        let b0 = b[(p.column + n0) * p.rank + j];
        sum0_0 = sum0_0 + h0 * b0;
        let b1 = b[(p.column + n1) * p.rank + j];
        sum1_0 = sum1_0 + h0 * b1;
        let b2 = b[(p.column + n2) * p.rank + j];
        sum2_0 = sum2_0 + h0 * b2;
        let b3 = b[(p.column + n3) * p.rank + j];
        sum3_0 = sum3_0 + h0 * b3;
    }

    // The threads' sums are added up, eight at a time and then the rest.
    workgroupBarrier();
    partial[0u + thread] = sum0_0;
    partial[128u + thread] = sum1_0;
    partial[256u + thread] = sum2_0;
    partial[384u + thread] = sum3_0;
    workgroupBarrier();
    finish(0u, 4u, group, thread);
}

// Adds up the sums in `partial` for `some` rows of each team, from row `first` on, and stores the
// results.
fn finish(first: u32, some: u32, group: u32, thread: u32) {
    let results = some * 2u;
    // Eight neighbours become one, in the place of the first.
    for (var i = thread; i < results * 8u; i = i + 128u) {
        var piece = 0.0;
        for (var e = 0u; e < 8u; e = e + 1u) {
            piece = piece + partial[8u * i + e];
        }
        partial[8u * i] = piece;
    }
    workgroupBarrier();
    for (var i = thread; i < results; i = i + 128u) {
        var result = 0.0;
        for (var e = 0u; e < 8u; e = e + 1u) {
            result = result + partial[64u * i + 8u * e];
        }
        let team = i % 2u;
        let t = i / 2u % 1u;
        let r = first + i / 2u;
        let n = group * 8u + r * 2u + team;
        if (n < p.n && t < p.rows) {
            if (p.bias_rows > 0u) {
                result = result + bias[bias_at(p.row + t, p.column + n)];
            }
            y[(p.row + t) * p.y_stride + p.column + n] = result;
        }
    }
}
