// qmatmul_tile: kind=quant decoder=select scales=plain mins=none wide chunked side=64 quads rank_quads

// Y = X * W^T + bias + s * H * B^T by register tiles of 64 rows of X by 64 rows of
// W. Tiles of X and W are staged in workgroup memory; W is decoded on the way. The adapter's rank
// is one more stretch of the same loop.
//
// Floor: 2 M N K FLOP over the rate of f32. X is read N / 64 times, W is read and decoded
// M / 64 times.

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
@group(0) @binding(2) var<storage, read> bias: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> h: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> b: array<vec4<f32>>;

// Place of the bias for a row of Y and a column.
fn bias_at(row: u32, column: u32) -> u32 {
    return select(0u, row * p.y_stride, p.bias_rows > 1u) + column;
}

// The power of two for each row of X. Only f16 staging uses it.
@group(0) @binding(5) var<storage, read> row_factor: array<f32>;
@group(0) @binding(6) var<storage, read> w4: array<vec4<u32>>; // W, bound again
@group(0) @binding(7) var<storage, read_write> y: array<vec4<f32>>;

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

alias StoredScale = f32;

fn stored_scale(block: u32) -> f32 {
    return word_as_f32(p.m.scales + block);
}

fn scale_from(stored: f32) -> f32 {
    return stored;
}

// The scale of a block, counted from the first block of this part of the matrix.
fn scale_of(block: u32) -> f32 {
    return scale_from(stored_scale(block));
}

// The codebook in workgroup memory. Sixteen words lie in sixteen banks, so lookups never collide.
var<workgroup> codebook: array<f32, 16>;

