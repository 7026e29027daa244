// qmatmul_dx_tile: kind=quant decoder=offset scales=double mins=double wide chunked f16 side=64 quads rank_quads dropout

enable f16;
// dX = dY * W + mask * (G * A) by register tiles of 64 rows of dY by 64 columns of
// W. Tiles of dY and W are staged in workgroup memory; W is decoded on the way.
//
// Floor: 2 M N K FLOP over the rate of f32. dY is read K / 64 times, W is read and decoded
// M / 64 times.
//
// The adapter comes first, because its mask must not affect the rest.
// Staged as f16: rows of dY multiplied by a power of two from their own largest value, W by
// `m.factor`; undone at the end. The adapter's part is f32 and waits in dX.

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
@group(0) @binding(0) var<storage, read> dy: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> w: array<u32>;
@group(0) @binding(2) var<storage, read> g: array<vec4<f32>>;
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

// dX[row, 4q .. 4q + 4]
fn load4(row: u32, q: u32) -> vec4<f32> {
    return dx[row * (p.k >> 2u) + q];
}

fn store4(row: u32, q: u32, values: vec4<f32>) {
    dx[row * (p.k >> 2u) + q] = values;
}

// Four values of a row of this part's columns of dY, from the n-th on; zero past the end.
fn dy4(row: u32, n: u32) -> vec4<f32> {
    let values = dy[(row * p.dy_stride + p.column + min(n, p.n - 4u)) >> 2u];
    return select(vec4<f32>(0.0), values, n < p.n);
}

// The power of two for each row of dY. Only f16 staging uses it.
@group(0) @binding(4) var<storage, read> row_factor: array<f32>;
@group(0) @binding(5) var<storage, read> w4: array<vec4<u32>>; // W, bound again
@group(0) @binding(6) var<storage, read_write> dx: array<vec4<f32>>;

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

// There is no table to fill.
fn fill_codebook(thread: u32) {}

