// qmatmul_coop: kind=quant decoder=select scales=plain mins=none wide chunked edge=16 lanes=32 vectors tile_rows=64 tile_columns=64 subgroups=4 double quads rank_quads

enable f16;
enable wgpu_cooperative_matrix;
// Y = X * W^T + bias + s * H * B^T by cooperative matrices, 64 rows of X by
// 64 rows of W per workgroup. Tiles of X and W are staged in workgroup memory as
// f16. W is decoded on the way and multiplied by `m.factor`; X arrives as f16, its rows multiplied
// by powers of two. Both are undone at the end.
//
// Floor: 2 M N K FLOP over the rate of f16 matrices. X is read N / 64 times, W is
// read and decoded M / 64 times.
//
// With `splits`, separate workgroups sum parts of K, as [split][row][column], and column_sum adds
// these up.
//
// The adapter's part is f32: it is small beside the rest, and its values may be much smaller or
// larger.

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
@group(0) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> w: array<u32>;
@group(0) @binding(2) var<storage, read> bias: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> h: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> b: array<vec4<f32>>;

// Place of the bias for a row of Y and a column.
fn bias_at(row: u32, column: u32) -> u32 {
    return select(0u, row * p.y_stride, p.bias_rows > 1u) + column;
}

@group(0) @binding(5) var<storage, read> row_factor: array<f32>; // of X, a power of two per row
@group(0) @binding(6) var<storage, read> w4: array<vec4<u32>>;   // W, bound again
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