fn fill_codebook(thread: u32) {
    if (thread < 16u) {
        var value = -1.0f;
        value = select(value, -0.6961928f, thread == 1u);
        value = select(value, -0.52507305f, thread == 2u);
        value = select(value, -0.3949175f, thread == 3u);
        value = select(value, -0.28444138f, thread == 4u);
        value = select(value, -0.18477343f, thread == 5u);
        value = select(value, -0.091050036f, thread == 6u);
        value = select(value, 0.0f, thread == 7u);
        value = select(value, 0.0795803f, thread == 8u);
        value = select(value, 0.1609302f, thread == 9u);
        value = select(value, 0.2461123f, thread == 10u);
        value = select(value, 0.33791524f, thread == 11u);
        value = select(value, 0.44070983f, thread == 12u);
        value = select(value, 0.562617f, thread == 13u);
        value = select(value, 0.72295684f, thread == 14u);
        value = select(value, 1.0f, thread == 15u);
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

var<workgroup> x_tile: array<vec4<f32>, 320>;
var<workgroup> w_tile: array<vec4<f32>, 335>;

fn h4(row: u32, j: u32) -> vec4<f32> {
    let values = h[(row * p.rank + min(j, p.rank - 4u)) >> 2u];
    return select(vec4<f32>(0.0), values, j < p.rank);
}

fn b4(row: u32, j: u32) -> vec4<f32> {
    let values = b[(row * p.rank + min(j, p.rank - 4u)) >> 2u];
    return select(vec4<f32>(0.0), values, j < p.rank);
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
    fill_codebook(thread);
    let column_groups = (p.n + 63u) / 64u;
    let row_group = group / column_groups;
    let n_base = (group - row_group * column_groups) * 64u;
    let row_base = row_group * 64u;
    let tx = thread % 8u;
    let ty = thread / 8u;

    // This thread's share of staging: a quad of some rows of X, and words of one row of W. Rows
    // past the end repeat the last one.
    let x_quad = thread % 4u;
    let x_local = thread / 4u;
    let row0 = p.row + min(row_base + x_local + 0u, p.rows - 1u);
    let row1 = p.row + min(row_base + x_local + 16u, p.rows - 1u);
    let row2 = p.row + min(row_base + x_local + 32u, p.rows - 1u);
    let row3 = p.row + min(row_base + x_local + 48u, p.rows - 1u);
    let n_local = thread % 64u;
    let n = min(n_base + n_local, p.n - 1u);
    let w_part = thread / 64u * 2u;
    let w_at = (n_local % 4u * 17u + n_local / 4u) * 5u + 2u * w_part;
    var sum0_0 = vec4<f32>(0.0);
    var sum0_1 = vec4<f32>(0.0);
    var sum1_0 = vec4<f32>(0.0);
    var sum1_1 = vec4<f32>(0.0);
    var sum2_0 = vec4<f32>(0.0);
    var sum2_1 = vec4<f32>(0.0);
    var sum3_0 = vec4<f32>(0.0);
    var sum3_1 = vec4<f32>(0.0);
    var sum4_0 = vec4<f32>(0.0);
    var sum4_1 = vec4<f32>(0.0);
    var sum5_0 = vec4<f32>(0.0);
    var sum5_1 = vec4<f32>(0.0);
    var sum6_0 = vec4<f32>(0.0);
    var sum6_1 = vec4<f32>(0.0);
    var sum7_0 = vec4<f32>(0.0);
    var sum7_1 = vec4<f32>(0.0);

    let quads = (p.k + 3u) >> 2u;
    let words = (p.k + 7u) >> 3u;
    for (var start = 0u; start < quads; start = start + 4u) {
        // Starts loads before the barrier. Past K the last values are repeated, and X counts as
        // zero.
        let own0 = x4(row0, min(start + x_quad, quads - 1u));
        let own1 = x4(row1, min(start + x_quad, quads - 1u));
        let own2 = x4(row2, min(start + x_quad, quads - 1u));
        let own3 = x4(row3, min(start + x_quad, quads - 1u));
        let chunk = min(start >> 3u, (words - 1u) >> 2u);
        let codes = codes_of(n, chunk);
        let block = block_of(n, 32u * chunk);
        let scale = scale_of(block);
        workgroupBarrier();
        {
            let scaled = own0;
            let known = scaled;
            let at = (x_local + 0u) * 5u + x_quad;
            x_tile[at] = vec4<f32>(known);
        }
        {
            let scaled = own1;
            let known = scaled;
            let at = (x_local + 16u) * 5u + x_quad;
            x_tile[at] = vec4<f32>(known);
        }
        {
            let scaled = own2;
            let known = scaled;
            let at = (x_local + 32u) * 5u + x_quad;
            x_tile[at] = vec4<f32>(known);
        }
        {
            let scaled = own3;
            let known = scaled;
            let at = (x_local + 48u) * 5u + x_quad;
            x_tile[at] = vec4<f32>(known);
        }
        let pair = select(codes.xy, codes.zw, (start & 4u) != 0u);
        {
            let word = pair.x;
            w_tile[w_at + 0u] =
                vec4<f32>(decode_low(word) * scale);
            w_tile[w_at + 1u] =
                vec4<f32>(decode_high(word) * scale);
        }
        {
            let word = pair.y;
            w_tile[w_at + 2u] =
                vec4<f32>(decode_low(word) * scale);
            w_tile[w_at + 3u] =
                vec4<f32>(decode_high(word) * scale);
        }
        workgroupBarrier();
        for (var k = 0u; k < 4u; k = k + 1u) {
            let b00 =
                vec4<f32>(w_tile[(0u + tx) * 5u + k]);
            let b01 =
                vec4<f32>(w_tile[(17u + tx) * 5u + k]);
            let b02 =
                vec4<f32>(w_tile[(34u + tx) * 5u + k]);
            let b03 =
                vec4<f32>(w_tile[(51u + tx) * 5u + k]);
            let b10 =
                vec4<f32>(w_tile[(8u + tx) * 5u + k]);
            let b11 =
                vec4<f32>(w_tile[(25u + tx) * 5u + k]);
            let b12 =
                vec4<f32>(w_tile[(42u + tx) * 5u + k]);
            let b13 =
                vec4<f32>(w_tile[(59u + tx) * 5u + k]);
            {
                let a = vec4<f32>(x_tile[(0u + ty) * 5u + k]);
                sum0_0 = sum0_0 + a.x * vec4<f32>(
                    b00.x, b01.x, b02.x, b03.x,
                );
                sum0_1 = sum0_1 + a.x * vec4<f32>(
                    b10.x, b11.x, b12.x, b13.x,
                );
                sum0_0 = sum0_0 + a.y * vec4<f32>(
                    b00.y, b01.y, b02.y, b03.y,
                );
                sum0_1 = sum0_1 + a.y * vec4<f32>(
                    b10.y, b11.y, b12.y, b13.y,
                );
                sum0_0 = sum0_0 + a.z * vec4<f32>(
                    b00.z, b01.z, b02.z, b03.z,
                );
                sum0_1 = sum0_1 + a.z * vec4<f32>(
                    b10.z, b11.z, b12.z, b13.z,
                );
                sum0_0 = sum0_0 + a.w * vec4<f32>(
                    b00.w, b01.w, b02.w, b03.w,
                );
                sum0_1 = sum0_1 + a.w * vec4<f32>(
                    b10.w, b11.w, b12.w, b13.w,
                );
            }
            {
                let a = vec4<f32>(x_tile[(8u + ty) * 5u + k]);
                sum1_0 = sum1_0 + a.x * vec4<f32>(
                    b00.x, b01.x, b02.x, b03.x,
                );
                sum1_1 = sum1_1 + a.x * vec4<f32>(
                    b10.x, b11.x, b12.x, b13.x,
                );
                sum1_0 = sum1_0 + a.y * vec4<f32>(
                    b00.y, b01.y, b02.y, b03.y,
                );
                sum1_1 = sum1_1 + a.y * vec4<f32>(
                    b10.y, b11.y, b12.y, b13.y,
                );
                sum1_0 = sum1_0 + a.z * vec4<f32>(
                    b00.z, b01.z, b02.z, b03.z,
                );
                sum1_1 = sum1_1 + a.z * vec4<f32>(
                    b10.z, b11.z, b12.z, b13.z,
                );
                sum1_0 = sum1_0 + a.w * vec4<f32>(
                    b00.w, b01.w, b02.w, b03.w,
                );
                sum1_1 = sum1_1 + a.w * vec4<f32>(
                    b10.w, b11.w, b12.w, b13.w,
                );
            }
            {
                let a = vec4<f32>(x_tile[(16u + ty) * 5u + k]);
                sum2_0 = sum2_0 + a.x * vec4<f32>(
                    b00.x, b01.x, b02.x, b03.x,
                );
                sum2_1 = sum2_1 + a.x * vec4<f32>(
                    b10.x, b11.x, b12.x, b13.x,
                );
                sum2_0 = sum2_0 + a.y * vec4<f32>(
                    b00.y, b01.y, b02.y, b03.y,
                );
                sum2_1 = sum2_1 + a.y * vec4<f32>(
                    b10.y, b11.y, b12.y, b13.y,
                );
                sum2_0 = sum2_0 + a.z * vec4<f32>(
                    b00.z, b01.z, b02.z, b03.z,
                );
                sum2_1 = sum2_1 + a.z * vec4<f32>(
                    b10.z, b11.z, b12.z, b13.z,
                );
                sum2_0 = sum2_0 + a.w * vec4<f32>(
                    b00.w, b01.w, b02.w, b03.w,
                );
                sum2_1 = sum2_1 + a.w * vec4<f32>(
                    b10.w, b11.w, b12.w, b13.w,
                );
            }
            {
                let a = vec4<f32>(x_tile[(24u + ty) * 5u + k]);
                sum3_0 = sum3_0 + a.x * vec4<f32>(
                    b00.x, b01.x, b02.x, b03.x,
                );
                sum3_1 = sum3_1 + a.x * vec4<f32>(
                    b10.x, b11.x, b12.x, b13.x,
                );
                sum3_0 = sum3_0 + a.y * vec4<f32>(
                    b00.y, b01.y, b02.y, b03.y,
                );
                sum3_1 = sum3_1 + a.y * vec4<f32>(
                    b10.y, b11.y, b12.y, b13.y,
                );
                sum3_0 = sum3_0 + a.z * vec4<f32>(
                    b00.z, b01.z, b02.z, b03.z,
                );
                sum3_1 = sum3_1 + a.z * vec4<f32>(
                    b10.z, b11.z, b12.z, b13.z,
                );
                sum3_0 = sum3_0 + a.w * vec4<f32>(
                    b00.w, b01.w, b02.w, b03.w,
                );
                sum3_1 = sum3_1 + a.w * vec4<f32>(
                    b10.w, b11.w, b12.w, b13.w,
                );
            }
            {
                let a = vec4<f32>(x_tile[(32u + ty) * 5u + k]);
                sum4_0 = sum4_0 + a.x * vec4<f32>(
                    b00.x, b01.x, b02.x, b03.x,
                );
                sum4_1 = sum4_1 + a.x * vec4<f32>(
                    b10.x, b11.x, b12.x, b13.x,
                );
                sum4_0 = sum4_0 + a.y * vec4<f32>(
                    b00.y, b01.y, b02.y, b03.y,
                );
                sum4_1 = sum4_1 + a.y * vec4<f32>(
                    b10.y, b11.y, b12.y, b13.y,
                );
                sum4_0 = sum4_0 + a.z * vec4<f32>(
                    b00.z, b01.z, b02.z, b03.z,
                );
                sum4_1 = sum4_1 + a.z * vec4<f32>(
                    b10.z, b11.z, b12.z, b13.z,
                );
                sum4_0 = sum4_0 + a.w * vec4<f32>(
                    b00.w, b01.w, b02.w, b03.w,
                );
                sum4_1 = sum4_1 + a.w * vec4<f32>(
                    b10.w, b11.w, b12.w, b13.w,
                );
            }
            {
                let a = vec4<f32>(x_tile[(40u + ty) * 5u + k]);
                sum5_0 = sum5_0 + a.x * vec4<f32>(
                    b00.x, b01.x, b02.x, b03.x,
                );
                sum5_1 = sum5_1 + a.x * vec4<f32>(
                    b10.x, b11.x, b12.x, b13.x,
                );
                sum5_0 = sum5_0 + a.y * vec4<f32>(
                    b00.y, b01.y, b02.y, b03.y,
                );
                sum5_1 = sum5_1 + a.y * vec4<f32>(
                    b10.y, b11.y, b12.y, b13.y,
                );
                sum5_0 = sum5_0 + a.z * vec4<f32>(
                    b00.z, b01.z, b02.z, b03.z,
                );
                sum5_1 = sum5_1 + a.z * vec4<f32>(
                    b10.z, b11.z, b12.z, b13.z,
                );
                sum5_0 = sum5_0 + a.w * vec4<f32>(
                    b00.w, b01.w, b02.w, b03.w,
                );
                sum5_1 = sum5_1 + a.w * vec4<f32>(
                    b10.w, b11.w, b12.w, b13.w,
                );
            }
            {
                let a = vec4<f32>(x_tile[(48u + ty) * 5u + k]);
                sum6_0 = sum6_0 + a.x * vec4<f32>(
                    b00.x, b01.x, b02.x, b03.x,
                );
                sum6_1 = sum6_1 + a.x * vec4<f32>(
                    b10.x, b11.x, b12.x, b13.x,
                );
                sum6_0 = sum6_0 + a.y * vec4<f32>(
                    b00.y, b01.y, b02.y, b03.y,
                );
                sum6_1 = sum6_1 + a.y * vec4<f32>(
                    b10.y, b11.y, b12.y, b13.y,
                );
                sum6_0 = sum6_0 + a.z * vec4<f32>(
                    b00.z, b01.z, b02.z, b03.z,
                );
                sum6_1 = sum6_1 + a.z * vec4<f32>(
                    b10.z, b11.z, b12.z, b13.z,
                );
                sum6_0 = sum6_0 + a.w * vec4<f32>(
                    b00.w, b01.w, b02.w, b03.w,
                );
                sum6_1 = sum6_1 + a.w * vec4<f32>(
                    b10.w, b11.w, b12.w, b13.w,
                );
            }
            {
                let a = vec4<f32>(x_tile[(56u + ty) * 5u + k]);
                sum7_0 = sum7_0 + a.x * vec4<f32>(
                    b00.x, b01.x, b02.x, b03.x,
                );
                sum7_1 = sum7_1 + a.x * vec4<f32>(
                    b10.x, b11.x, b12.x, b13.x,
                );
                sum7_0 = sum7_0 + a.y * vec4<f32>(
                    b00.y, b01.y, b02.y, b03.y,
                );
                sum7_1 = sum7_1 + a.y * vec4<f32>(
                    b10.y, b11.y, b12.y, b13.y,
                );
                sum7_0 = sum7_0 + a.z * vec4<f32>(
                    b00.z, b01.z, b02.z, b03.z,
                );
                sum7_1 = sum7_1 + a.z * vec4<f32>(
                    b10.z, b11.z, b12.z, b13.z,
                );
                sum7_0 = sum7_0 + a.w * vec4<f32>(
                    b00.w, b01.w, b02.w, b03.w,
                );
                sum7_1 = sum7_1 + a.w * vec4<f32>(
                    b10.w, b11.w, b12.w, b13.w,
                );
            }
        }
    }

    let h_quad = thread % 4u;
    let h_local = thread / 4u;
    for (var start = 0u; start < p.rank; start = start + 16u) {
        workgroupBarrier();
        let j = start + 4u * h_quad;
        {
            let row = p.row + min(row_base + h_local + 0u, p.rows - 1u);
            x_tile[(h_local + 0u) * 5u + h_quad] =
                h4(row, j);
            let column = h_local + 0u;
            let of_column = p.column + min(n_base + column, p.n - 1u);
            w_tile[(column % 4u * 17u + column / 4u) * 5u + h_quad] =
                b4(of_column, j) * p.lora_scale;
        }
        {
            let row = p.row + min(row_base + h_local + 16u, p.rows - 1u);
            x_tile[(h_local + 16u) * 5u + h_quad] =
                h4(row, j);
            let column = h_local + 16u;
            let of_column = p.column + min(n_base + column, p.n - 1u);
            w_tile[(column % 4u * 17u + column / 4u) * 5u + h_quad] =
                b4(of_column, j) * p.lora_scale;
        }
        {
            let row = p.row + min(row_base + h_local + 32u, p.rows - 1u);
            x_tile[(h_local + 32u) * 5u + h_quad] =
                h4(row, j);
            let column = h_local + 32u;
            let of_column = p.column + min(n_base + column, p.n - 1u);
            w_tile[(column % 4u * 17u + column / 4u) * 5u + h_quad] =
                b4(of_column, j) * p.lora_scale;
        }
        {
            let row = p.row + min(row_base + h_local + 48u, p.rows - 1u);
            x_tile[(h_local + 48u) * 5u + h_quad] =
                h4(row, j);
            let column = h_local + 48u;
            let of_column = p.column + min(n_base + column, p.n - 1u);
            w_tile[(column % 4u * 17u + column / 4u) * 5u + h_quad] =
                b4(of_column, j) * p.lora_scale;
        }
        workgroupBarrier();
        for (var k = 0u; k < 4u; k = k + 1u) {
            let b00 =
                vec4<f32>(w_tile[(0u + tx) * 5u + k]);
            let b01 =
                vec4<f32>(w_tile[(17u + tx) * 5u + k]);
            let b02 =
                vec4<f32>(w_tile[(34u + tx) * 5u + k]);
            let b03 =
                vec4<f32>(w_tile[(51u + tx) * 5u + k]);
            let b10 =
                vec4<f32>(w_tile[(8u + tx) * 5u + k]);
            let b11 =
                vec4<f32>(w_tile[(25u + tx) * 5u + k]);
            let b12 =
                vec4<f32>(w_tile[(42u + tx) * 5u + k]);
            let b13 =
                vec4<f32>(w_tile[(59u + tx) * 5u + k]);
            {
                let a = vec4<f32>(x_tile[(0u + ty) * 5u + k]);
                sum0_0 = sum0_0 + a.x * vec4<f32>(
                    b00.x, b01.x, b02.x, b03.x,
                );
                sum0_1 = sum0_1 + a.x * vec4<f32>(
                    b10.x, b11.x, b12.x, b13.x,
                );
                sum0_0 = sum0_0 + a.y * vec4<f32>(
                    b00.y, b01.y, b02.y, b03.y,
                );
                sum0_1 = sum0_1 + a.y * vec4<f32>(
                    b10.y, b11.y, b12.y, b13.y,
                );
                sum0_0 = sum0_0 + a.z * vec4<f32>(
                    b00.z, b01.z, b02.z, b03.z,
                );
                sum0_1 = sum0_1 + a.z * vec4<f32>(
                    b10.z, b11.z, b12.z, b13.z,
                );
                sum0_0 = sum0_0 + a.w * vec4<f32>(
                    b00.w, b01.w, b02.w, b03.w,
                );
                sum0_1 = sum0_1 + a.w * vec4<f32>(
                    b10.w, b11.w, b12.w, b13.w,
                );
            }
            {
                let a = vec4<f32>(x_tile[(8u + ty) * 5u + k]);
                sum1_0 = sum1_0 + a.x * vec4<f32>(
                    b00.x, b01.x, b02.x, b03.x,
                );
                sum1_1 = sum1_1 + a.x * vec4<f32>(
                    b10.x, b11.x, b12.x, b13.x,
                );
                sum1_0 = sum1_0 + a.y * vec4<f32>(
                    b00.y, b01.y, b02.y, b03.y,
                );
                sum1_1 = sum1_1 + a.y * vec4<f32>(
                    b10.y, b11.y, b12.y, b13.y,
                );
                sum1_0 = sum1_0 + a.z * vec4<f32>(
                    b00.z, b01.z, b02.z, b03.z,
                );
                sum1_1 = sum1_1 + a.z * vec4<f32>(
                    b10.z, b11.z, b12.z, b13.z,
                );
                sum1_0 = sum1_0 + a.w * vec4<f32>(
                    b00.w, b01.w, b02.w, b03.w,
                );
                sum1_1 = sum1_1 + a.w * vec4<f32>(
                    b10.w, b11.w, b12.w, b13.w,
                );
            }
            {
                let a = vec4<f32>(x_tile[(16u + ty) * 5u + k]);
                sum2_0 = sum2_0 + a.x * vec4<f32>(
                    b00.x, b01.x, b02.x, b03.x,
                );
                sum2_1 = sum2_1 + a.x * vec4<f32>(
                    b10.x, b11.x, b12.x, b13.x,
                );
                sum2_0 = sum2_0 + a.y * vec4<f32>(
                    b00.y, b01.y, b02.y, b03.y,
                );
                sum2_1 = sum2_1 + a.y * vec4<f32>(
                    b10.y, b11.y, b12.y, b13.y,
                );
                sum2_0 = sum2_0 + a.z * vec4<f32>(
                    b00.z, b01.z, b02.z, b03.z,
                );
                sum2_1 = sum2_1 + a.z * vec4<f32>(
                    b10.z, b11.z, b12.z, b13.z,
                );
                sum2_0 = sum2_0 + a.w * vec4<f32>(
                    b00.w, b01.w, b02.w, b03.w,
                );
                sum2_1 = sum2_1 + a.w * vec4<f32>(
                    b10.w, b11.w, b12.w, b13.w,
                );
            }
            {
                let a = vec4<f32>(x_tile[(24u + ty) * 5u + k]);
                sum3_0 = sum3_0 + a.x * vec4<f32>(
                    b00.x, b01.x, b02.x, b03.x,
                );
                sum3_1 = sum3_1 + a.x * vec4<f32>(
                    b10.x, b11.x, b12.x, b13.x,
                );
                sum3_0 = sum3_0 + a.y * vec4<f32>(
                    b00.y, b01.y, b02.y, b03.y,
                );
                sum3_1 = sum3_1 + a.y * vec4<f32>(
                    b10.y, b11.y, b12.y, b13.y,
                );
                sum3_0 = sum3_0 + a.z * vec4<f32>(
                    b00.z, b01.z, b02.z, b03.z,
                );
                sum3_1 = sum3_1 + a.z * vec4<f32>(
                    b10.z, b11.z, b12.z, b13.z,
                );
                sum3_0 = sum3_0 + a.w * vec4<f32>(
                    b00.w, b01.w, b02.w, b03.w,
                );
                sum3_1 = sum3_1 + a.w * vec4<f32>(
                    b10.w, b11.w, b12.w, b13.w,
                );
            }
            {
                let a = vec4<f32>(x_tile[(32u + ty) * 5u + k]);
                sum4_0 = sum4_0 + a.x * vec4<f32>(
                    b00.x, b01.x, b02.x, b03.x,
                );
                sum4_1 = sum4_1 + a.x * vec4<f32>(
                    b10.x, b11.x, b12.x, b13.x,
                );
                sum4_0 = sum4_0 + a.y * vec4<f32>(
                    b00.y, b01.y, b02.y, b03.y,
                );
                sum4_1 = sum4_1 + a.y * vec4<f32>(
                    b10.y, b11.y, b12.y, b13.y,
                );
                sum4_0 = sum4_0 + a.z * vec4<f32>(
                    b00.z, b01.z, b02.z, b03.z,
                );
                sum4_1 = sum4_1 + a.z * vec4<f32>(
                    b10.z, b11.z, b12.z, b13.z,
                );
                sum4_0 = sum4_0 + a.w * vec4<f32>(
                    b00.w, b01.w, b02.w, b03.w,
                );
                sum4_1 = sum4_1 + a.w * vec4<f32>(
                    b10.w, b11.w, b12.w, b13.w,
                );
            }
            {
                let a = vec4<f32>(x_tile[(40u + ty) * 5u + k]);
                sum5_0 = sum5_0 + a.x * vec4<f32>(
                    b00.x, b01.x, b02.x, b03.x,
                );
                sum5_1 = sum5_1 + a.x * vec4<f32>(
                    b10.x, b11.x, b12.x, b13.x,
                );
                sum5_0 = sum5_0 + a.y * vec4<f32>(
                    b00.y, b01.y, b02.y, b03.y,
                );
                sum5_1 = sum5_1 + a.y * vec4<f32>(
                    b10.y, b11.y, b12.y, b13.y,
                );
                sum5_0 = sum5_0 + a.z * vec4<f32>(
                    b00.z, b01.z, b02.z, b03.z,
                );
                sum5_1 = sum5_1 + a.z * vec4<f32>(
                    b10.z, b11.z, b12.z, b13.z,
                );
                sum5_0 = sum5_0 + a.w * vec4<f32>(
                    b00.w, b01.w, b02.w, b03.w,
                );
                sum5_1 = sum5_1 + a.w * vec4<f32>(
                    b10.w, b11.w, b12.w, b13.w,
                );
            }
            {
                let a = vec4<f32>(x_tile[(48u + ty) * 5u + k]);
                sum6_0 = sum6_0 + a.x * vec4<f32>(
                    b00.x, b01.x, b02.x, b03.x,
                );
                sum6_1 = sum6_1 + a.x * vec4<f32>(
                    b10.x, b11.x, b12.x, b13.x,
                );
                sum6_0 = sum6_0 + a.y * vec4<f32>(
                    b00.y, b01.y, b02.y, b03.y,
                );
                sum6_1 = sum6_1 + a.y * vec4<f32>(
                    b10.y, b11.y, b12.y, b13.y,
                );
                sum6_0 = sum6_0 + a.z * vec4<f32>(
                    b00.z, b01.z, b02.z, b03.z,
                );
                sum6_1 = sum6_1 + a.z * vec4<f32>(
                    b10.z, b11.z, b12.z, b13.z,
                );
                sum6_0 = sum6_0 + a.w * vec4<f32>(
                    b00.w, b01.w, b02.w, b03.w,
                );
                sum6_1 = sum6_1 + a.w * vec4<f32>(
                    b10.w, b11.w, b12.w, b13.w,
                );
            }
            {
                let a = vec4<f32>(x_tile[(56u + ty) * 5u + k]);
                sum7_0 = sum7_0 + a.x * vec4<f32>(
                    b00.x, b01.x, b02.x, b03.x,
                );
                sum7_1 = sum7_1 + a.x * vec4<f32>(
                    b10.x, b11.x, b12.x, b13.x,
                );
                sum7_0 = sum7_0 + a.y * vec4<f32>(
                    b00.y, b01.y, b02.y, b03.y,
                );
                sum7_1 = sum7_1 + a.y * vec4<f32>(
                    b10.y, b11.y, b12.y, b13.y,
                );
                sum7_0 = sum7_0 + a.z * vec4<f32>(
                    b00.z, b01.z, b02.z, b03.z,
                );
                sum7_1 = sum7_1 + a.z * vec4<f32>(
                    b10.z, b11.z, b12.z, b13.z,
                );
                sum7_0 = sum7_0 + a.w * vec4<f32>(
                    b00.w, b01.w, b02.w, b03.w,
                );
                sum7_1 = sum7_1 + a.w * vec4<f32>(
                    b10.w, b11.w, b12.w, b13.w,
                );
            }
        }
    }

    {
        let column = n_base + 0u + 4u * tx;
        {
            let row = row_base + 0u + ty;
            var value = sum0_0;
            let at = (p.row + row) * p.y_stride + p.column + column;
            if (row < p.rows) {
                if (p.bias_rows > 0u) {
                    let first = bias_at(p.row + row, p.column + min(column, p.n - 4u));
                    value = value + bias[first >> 2u];
                }
                if (column < p.n) { y[at >> 2u] = value; }
            }
        }
        {
            let row = row_base + 8u + ty;
            var value = sum1_0;
            let at = (p.row + row) * p.y_stride + p.column + column;
            if (row < p.rows) {
                if (p.bias_rows > 0u) {
                    let first = bias_at(p.row + row, p.column + min(column, p.n - 4u));
                    value = value + bias[first >> 2u];
                }
                if (column < p.n) { y[at >> 2u] = value; }
            }
        }
        {
            let row = row_base + 16u + ty;
            var value = sum2_0;
            let at = (p.row + row) * p.y_stride + p.column + column;
            if (row < p.rows) {
                if (p.bias_rows > 0u) {
                    let first = bias_at(p.row + row, p.column + min(column, p.n - 4u));
                    value = value + bias[first >> 2u];
                }
                if (column < p.n) { y[at >> 2u] = value; }
            }
        }
        {
            let row = row_base + 24u + ty;
            var value = sum3_0;
            let at = (p.row + row) * p.y_stride + p.column + column;
            if (row < p.rows) {
                if (p.bias_rows > 0u) {
                    let first = bias_at(p.row + row, p.column + min(column, p.n - 4u));
                    value = value + bias[first >> 2u];
                }
                if (column < p.n) { y[at >> 2u] = value; }
            }
        }
        {
            let row = row_base + 32u + ty;
            var value = sum4_0;
            let at = (p.row + row) * p.y_stride + p.column + column;
            if (row < p.rows) {
                if (p.bias_rows > 0u) {
                    let first = bias_at(p.row + row, p.column + min(column, p.n - 4u));
                    value = value + bias[first >> 2u];
                }
                if (column < p.n) { y[at >> 2u] = value; }
            }
        }
        {
            let row = row_base + 40u + ty;
            var value = sum5_0;
            let at = (p.row + row) * p.y_stride + p.column + column;
            if (row < p.rows) {
                if (p.bias_rows > 0u) {
                    let first = bias_at(p.row + row, p.column + min(column, p.n - 4u));
                    value = value + bias[first >> 2u];
                }
                if (column < p.n) { y[at >> 2u] = value; }
            }
        }
        {
            let row = row_base + 48u + ty;
            var value = sum6_0;
            let at = (p.row + row) * p.y_stride + p.column + column;
            if (row < p.rows) {
                if (p.bias_rows > 0u) {
                    let first = bias_at(p.row + row, p.column + min(column, p.n - 4u));
                    value = value + bias[first >> 2u];
                }
                if (column < p.n) { y[at >> 2u] = value; }
            }
        }
        {
            let row = row_base + 56u + ty;
            var value = sum7_0;
            let at = (p.row + row) * p.y_stride + p.column + column;
            if (row < p.rows) {
                if (p.bias_rows > 0u) {
                    let first = bias_at(p.row + row, p.column + min(column, p.n - 4u));
                    value = value + bias[first >> 2u];
                }
                if (column < p.n) { y[at >> 2u] = value; }
            }
        }
    }
    {
        let column = n_base + 32u + 4u * tx;
        {
            let row = row_base + 0u + ty;
            var value = sum0_1;
            let at = (p.row + row) * p.y_stride + p.column + column;
            if (row < p.rows) {
                if (p.bias_rows > 0u) {
                    let first = bias_at(p.row + row, p.column + min(column, p.n - 4u));
                    value = value + bias[first >> 2u];
                }
                if (column < p.n) { y[at >> 2u] = value; }
            }
        }
        {
            let row = row_base + 8u + ty;
            var value = sum1_1;
            let at = (p.row + row) * p.y_stride + p.column + column;
            if (row < p.rows) {
                if (p.bias_rows > 0u) {
                    let first = bias_at(p.row + row, p.column + min(column, p.n - 4u));
                    value = value + bias[first >> 2u];
                }
                if (column < p.n) { y[at >> 2u] = value; }
            }
        }
        {
            let row = row_base + 16u + ty;
            var value = sum2_1;
            let at = (p.row + row) * p.y_stride + p.column + column;
            if (row < p.rows) {
                if (p.bias_rows > 0u) {
                    let first = bias_at(p.row + row, p.column + min(column, p.n - 4u));
                    value = value + bias[first >> 2u];
                }
                if (column < p.n) { y[at >> 2u] = value; }
            }
        }
        {
            let row = row_base + 24u + ty;
            var value = sum3_1;
            let at = (p.row + row) * p.y_stride + p.column + column;
            if (row < p.rows) {
                if (p.bias_rows > 0u) {
                    let first = bias_at(p.row + row, p.column + min(column, p.n - 4u));
                    value = value + bias[first >> 2u];
                }
                if (column < p.n) { y[at >> 2u] = value; }
            }
        }
        {
            let row = row_base + 32u + ty;
            var value = sum4_1;
            let at = (p.row + row) * p.y_stride + p.column + column;
            if (row < p.rows) {
                if (p.bias_rows > 0u) {
                    let first = bias_at(p.row + row, p.column + min(column, p.n - 4u));
                    value = value + bias[first >> 2u];
                }
                if (column < p.n) { y[at >> 2u] = value; }
            }
        }
        {
            let row = row_base + 40u + ty;
            var value = sum5_1;
            let at = (p.row + row) * p.y_stride + p.column + column;
            if (row < p.rows) {
                if (p.bias_rows > 0u) {
                    let first = bias_at(p.row + row, p.column + min(column, p.n - 4u));
                    value = value + bias[first >> 2u];
                }
                if (column < p.n) { y[at >> 2u] = value; }
            }
        }
        {
            let row = row_base + 48u + ty;
            var value = sum6_1;
            let at = (p.row + row) * p.y_stride + p.column + column;
            if (row < p.rows) {
                if (p.bias_rows > 0u) {
                    let first = bias_at(p.row + row, p.column + min(column, p.n - 4u));
                    value = value + bias[first >> 2u];
                }
                if (column < p.n) { y[at >> 2u] = value; }
            }
        }
        {
            let row = row_base + 56u + ty;
            var value = sum7_1;
            let at = (p.row + row) * p.y_stride + p.column + column;
            if (row < p.rows) {
                if (p.bias_rows > 0u) {
                    let first = bias_at(p.row + row, p.column + min(column, p.n - 4u));
                    value = value + bias[first >> 2u];
                }
                if (column < p.n) { y[at >> 2u] = value; }
            }
        }
    }
}
