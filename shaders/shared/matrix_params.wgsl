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