var<workgroup> left_tile0: array<vec4<f16>, 638>;
var<workgroup> right_tile0: array<vec4<f16>, 638>;
var<workgroup> left_tile1: array<vec4<f16>, 638>;
var<workgroup> right_tile1: array<vec4<f16>, 638>;
// A strip of results for each subgroup.
var<workgroup> sums: array<vec4<f32>, 512>;

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
            y[0] = vec4<f32>(f32(subgroup_size));
        }
        return;
    }
    fill_codebook(thread);
    let row_groups = (p.rows + 63u) / 64u;
    let column_groups = (p.n + 63u) / 64u;
    let all_rows = group / column_groups;
    let column_base = (group - all_rows * column_groups) * 64u;
    let split = all_rows / row_groups;
    let row_base = (all_rows - split * row_groups) * 64u;
    let pairs = (p.k + 63u) / 64u;
    let each = (pairs + p.splits - 1u) / p.splits * 8u;
    let first = split * each;
    let end = min(first + each, (p.k + 7u) >> 3u);
    let piece_row = subgroup / 2u * 32u;
    let piece_column = subgroup % 2u * 32u;
    let left_begin = piece_row * 10u;
    let right_begin = piece_column * 10u;
    var sum0_0 = coop_mat16x16<f32, C>();
    var sum0_1 = coop_mat16x16<f32, C>();
    var sum1_0 = coop_mat16x16<f32, C>();
    var sum1_1 = coop_mat16x16<f32, C>();

    // This thread's share of staging. Rows past the end repeat the last one.
    let x_octs = ((p.k + 63u) / 64u * 8u);
    let words = (p.k + 7u) >> 3u;
    let x_oct = thread % 4u;
    let x_local = thread / 4u;
    let x_local0 = row_base + x_local + 0u;
    let x_row0 = (p.row + min(x_local0, p.rows - 1u)) * x_octs;
    let x_local1 = row_base + x_local + 32u;
    let x_row1 = (p.row + min(x_local1, p.rows - 1u)) * x_octs;
    let w_local = thread / 2u;
    let w_part = thread % 2u * 2u;
    let n0 = min(column_base + w_local + 0u, p.n - 1u);
    var left0_0: vec4<u32>;
    var left0_1: vec4<u32>;
    var codes0_0: vec4<u32>;
    var scale0_0: StoredScale;
    var left1_0: vec4<u32>;
    var left1_1: vec4<u32>;
    var codes1_0: vec4<u32>;
    var scale1_0: StoredScale;
    {
        let start = first + 0u;
        let oct = min(start + x_oct, x_octs - 1u);
        left0_0 = x[x_row0 + oct];
        left0_1 = x[x_row1 + oct];
        let chunk = min(start, words - 1u) >> 2u;
        codes0_0 = codes_of(n0, chunk);
        let block0 = block_of(n0, 32u * chunk);
        scale0_0 = stored_scale(block0);
    }
    {
        let start = first + 4u;
        let oct = min(start + x_oct, x_octs - 1u);
        left1_0 = x[x_row0 + oct];
        left1_1 = x[x_row1 + oct];
        let chunk = min(start, words - 1u) >> 2u;
        codes1_0 = codes_of(n0, chunk);
        let block0 = block_of(n0, 32u * chunk);
        scale1_0 = stored_scale(block0);
    }
    workgroupBarrier();
    {
        let words = left0_0;
        let lo = vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
        let hi = vec4<f32>(unpack2x16float(words.z), unpack2x16float(words.w));
        {
            let row = x_local + 0u;
            let oct = x_oct;
            let at = row * 10u + 2u * oct;
            left_tile0[at] = vec4<f16>(lo);
            left_tile0[at + 1u] = vec4<f16>(hi);
        }
    }
    {
        let words = left0_1;
        let lo = vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
        let hi = vec4<f32>(unpack2x16float(words.z), unpack2x16float(words.w));
        {
            let row = x_local + 32u;
            let oct = x_oct;
            let at = row * 10u + 2u * oct;
            left_tile0[at] = vec4<f16>(lo);
            left_tile0[at + 1u] = vec4<f16>(hi);
        }
    }
    {
        let scale = scale_from(scale0_0) * p.m.factor;
        {
            let word = select(codes0_0.x, codes0_0.z, w_part != 0u);
            let lo = decode_low(word) * scale;
            let hi = decode_high(word) * scale;
            {
                let row = w_local + 0u;
                let oct = w_part + 0u;
                let at = row * 10u + 2u * oct;
                right_tile0[at] = vec4<f16>(lo);
                right_tile0[at + 1u] = vec4<f16>(hi);
            }
        }
        {
            let word = select(codes0_0.y, codes0_0.w, w_part != 0u);
            let lo = decode_low(word) * scale;
            let hi = decode_high(word) * scale;
            {
                let row = w_local + 0u;
                let oct = w_part + 1u;
                let at = row * 10u + 2u * oct;
                right_tile0[at] = vec4<f16>(lo);
                right_tile0[at + 1u] = vec4<f16>(hi);
            }
        }
    }

    for (var start = first; start < end; start = start + 8u) {
        workgroupBarrier();
        {
            let start = start + 8u;
            let oct = min(start + x_oct, x_octs - 1u);
            left0_0 = x[x_row0 + oct];
            left0_1 = x[x_row1 + oct];
            let chunk = min(start, words - 1u) >> 2u;
            codes0_0 = codes_of(n0, chunk);
            let block0 = block_of(n0, 32u * chunk);
            scale0_0 = stored_scale(block0);
        }
        {
            let words = left1_0;
            let lo = vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
            let hi = vec4<f32>(unpack2x16float(words.z), unpack2x16float(words.w));
            {
                let row = x_local + 0u;
                let oct = x_oct;
                let at = row * 10u + 2u * oct;
                left_tile1[at] = vec4<f16>(lo);
                left_tile1[at + 1u] = vec4<f16>(hi);
            }
        }
        {
            let words = left1_1;
            let lo = vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
            let hi = vec4<f32>(unpack2x16float(words.z), unpack2x16float(words.w));
            {
                let row = x_local + 32u;
                let oct = x_oct;
                let at = row * 10u + 2u * oct;
                left_tile1[at] = vec4<f16>(lo);
                left_tile1[at + 1u] = vec4<f16>(hi);
            }
        }
        {
            let scale = scale_from(scale1_0) * p.m.factor;
            {
                let word = select(codes1_0.x, codes1_0.z, w_part != 0u);
                let lo = decode_low(word) * scale;
                let hi = decode_high(word) * scale;
                {
                    let row = w_local + 0u;
                    let oct = w_part + 0u;
                    let at = row * 10u + 2u * oct;
                    right_tile1[at] = vec4<f16>(lo);
                    right_tile1[at + 1u] = vec4<f16>(hi);
                }
            }
            {
                let word = select(codes1_0.y, codes1_0.w, w_part != 0u);
                let lo = decode_low(word) * scale;
                let hi = decode_high(word) * scale;
                {
                    let row = w_local + 0u;
                    let oct = w_part + 1u;
                    let at = row * 10u + 2u * oct;
                    right_tile1[at] = vec4<f16>(lo);
                    right_tile1[at + 1u] = vec4<f16>(hi);
                }
            }
        }
        for (var k = 0u; k < 32u; k = k + 16u) {
            let a0 = coopLoadT<coop_mat16x16<f16, A>>(&left_tile0[left_begin + 0u + k / 4u], 10u);
            let a1 = coopLoadT<coop_mat16x16<f16, A>>(&left_tile0[left_begin + 160u + k / 4u], 10u);
            let b0 = coopLoad<coop_mat16x16<f16, B>>(&right_tile0[right_begin + 0u + k / 4u], 10u);
            sum0_0 = coopMultiplyAdd(a0, b0, sum0_0);
            sum1_0 = coopMultiplyAdd(a1, b0, sum1_0);
            let b1 = coopLoad<coop_mat16x16<f16, B>>(&right_tile0[right_begin + 160u + k / 4u], 10u);
            sum0_1 = coopMultiplyAdd(a0, b1, sum0_1);
            sum1_1 = coopMultiplyAdd(a1, b1, sum1_1);
        }
        workgroupBarrier();
        {
            let start = start + 12u;
            let oct = min(start + x_oct, x_octs - 1u);
            left1_0 = x[x_row0 + oct];
            left1_1 = x[x_row1 + oct];
            let chunk = min(start, words - 1u) >> 2u;
            codes1_0 = codes_of(n0, chunk);
            let block0 = block_of(n0, 32u * chunk);
            scale1_0 = stored_scale(block0);
        }
        {
            let words = left0_0;
            let lo = vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
            let hi = vec4<f32>(unpack2x16float(words.z), unpack2x16float(words.w));
            {
                let row = x_local + 0u;
                let oct = x_oct;
                let at = row * 10u + 2u * oct;
                left_tile0[at] = vec4<f16>(lo);
                left_tile0[at + 1u] = vec4<f16>(hi);
            }
        }
        {
            let words = left0_1;
            let lo = vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
            let hi = vec4<f32>(unpack2x16float(words.z), unpack2x16float(words.w));
            {
                let row = x_local + 32u;
                let oct = x_oct;
                let at = row * 10u + 2u * oct;
                left_tile0[at] = vec4<f16>(lo);
                left_tile0[at + 1u] = vec4<f16>(hi);
            }
        }
        {
            let scale = scale_from(scale0_0) * p.m.factor;
            {
                let word = select(codes0_0.x, codes0_0.z, w_part != 0u);
                let lo = decode_low(word) * scale;
                let hi = decode_high(word) * scale;
                {
                    let row = w_local + 0u;
                    let oct = w_part + 0u;
                    let at = row * 10u + 2u * oct;
                    right_tile0[at] = vec4<f16>(lo);
                    right_tile0[at + 1u] = vec4<f16>(hi);
                }
            }
            {
                let word = select(codes0_0.y, codes0_0.w, w_part != 0u);
                let lo = decode_low(word) * scale;
                let hi = decode_high(word) * scale;
                {
                    let row = w_local + 0u;
                    let oct = w_part + 1u;
                    let at = row * 10u + 2u * oct;
                    right_tile0[at] = vec4<f16>(lo);
                    right_tile0[at + 1u] = vec4<f16>(hi);
                }
            }
        }
        for (var k = 0u; k < 32u; k = k + 16u) {
            let a0 = coopLoadT<coop_mat16x16<f16, A>>(&left_tile1[left_begin + 0u + k / 4u], 10u);
            let a1 = coopLoadT<coop_mat16x16<f16, A>>(&left_tile1[left_begin + 160u + k / 4u], 10u);
            let b0 = coopLoad<coop_mat16x16<f16, B>>(&right_tile1[right_begin + 0u + k / 4u], 10u);
            sum0_0 = coopMultiplyAdd(a0, b0, sum0_0);
            sum1_0 = coopMultiplyAdd(a1, b0, sum1_0);
            let b1 = coopLoad<coop_mat16x16<f16, B>>(&right_tile1[right_begin + 160u + k / 4u], 10u);
            sum0_1 = coopMultiplyAdd(a0, b1, sum0_1);
            sum1_1 = coopMultiplyAdd(a1, b1, sum1_1);
        }
    }
    let sums_begin = subgroup * 128u;
    workgroupBarrier();
    {
        let at = sums_begin + 0u;
        let value = sum0_0;
        coopStoreT(value, &sums[at], 8u);
    }
    {
        let at = sums_begin + 4u;
        let value = sum0_1;
        coopStoreT(value, &sums[at], 8u);
    }
    workgroupBarrier();
    finish(
        split, row_base + piece_row + 0u, column_base + piece_column + 0u,
        sums_begin, lane,
    );
    workgroupBarrier();
    {
        let at = sums_begin + 0u;
        let value = sum1_0;
        coopStoreT(value, &sums[at], 8u);
    }
    {
        let at = sums_begin + 4u;
        let value = sum1_1;
        coopStoreT(value, &sums[at], 8u);
    }
    workgroupBarrier();
    finish(
        split, row_base + piece_row + 16u, column_base + piece_column + 0u,
        sums_begin, lane,
    );
}