// The codes of w[n, 32c .. 32c + 32].
fn codes_of(n: u32, c: u32) -> vec4<u32> {
    return w4[n * (p.m.row_words >> 2u) + c];
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

// dY is staged as [row][n / 4], W as [n][k / 4].
var<workgroup> dy_tile: array<vec4<f16>, 320>;
var<workgroup> w_tile: array<vec4<f16>, 272>;
var<workgroup> g_tile: array<vec4<f32>, 192>;
var<workgroup> a_tile: array<vec4<f32>, 136>;

fn g4(row: u32, j: u32) -> vec4<f32> {
    let values = g[(row * p.rank + min(j, p.rank - 4u)) >> 2u];
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
    let column_groups = (p.k + 63u) / 64u;
    let row_group = group / column_groups;
    let quad_base = (group - row_group * column_groups) * 16u;
    let row_base = row_group * 64u;
    let tx = thread % 8u;
    let ty = thread / 8u;
    let quads = (p.k + 3u) >> 2u;

    // This thread's share of staging: a quad of some rows of dY, and words of one row of W. Rows
    // and words past the end repeat the last ones.
    let dy_quad = thread % 4u;
    let dy_local = thread / 4u;
    let row0 = p.row + min(row_base + dy_local + 0u, p.rows - 1u);
    let factor0 = row_factor[row0];
    let row1 = p.row + min(row_base + dy_local + 16u, p.rows - 1u);
    let factor1 = row_factor[row1];
    let row2 = p.row + min(row_base + dy_local + 32u, p.rows - 1u);
    let factor2 = row_factor[row2];
    let row3 = p.row + min(row_base + dy_local + 48u, p.rows - 1u);
    let factor3 = row_factor[row3];
    let n_local = thread / 4u;
    let w_local = thread % 4u * 2u;
    let w_first = quad_base / 2u + w_local;
    let w_at = n_local * 17u + 2u * w_local;
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

    let g_quad = thread % 2u;
    let g_local = thread / 2u;
    for (var start = 0u; start < p.rank; start = start + 8u) {
        workgroupBarrier();
        {
            let row = p.row + min(row_base + g_local + 0u, p.rows - 1u);
            let at = (g_local + 0u) * 3u + g_quad;
            g_tile[at] = g4(row, start + 4u * g_quad);
        }
        {
            let row = p.row + min(row_base + g_local + 32u, p.rows - 1u);
            let at = (g_local + 32u) * 3u + g_quad;
            g_tile[at] = g4(row, start + 4u * g_quad);
        }
        {
            let j = (thread + 0u) / 16u;
            let q = thread % 16u;
            let values = a4(min(start + j, p.rank - 1u), min(quad_base + q, quads - 1u));
            a_tile[j * 17u + q] = values;
        }
        {
            let j = (thread + 64u) / 16u;
            let q = thread % 16u;
            let values = a4(min(start + j, p.rank - 1u), min(quad_base + q, quads - 1u));
            a_tile[j * 17u + q] = values;
        }
        workgroupBarrier();
        for (var k = 0u; k < 2u; k = k + 1u) {
            let b00 = vec4<f32>(a_tile[
                (4u * k + 0u) * 17u + 0u + tx
            ]);
            let b01 = vec4<f32>(a_tile[
                (4u * k + 0u) * 17u + 8u + tx
            ]);
            let b10 = vec4<f32>(a_tile[
                (4u * k + 1u) * 17u + 0u + tx
            ]);
            let b11 = vec4<f32>(a_tile[
                (4u * k + 1u) * 17u + 8u + tx
            ]);
            let b20 = vec4<f32>(a_tile[
                (4u * k + 2u) * 17u + 0u + tx
            ]);
            let b21 = vec4<f32>(a_tile[
                (4u * k + 2u) * 17u + 8u + tx
            ]);
            let b30 = vec4<f32>(a_tile[
                (4u * k + 3u) * 17u + 0u + tx
            ]);
            let b31 = vec4<f32>(a_tile[
                (4u * k + 3u) * 17u + 8u + tx
            ]);
            {
                let a = vec4<f32>(g_tile[(0u + ty) * 3u + k]);
                sum0_0 = sum0_0 + a.x * b00;
                sum0_1 = sum0_1 + a.x * b01;
                sum0_0 = sum0_0 + a.y * b10;
                sum0_1 = sum0_1 + a.y * b11;
                sum0_0 = sum0_0 + a.z * b20;
                sum0_1 = sum0_1 + a.z * b21;
                sum0_0 = sum0_0 + a.w * b30;
                sum0_1 = sum0_1 + a.w * b31;
            }
            {
                let a = vec4<f32>(g_tile[(8u + ty) * 3u + k]);
                sum1_0 = sum1_0 + a.x * b00;
                sum1_1 = sum1_1 + a.x * b01;
                sum1_0 = sum1_0 + a.y * b10;
                sum1_1 = sum1_1 + a.y * b11;
                sum1_0 = sum1_0 + a.z * b20;
                sum1_1 = sum1_1 + a.z * b21;
                sum1_0 = sum1_0 + a.w * b30;
                sum1_1 = sum1_1 + a.w * b31;
            }
            {
                let a = vec4<f32>(g_tile[(16u + ty) * 3u + k]);
                sum2_0 = sum2_0 + a.x * b00;
                sum2_1 = sum2_1 + a.x * b01;
                sum2_0 = sum2_0 + a.y * b10;
                sum2_1 = sum2_1 + a.y * b11;
                sum2_0 = sum2_0 + a.z * b20;
                sum2_1 = sum2_1 + a.z * b21;
                sum2_0 = sum2_0 + a.w * b30;
                sum2_1 = sum2_1 + a.w * b31;
            }
            {
                let a = vec4<f32>(g_tile[(24u + ty) * 3u + k]);
                sum3_0 = sum3_0 + a.x * b00;
                sum3_1 = sum3_1 + a.x * b01;
                sum3_0 = sum3_0 + a.y * b10;
                sum3_1 = sum3_1 + a.y * b11;
                sum3_0 = sum3_0 + a.z * b20;
                sum3_1 = sum3_1 + a.z * b21;
                sum3_0 = sum3_0 + a.w * b30;
                sum3_1 = sum3_1 + a.w * b31;
            }
            {
                let a = vec4<f32>(g_tile[(32u + ty) * 3u + k]);
                sum4_0 = sum4_0 + a.x * b00;
                sum4_1 = sum4_1 + a.x * b01;
                sum4_0 = sum4_0 + a.y * b10;
                sum4_1 = sum4_1 + a.y * b11;
                sum4_0 = sum4_0 + a.z * b20;
                sum4_1 = sum4_1 + a.z * b21;
                sum4_0 = sum4_0 + a.w * b30;
                sum4_1 = sum4_1 + a.w * b31;
            }
            {
                let a = vec4<f32>(g_tile[(40u + ty) * 3u + k]);
                sum5_0 = sum5_0 + a.x * b00;
                sum5_1 = sum5_1 + a.x * b01;
                sum5_0 = sum5_0 + a.y * b10;
                sum5_1 = sum5_1 + a.y * b11;
                sum5_0 = sum5_0 + a.z * b20;
                sum5_1 = sum5_1 + a.z * b21;
                sum5_0 = sum5_0 + a.w * b30;
                sum5_1 = sum5_1 + a.w * b31;
            }
            {
                let a = vec4<f32>(g_tile[(48u + ty) * 3u + k]);
                sum6_0 = sum6_0 + a.x * b00;
                sum6_1 = sum6_1 + a.x * b01;
                sum6_0 = sum6_0 + a.y * b10;
                sum6_1 = sum6_1 + a.y * b11;
                sum6_0 = sum6_0 + a.z * b20;
                sum6_1 = sum6_1 + a.z * b21;
                sum6_0 = sum6_0 + a.w * b30;
                sum6_1 = sum6_1 + a.w * b31;
            }
            {
                let a = vec4<f32>(g_tile[(56u + ty) * 3u + k]);
                sum7_0 = sum7_0 + a.x * b00;
                sum7_1 = sum7_1 + a.x * b01;
                sum7_0 = sum7_0 + a.y * b10;
                sum7_1 = sum7_1 + a.y * b11;
                sum7_0 = sum7_0 + a.z * b20;
                sum7_1 = sum7_1 + a.z * b21;
                sum7_0 = sum7_0 + a.w * b30;
                sum7_1 = sum7_1 + a.w * b31;
            }
        }
    }
    if (p.rank > 0u) {
        {
            let row = p.row + row_base + 0u + ty;
            if (row < p.row + p.rows) {
                {
                    let q = quad_base + 0u + tx;
                    if (q < quads) {
                        sum0_0 = sum0_0 * dropout_factor4(row, 4u * q);
                    }
                }
                {
                    let q = quad_base + 8u + tx;
                    if (q < quads) {
                        sum0_1 = sum0_1 * dropout_factor4(row, 4u * q);
                    }
                }
            }
        }
        {
            let row = p.row + row_base + 8u + ty;
            if (row < p.row + p.rows) {
                {
                    let q = quad_base + 0u + tx;
                    if (q < quads) {
                        sum1_0 = sum1_0 * dropout_factor4(row, 4u * q);
                    }
                }
                {
                    let q = quad_base + 8u + tx;
                    if (q < quads) {
                        sum1_1 = sum1_1 * dropout_factor4(row, 4u * q);
                    }
                }
            }
        }
        {
            let row = p.row + row_base + 16u + ty;
            if (row < p.row + p.rows) {
                {
                    let q = quad_base + 0u + tx;
                    if (q < quads) {
                        sum2_0 = sum2_0 * dropout_factor4(row, 4u * q);
                    }
                }
                {
                    let q = quad_base + 8u + tx;
                    if (q < quads) {
                        sum2_1 = sum2_1 * dropout_factor4(row, 4u * q);
                    }
                }
            }
        }
        {
            let row = p.row + row_base + 24u + ty;
            if (row < p.row + p.rows) {
                {
                    let q = quad_base + 0u + tx;
                    if (q < quads) {
                        sum3_0 = sum3_0 * dropout_factor4(row, 4u * q);
                    }
                }
                {
                    let q = quad_base + 8u + tx;
                    if (q < quads) {
                        sum3_1 = sum3_1 * dropout_factor4(row, 4u * q);
                    }
                }
            }
        }
        {
            let row = p.row + row_base + 32u + ty;
            if (row < p.row + p.rows) {
                {
                    let q = quad_base + 0u + tx;
                    if (q < quads) {
                        sum4_0 = sum4_0 * dropout_factor4(row, 4u * q);
                    }
                }
                {
                    let q = quad_base + 8u + tx;
                    if (q < quads) {
                        sum4_1 = sum4_1 * dropout_factor4(row, 4u * q);
                    }
                }
            }
        }
        {
            let row = p.row + row_base + 40u + ty;
            if (row < p.row + p.rows) {
                {
                    let q = quad_base + 0u + tx;
                    if (q < quads) {
                        sum5_0 = sum5_0 * dropout_factor4(row, 4u * q);
                    }
                }
                {
                    let q = quad_base + 8u + tx;
                    if (q < quads) {
                        sum5_1 = sum5_1 * dropout_factor4(row, 4u * q);
                    }
                }
            }
        }
        {
            let row = p.row + row_base + 48u + ty;
            if (row < p.row + p.rows) {
                {
                    let q = quad_base + 0u + tx;
                    if (q < quads) {
                        sum6_0 = sum6_0 * dropout_factor4(row, 4u * q);
                    }
                }
                {
                    let q = quad_base + 8u + tx;
                    if (q < quads) {
                        sum6_1 = sum6_1 * dropout_factor4(row, 4u * q);
                    }
                }
            }
        }
        {
            let row = p.row + row_base + 56u + ty;
            if (row < p.row + p.rows) {
                {
                    let q = quad_base + 0u + tx;
                    if (q < quads) {
                        sum7_0 = sum7_0 * dropout_factor4(row, 4u * q);
                    }
                }
                {
                    let q = quad_base + 8u + tx;
                    if (q < quads) {
                        sum7_1 = sum7_1 * dropout_factor4(row, 4u * q);
                    }
                }
            }
        }
    }
    if (p.rank > 0u) {
        {
            let row = p.row + row_base + 0u + ty;
            if (row < p.row + p.rows) {
                {
                    let q = quad_base + 0u + tx;
                    if (q < quads) {
                        if (p.accumulate != 0u) {
                            sum0_0 = sum0_0 + load4(row, q);
                        }
                        store4(row, q, sum0_0);
                    }
                }
                {
                    let q = quad_base + 8u + tx;
                    if (q < quads) {
                        if (p.accumulate != 0u) {
                            sum0_1 = sum0_1 + load4(row, q);
                        }
                        store4(row, q, sum0_1);
                    }
                }
            }
        }
        {
            let row = p.row + row_base + 8u + ty;
            if (row < p.row + p.rows) {
                {
                    let q = quad_base + 0u + tx;
                    if (q < quads) {
                        if (p.accumulate != 0u) {
                            sum1_0 = sum1_0 + load4(row, q);
                        }
                        store4(row, q, sum1_0);
                    }
                }
                {
                    let q = quad_base + 8u + tx;
                    if (q < quads) {
                        if (p.accumulate != 0u) {
                            sum1_1 = sum1_1 + load4(row, q);
                        }
                        store4(row, q, sum1_1);
                    }
                }
            }
        }
        {
            let row = p.row + row_base + 16u + ty;
            if (row < p.row + p.rows) {
                {
                    let q = quad_base + 0u + tx;
                    if (q < quads) {
                        if (p.accumulate != 0u) {
                            sum2_0 = sum2_0 + load4(row, q);
                        }
                        store4(row, q, sum2_0);
                    }
                }
                {
                    let q = quad_base + 8u + tx;
                    if (q < quads) {
                        if (p.accumulate != 0u) {
                            sum2_1 = sum2_1 + load4(row, q);
                        }
                        store4(row, q, sum2_1);
                    }
                }
            }
        }
        {
            let row = p.row + row_base + 24u + ty;
            if (row < p.row + p.rows) {
                {
                    let q = quad_base + 0u + tx;
                    if (q < quads) {
                        if (p.accumulate != 0u) {
                            sum3_0 = sum3_0 + load4(row, q);
                        }
                        store4(row, q, sum3_0);
                    }
                }
                {
                    let q = quad_base + 8u + tx;
                    if (q < quads) {
                        if (p.accumulate != 0u) {
                            sum3_1 = sum3_1 + load4(row, q);
                        }
                        store4(row, q, sum3_1);
                    }
                }
            }
        }
        {
            let row = p.row + row_base + 32u + ty;
            if (row < p.row + p.rows) {
                {
                    let q = quad_base + 0u + tx;
                    if (q < quads) {
                        if (p.accumulate != 0u) {
                            sum4_0 = sum4_0 + load4(row, q);
                        }
                        store4(row, q, sum4_0);
                    }
                }
                {
                    let q = quad_base + 8u + tx;
                    if (q < quads) {
                        if (p.accumulate != 0u) {
                            sum4_1 = sum4_1 + load4(row, q);
                        }
                        store4(row, q, sum4_1);
                    }
                }
            }
        }
        {
            let row = p.row + row_base + 40u + ty;
            if (row < p.row + p.rows) {
                {
                    let q = quad_base + 0u + tx;
                    if (q < quads) {
                        if (p.accumulate != 0u) {
                            sum5_0 = sum5_0 + load4(row, q);
                        }
                        store4(row, q, sum5_0);
                    }
                }
                {
                    let q = quad_base + 8u + tx;
                    if (q < quads) {
                        if (p.accumulate != 0u) {
                            sum5_1 = sum5_1 + load4(row, q);
                        }
                        store4(row, q, sum5_1);
                    }
                }
            }
        }
        {
            let row = p.row + row_base + 48u + ty;
            if (row < p.row + p.rows) {
                {
                    let q = quad_base + 0u + tx;
                    if (q < quads) {
                        if (p.accumulate != 0u) {
                            sum6_0 = sum6_0 + load4(row, q);
                        }
                        store4(row, q, sum6_0);
                    }
                }
                {
                    let q = quad_base + 8u + tx;
                    if (q < quads) {
                        if (p.accumulate != 0u) {
                            sum6_1 = sum6_1 + load4(row, q);
                        }
                        store4(row, q, sum6_1);
                    }
                }
            }
        }
        {
            let row = p.row + row_base + 56u + ty;
            if (row < p.row + p.rows) {
                {
                    let q = quad_base + 0u + tx;
                    if (q < quads) {
                        if (p.accumulate != 0u) {
                            sum7_0 = sum7_0 + load4(row, q);
                        }
                        store4(row, q, sum7_0);
                    }
                }
                {
                    let q = quad_base + 8u + tx;
                    if (q < quads) {
                        if (p.accumulate != 0u) {
                            sum7_1 = sum7_1 + load4(row, q);
                        }
                        store4(row, q, sum7_1);
                    }
                }
            }
        }
        sum0_0 = vec4<f32>(0.0);
        sum0_1 = vec4<f32>(0.0);
        sum1_0 = vec4<f32>(0.0);
        sum1_1 = vec4<f32>(0.0);
        sum2_0 = vec4<f32>(0.0);
        sum2_1 = vec4<f32>(0.0);
        sum3_0 = vec4<f32>(0.0);
        sum3_1 = vec4<f32>(0.0);
        sum4_0 = vec4<f32>(0.0);
        sum4_1 = vec4<f32>(0.0);
        sum5_0 = vec4<f32>(0.0);
        sum5_1 = vec4<f32>(0.0);
        sum6_0 = vec4<f32>(0.0);
        sum6_1 = vec4<f32>(0.0);
        sum7_0 = vec4<f32>(0.0);
        sum7_1 = vec4<f32>(0.0);
    }

    for (var start = 0u; start < p.n; start = start + 16u) {
        // Starts loads before the barrier. Past N the last values are repeated, and dY counts as
        // zero.
        let own0 = dy4(row0, start + 4u * dy_quad);
        let own1 = dy4(row1, start + 4u * dy_quad);
        let own2 = dy4(row2, start + 4u * dy_quad);
        let own3 = dy4(row3, start + 4u * dy_quad);
        let n = min(start + n_local, p.n - 1u);
        let chunk = min(w_first >> 2u, (p.words - 1u) >> 2u);
        let codes = codes_of(n, chunk);
        let block = block_of(n, 32u * chunk);
        let scale = scale_of(block) * p.m.factor;
        let low = min_of(block) * p.m.factor;
        workgroupBarrier();
        dy_tile[(dy_local + 0u) * 5u + dy_quad] =
            vec4<f16>(own0 * factor0);
        dy_tile[(dy_local + 16u) * 5u + dy_quad] =
            vec4<f16>(own1 * factor1);
        dy_tile[(dy_local + 32u) * 5u + dy_quad] =
            vec4<f16>(own2 * factor2);
        dy_tile[(dy_local + 48u) * 5u + dy_quad] =
            vec4<f16>(own3 * factor3);
        let pair = select(codes.xy, codes.zw, (w_local & 2u) != 0u);
        {
            let word = pair.x;
            w_tile[w_at + 0u] =
                vec4<f16>(decode_low(word) * scale + low);
            w_tile[w_at + 1u] =
                vec4<f16>(decode_high(word) * scale + low);
        }
        {
            let word = pair.y;
            w_tile[w_at + 2u] =
                vec4<f16>(decode_low(word) * scale + low);
            w_tile[w_at + 3u] =
                vec4<f16>(decode_high(word) * scale + low);
        }
        workgroupBarrier();
        for (var k = 0u; k < 4u; k = k + 1u) {
            let b00 = vec4<f32>(w_tile[
                (4u * k + 0u) * 17u + 0u + tx
            ]);
            let b01 = vec4<f32>(w_tile[
                (4u * k + 0u) * 17u + 8u + tx
            ]);
            let b10 = vec4<f32>(w_tile[
                (4u * k + 1u) * 17u + 0u + tx
            ]);
            let b11 = vec4<f32>(w_tile[
                (4u * k + 1u) * 17u + 8u + tx
            ]);
            let b20 = vec4<f32>(w_tile[
                (4u * k + 2u) * 17u + 0u + tx
            ]);
            let b21 = vec4<f32>(w_tile[
                (4u * k + 2u) * 17u + 8u + tx
            ]);
            let b30 = vec4<f32>(w_tile[
                (4u * k + 3u) * 17u + 0u + tx
            ]);
            let b31 = vec4<f32>(w_tile[
                (4u * k + 3u) * 17u + 8u + tx
            ]);
            {
                let a = vec4<f32>(dy_tile[(0u + ty) * 5u + k]);
                sum0_0 = sum0_0 + a.x * b00;
                sum0_1 = sum0_1 + a.x * b01;
                sum0_0 = sum0_0 + a.y * b10;
                sum0_1 = sum0_1 + a.y * b11;
                sum0_0 = sum0_0 + a.z * b20;
                sum0_1 = sum0_1 + a.z * b21;
                sum0_0 = sum0_0 + a.w * b30;
                sum0_1 = sum0_1 + a.w * b31;
            }
            {
                let a = vec4<f32>(dy_tile[(8u + ty) * 5u + k]);
                sum1_0 = sum1_0 + a.x * b00;
                sum1_1 = sum1_1 + a.x * b01;
                sum1_0 = sum1_0 + a.y * b10;
                sum1_1 = sum1_1 + a.y * b11;
                sum1_0 = sum1_0 + a.z * b20;
                sum1_1 = sum1_1 + a.z * b21;
                sum1_0 = sum1_0 + a.w * b30;
                sum1_1 = sum1_1 + a.w * b31;
            }
            {
                let a = vec4<f32>(dy_tile[(16u + ty) * 5u + k]);
                sum2_0 = sum2_0 + a.x * b00;
                sum2_1 = sum2_1 + a.x * b01;
                sum2_0 = sum2_0 + a.y * b10;
                sum2_1 = sum2_1 + a.y * b11;
                sum2_0 = sum2_0 + a.z * b20;
                sum2_1 = sum2_1 + a.z * b21;
                sum2_0 = sum2_0 + a.w * b30;
                sum2_1 = sum2_1 + a.w * b31;
            }
            {
                let a = vec4<f32>(dy_tile[(24u + ty) * 5u + k]);
                sum3_0 = sum3_0 + a.x * b00;
                sum3_1 = sum3_1 + a.x * b01;
                sum3_0 = sum3_0 + a.y * b10;
                sum3_1 = sum3_1 + a.y * b11;
                sum3_0 = sum3_0 + a.z * b20;
                sum3_1 = sum3_1 + a.z * b21;
                sum3_0 = sum3_0 + a.w * b30;
                sum3_1 = sum3_1 + a.w * b31;
            }
            {
                let a = vec4<f32>(dy_tile[(32u + ty) * 5u + k]);
                sum4_0 = sum4_0 + a.x * b00;
                sum4_1 = sum4_1 + a.x * b01;
                sum4_0 = sum4_0 + a.y * b10;
                sum4_1 = sum4_1 + a.y * b11;
                sum4_0 = sum4_0 + a.z * b20;
                sum4_1 = sum4_1 + a.z * b21;
                sum4_0 = sum4_0 + a.w * b30;
                sum4_1 = sum4_1 + a.w * b31;
            }
            {
                let a = vec4<f32>(dy_tile[(40u + ty) * 5u + k]);
                sum5_0 = sum5_0 + a.x * b00;
                sum5_1 = sum5_1 + a.x * b01;
                sum5_0 = sum5_0 + a.y * b10;
                sum5_1 = sum5_1 + a.y * b11;
                sum5_0 = sum5_0 + a.z * b20;
                sum5_1 = sum5_1 + a.z * b21;
                sum5_0 = sum5_0 + a.w * b30;
                sum5_1 = sum5_1 + a.w * b31;
            }
            {
                let a = vec4<f32>(dy_tile[(48u + ty) * 5u + k]);
                sum6_0 = sum6_0 + a.x * b00;
                sum6_1 = sum6_1 + a.x * b01;
                sum6_0 = sum6_0 + a.y * b10;
                sum6_1 = sum6_1 + a.y * b11;
                sum6_0 = sum6_0 + a.z * b20;
                sum6_1 = sum6_1 + a.z * b21;
                sum6_0 = sum6_0 + a.w * b30;
                sum6_1 = sum6_1 + a.w * b31;
            }
            {
                let a = vec4<f32>(dy_tile[(56u + ty) * 5u + k]);
                sum7_0 = sum7_0 + a.x * b00;
                sum7_1 = sum7_1 + a.x * b01;
                sum7_0 = sum7_0 + a.y * b10;
                sum7_1 = sum7_1 + a.y * b11;
                sum7_0 = sum7_0 + a.z * b20;
                sum7_1 = sum7_1 + a.z * b21;
                sum7_0 = sum7_0 + a.w * b30;
                sum7_1 = sum7_1 + a.w * b31;
            }
        }
    }

    let add = p.accumulate != 0u || p.rank > 0u;
    {
        let row = p.row + row_base + 0u + ty;
        if (row < p.row + p.rows) {
            {
                let q = quad_base + 0u + tx;
                if (q < quads) {
                    sum0_0 = sum0_0 * (1.0 / row_factor[row] / p.m.factor);
                    if (add) {
                        sum0_0 = sum0_0 + load4(row, q);
                    }
                    store4(row, q, sum0_0);
                }
            }
            {
                let q = quad_base + 8u + tx;
                if (q < quads) {
                    sum0_1 = sum0_1 * (1.0 / row_factor[row] / p.m.factor);
                    if (add) {
                        sum0_1 = sum0_1 + load4(row, q);
                    }
                    store4(row, q, sum0_1);
                }
            }
        }
    }
    {
        let row = p.row + row_base + 8u + ty;
        if (row < p.row + p.rows) {
            {
                let q = quad_base + 0u + tx;
                if (q < quads) {
                    sum1_0 = sum1_0 * (1.0 / row_factor[row] / p.m.factor);
                    if (add) {
                        sum1_0 = sum1_0 + load4(row, q);
                    }
                    store4(row, q, sum1_0);
                }
            }
            {
                let q = quad_base + 8u + tx;
                if (q < quads) {
                    sum1_1 = sum1_1 * (1.0 / row_factor[row] / p.m.factor);
                    if (add) {
                        sum1_1 = sum1_1 + load4(row, q);
                    }
                    store4(row, q, sum1_1);
                }
            }
        }
    }
    {
        let row = p.row + row_base + 16u + ty;
        if (row < p.row + p.rows) {
            {
                let q = quad_base + 0u + tx;
                if (q < quads) {
                    sum2_0 = sum2_0 * (1.0 / row_factor[row] / p.m.factor);
                    if (add) {
                        sum2_0 = sum2_0 + load4(row, q);
                    }
                    store4(row, q, sum2_0);
                }
            }
            {
                let q = quad_base + 8u + tx;
                if (q < quads) {
                    sum2_1 = sum2_1 * (1.0 / row_factor[row] / p.m.factor);
                    if (add) {
                        sum2_1 = sum2_1 + load4(row, q);
                    }
                    store4(row, q, sum2_1);
                }
            }
        }
    }
    {
        let row = p.row + row_base + 24u + ty;
        if (row < p.row + p.rows) {
            {
                let q = quad_base + 0u + tx;
                if (q < quads) {
                    sum3_0 = sum3_0 * (1.0 / row_factor[row] / p.m.factor);
                    if (add) {
                        sum3_0 = sum3_0 + load4(row, q);
                    }
                    store4(row, q, sum3_0);
                }
            }
            {
                let q = quad_base + 8u + tx;
                if (q < quads) {
                    sum3_1 = sum3_1 * (1.0 / row_factor[row] / p.m.factor);
                    if (add) {
                        sum3_1 = sum3_1 + load4(row, q);
                    }
                    store4(row, q, sum3_1);
                }
            }
        }
    }
    {
        let row = p.row + row_base + 32u + ty;
        if (row < p.row + p.rows) {
            {
                let q = quad_base + 0u + tx;
                if (q < quads) {
                    sum4_0 = sum4_0 * (1.0 / row_factor[row] / p.m.factor);
                    if (add) {
                        sum4_0 = sum4_0 + load4(row, q);
                    }
                    store4(row, q, sum4_0);
                }
            }
            {
                let q = quad_base + 8u + tx;
                if (q < quads) {
                    sum4_1 = sum4_1 * (1.0 / row_factor[row] / p.m.factor);
                    if (add) {
                        sum4_1 = sum4_1 + load4(row, q);
                    }
                    store4(row, q, sum4_1);
                }
            }
        }
    }
    {
        let row = p.row + row_base + 40u + ty;
        if (row < p.row + p.rows) {
            {
                let q = quad_base + 0u + tx;
                if (q < quads) {
                    sum5_0 = sum5_0 * (1.0 / row_factor[row] / p.m.factor);
                    if (add) {
                        sum5_0 = sum5_0 + load4(row, q);
                    }
                    store4(row, q, sum5_0);
                }
            }
            {
                let q = quad_base + 8u + tx;
                if (q < quads) {
                    sum5_1 = sum5_1 * (1.0 / row_factor[row] / p.m.factor);
                    if (add) {
                        sum5_1 = sum5_1 + load4(row, q);
                    }
                    store4(row, q, sum5_1);
                }
            }
        }
    }
    {
        let row = p.row + row_base + 48u + ty;
        if (row < p.row + p.rows) {
            {
                let q = quad_base + 0u + tx;
                if (q < quads) {
                    sum6_0 = sum6_0 * (1.0 / row_factor[row] / p.m.factor);
                    if (add) {
                        sum6_0 = sum6_0 + load4(row, q);
                    }
                    store4(row, q, sum6_0);
                }
            }
            {
                let q = quad_base + 8u + tx;
                if (q < quads) {
                    sum6_1 = sum6_1 * (1.0 / row_factor[row] / p.m.factor);
                    if (add) {
                        sum6_1 = sum6_1 + load4(row, q);
                    }
                    store4(row, q, sum6_1);
                }
            }
        }
    }
    {
        let row = p.row + row_base + 56u + ty;
        if (row < p.row + p.rows) {
            {
                let q = quad_base + 0u + tx;
                if (q < quads) {
                    sum7_0 = sum7_0 * (1.0 / row_factor[row] / p.m.factor);
                    if (add) {
                        sum7_0 = sum7_0 + load4(row, q);
                    }
                    store4(row, q, sum7_0);
                }
            }
            {
                let q = quad_base + 8u + tx;
                if (q < quads) {
                    sum7_1 = sum7_1 * (1.0 / row_factor[row] / p.m.factor);
                    if (add) {
                        sum7_1 = sum7_1 + load4(row, q);
                    }
                    store4(row, q, sum7_1);
                }
            }
        }
    }
}