// Stores 16 rows of a subgroup's results. A thread stores four values of a row at a time.
fn finish(split: u32, row_first: u32, column_first: u32, sums_begin: u32, lane: u32) {
    let first_row = lane / 8u;
    let local0 = row_first + first_row + 0u;
    let row0 = p.row + min(local0, p.rows - 1u);
    let local1 = row_first + first_row + 4u;
    let row1 = p.row + min(local1, p.rows - 1u);
    let local2 = row_first + first_row + 8u;
    let row2 = p.row + min(local2, p.rows - 1u);
    let local3 = row_first + first_row + 12u;
    let row3 = p.row + min(local3, p.rows - 1u);
    let quad = lane % 8u;
    let n = column_first + 4u * quad;
    let n0 = p.column + min(n + 0u, p.n - 1u);
    let n1 = p.column + min(n + 1u, p.n - 1u);
    let n2 = p.column + min(n + 2u, p.n - 1u);
    let n3 = p.column + min(n + 3u, p.n - 1u);
    var up0 = vec4<f32>(0.0);
    var up1 = vec4<f32>(0.0);
    var up2 = vec4<f32>(0.0);
    var up3 = vec4<f32>(0.0);
    // The first split adds the bias and the adapter.
    let rank = select(0u, p.rank, split == 0u);
    let ranks = rank >> 2u;
    for (var j = 0u; j < ranks; j = j + 1u) {
        let right0 = b[n0 * ranks + j];
        let right1 = b[n1 * ranks + j];
        let right2 = b[n2 * ranks + j];
        let right3 = b[n3 * ranks + j];
        let left0 = h[row0 * ranks + j];
        up0 = up0 + left0.x
            * vec4<f32>(right0.x, right1.x, right2.x, right3.x);
        up0 = up0 + left0.y
            * vec4<f32>(right0.y, right1.y, right2.y, right3.y);
        up0 = up0 + left0.z
            * vec4<f32>(right0.z, right1.z, right2.z, right3.z);
        up0 = up0 + left0.w
            * vec4<f32>(right0.w, right1.w, right2.w, right3.w);
        let left1 = h[row1 * ranks + j];
        up1 = up1 + left1.x
            * vec4<f32>(right0.x, right1.x, right2.x, right3.x);
        up1 = up1 + left1.y
            * vec4<f32>(right0.y, right1.y, right2.y, right3.y);
        up1 = up1 + left1.z
            * vec4<f32>(right0.z, right1.z, right2.z, right3.z);
        up1 = up1 + left1.w
            * vec4<f32>(right0.w, right1.w, right2.w, right3.w);
        let left2 = h[row2 * ranks + j];
        up2 = up2 + left2.x
            * vec4<f32>(right0.x, right1.x, right2.x, right3.x);
        up2 = up2 + left2.y
            * vec4<f32>(right0.y, right1.y, right2.y, right3.y);
        up2 = up2 + left2.z
            * vec4<f32>(right0.z, right1.z, right2.z, right3.z);
        up2 = up2 + left2.w
            * vec4<f32>(right0.w, right1.w, right2.w, right3.w);
        let left3 = h[row3 * ranks + j];
        up3 = up3 + left3.x
            * vec4<f32>(right0.x, right1.x, right2.x, right3.x);
        up3 = up3 + left3.y
            * vec4<f32>(right0.y, right1.y, right2.y, right3.y);
        up3 = up3 + left3.z
            * vec4<f32>(right0.z, right1.z, right2.z, right3.z);
        up3 = up3 + left3.w
            * vec4<f32>(right0.w, right1.w, right2.w, right3.w);
    }
    let biased = p.bias_rows > 0u && split == 0u;
    if (local0 < p.rows) {
        let sums_at = sums_begin
            + (first_row + 0u) * 8u + 1u * quad;
        let sum = sums[sums_at];
        let undo = 1.0 / row_factor[row0] / p.m.factor;
        var value = sum * undo + p.lora_scale * up0;
        if (biased) {
            value = value + bias[bias_at(row0, n0) >> 2u];
        }
        let to = (split * p.rows + row0) * p.y_stride + p.column + n;
        if (n < p.n) { y[to >> 2u] = value; }
    }
    if (local1 < p.rows) {
        let sums_at = sums_begin
            + (first_row + 4u) * 8u + 1u * quad;
        let sum = sums[sums_at];
        let undo = 1.0 / row_factor[row1] / p.m.factor;
        var value = sum * undo + p.lora_scale * up1;
        if (biased) {
            value = value + bias[bias_at(row1, n0) >> 2u];
        }
        let to = (split * p.rows + row1) * p.y_stride + p.column + n;
        if (n < p.n) { y[to >> 2u] = value; }
    }
    if (local2 < p.rows) {
        let sums_at = sums_begin
            + (first_row + 8u) * 8u + 1u * quad;
        let sum = sums[sums_at];
        let undo = 1.0 / row_factor[row2] / p.m.factor;
        var value = sum * undo + p.lora_scale * up2;
        if (biased) {
            value = value + bias[bias_at(row2, n0) >> 2u];
        }
        let to = (split * p.rows + row2) * p.y_stride + p.column + n;
        if (n < p.n) { y[to >> 2u] = value; }
    }
    if (local3 < p.rows) {
        let sums_at = sums_begin
            + (first_row + 12u) * 8u + 1u * quad;
        let sum = sums[sums_at];
        let undo = 1.0 / row_factor[row3] / p.m.factor;
        var value = sum * undo + p.lora_scale * up3;
        if (biased) {
            value = value + bias[bias_at(row3, n0) >> 2u];
        }
        let to = (split * p.rows + row3) * p.y_stride + p.column + n;
        if (n < p.n) { y[to >> 2u] = value; }
    }
}
