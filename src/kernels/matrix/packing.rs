//! Packs a matrix into one buffer of u32 words per part, and unpacks it: rows of codes first, then
//! scales, super-scales, tables and minima. `shaders/shared/matrix.wgsl` reads it.

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::device::{Buffer, Gpu};
use crate::error::{Error, Result};
use crate::kernels::params;
use crate::quant::{
    Codebook, DenseData, DenseMatrix, DoubleScales, Dtype, Format, HostMatrix, MatrixKind, MatrixSpec, Parts,
    QuantizedMatrix, ScaleKind, Scales,
};
use crate::tensor::from_bytes;

params! {
    /// Layout of one part in its buffer; `Matrix` in the shaders. Places are in u32 words.
    struct MatrixLayout {
        /// Stride from one row of codes or values to the next.
        row_words: u32,
        /// log2 of the weights per block.
        block_shift: u32,
        /// The part's first weight within its block.
        first_weight: u32,
        /// The part's first block within its super-block.
        first_block: u32,
        /// log2 of the blocks per super-block.
        super_shift: u32,
        /// Place of the scales: f32, bytes of codes, or f16 pairs (Q8_0).
        scales: u32,
        /// Place of the super-scales.
        supers: u32,
        /// Place of the 256 values that scale codes stand for.
        table: u32,
        /// Added to every double-quantized scale.
        offset: f32,
        /// Place of the minima. The next three fields are like those of the scales.
        mins: u32,
        /// Place of the minima's super-scales.
        min_supers: u32,
        /// Place of the 256 values that codes of minima stand for.
        min_table: u32,
        /// Added to every double-quantized minimum.
        min_offset: f32,
        /// The power of two that brings the largest weight near 256, for f16 staging. Rows of W
        /// whose largest weight is below 2^-22 of the matrix's largest lose precision there.
        factor: f32,
    }
}

/// Rows of a matrix in one buffer.
pub(crate) struct Part {
    /// These rows of the whole matrix.
    pub rows: Range<usize>,
    /// The packed words.
    pub buffer: Buffer,
    /// Layout of the buffer.
    pub layout: MatrixLayout,
}

/// Information that the packed words lack, needed to bring a matrix back to the host.
pub(crate) enum Meta {
    Quantized {
        format: Format,
        codebook: Codebook,
        block: usize,
        dtype: Dtype,
        scales: ScaleMeta,
        mins: Option<ScaleMeta>,
    },
    F32,
    F16,
    Bf16,
    Q8_0,
}

/// The same for scales.
#[derive(Clone)]
pub(crate) enum ScaleMeta {
    Plain,
    Double { table: Box<[f32; 256]>, super_block: usize, offset: f32 },
}

impl ScaleMeta {
    pub(crate) fn of(scales: &Scales) -> ScaleMeta {
        match scales {
            Scales::Plain(_) => ScaleMeta::Plain,
            Scales::Double(double) => ScaleMeta::Double {
                table: double.table.clone(),
                super_block: double.super_block,
                offset: double.offset,
            },
        }
    }

    pub(crate) fn word(&self) -> &'static str {
        match self {
            ScaleMeta::Plain => "plain",
            ScaleMeta::Double { .. } => "double",
        }
    }
}

/// The power of two that brings `largest` into [128, 256], within the range of normal numbers; 1
/// if all weights are zero.
fn staging_factor(largest: f32) -> f32 {
    if largest == 0.0 || !largest.is_finite() {
        return 1.0;
    }
    let exponent = (8 - largest.log2().ceil() as i32).clamp(-126, 126);
    f32::from_bits(((exponent + 127) as u32) << 23)
}

fn largest(scales: &Scales) -> f32 {
    (0..scales.len()).map(|block| scales.get(block).abs()).fold(0.0, f32::max)
}

fn matrix_factor(matrix: &HostMatrix) -> f32 {
    let over = |values: &mut dyn Iterator<Item = f32>| values.fold(0.0f32, |most, value| most.max(value.abs()));
    staging_factor(match matrix {
        HostMatrix::Quantized(matrix) => {
            let codebook = over(&mut matrix.codebook().0.iter().copied());
            codebook * largest(matrix.scales()) + matrix.mins().map_or(0.0, largest)
        }
        HostMatrix::Dense(matrix) => match matrix.data() {
            DenseData::F32(values) => over(&mut values.iter().copied()),
            DenseData::F16(values) => over(&mut values.iter().map(|value| value.to_f32())),
            DenseData::Bf16(values) => over(&mut values.iter().map(|value| value.to_f32())),
            DenseData::Q8_0 { scales, .. } => 127.0 * over(&mut scales.iter().map(|value| value.to_f32())),
        },
    })
}

/// Packs a matrix into as many buffers as the binding limit requires.
pub(crate) fn upload(gpu: &Gpu, matrix: &HostMatrix) -> Result<Vec<Part>> {
    let spec = MatrixSpec::of(matrix);
    let what = format!("matrix {} x {}", spec.rows, spec.cols);
    // Only f16 staging needs the factor, and computing it reads every scale (or every dense
    // value).
    let factor = if gpu.tier().f16() { matrix_factor(matrix) } else { 1.0 };
    let mut parts = Vec::new();
    for range in spec.part_rows(gpu)? {
        let mut layout = MatrixLayout { row_words: spec.row_words() as u32, factor, ..Default::default() };
        let words = match matrix {
            HostMatrix::Quantized(matrix) => pack_quantized(matrix, range.clone(), &mut layout)?,
            HostMatrix::Dense(matrix) => pack_dense(matrix, range.clone(), &mut layout),
        };
        debug_assert_eq!(words.len(), spec.part_words(&range));
        let buffer = gpu.alloc_exact(&what, &words)?;
        parts.push(Part { rows: range, buffer, layout });
    }
    Ok(parts)
}

/// Counts the buffers of a matrix on a planned GPU.
pub(crate) fn reserve(gpu: &Gpu, spec: &MatrixSpec) -> Result<Vec<Part>> {
    let what = format!("matrix {} x {}", spec.rows, spec.cols);
    let part = |rows: Range<usize>| {
        let buffer = gpu.reserve_exact(&what, spec.part_words(&rows))?;
        Ok(Part { rows, buffer, layout: MatrixLayout::default() })
    };
    spec.part_rows(gpu)?.map(part).collect()
}

impl Meta {
    /// The information for a matrix of this kind without values, as if it were of zeros.
    pub(crate) fn planned(kind: MatrixKind) -> Meta {
        let of_scales = |kind| match kind {
            ScaleKind::Plain => ScaleMeta::Plain,
            ScaleKind::Double { super_block } => {
                ScaleMeta::Double { table: Box::new([0.0; 256]), super_block, offset: 0.0 }
            }
        };
        match kind {
            MatrixKind::Quantized { block, scales, mins } => Meta::Quantized {
                format: Format::Nf4,
                codebook: Codebook::NF4,
                block,
                dtype: Dtype::F32,
                scales: of_scales(scales),
                mins: mins.map(of_scales),
            },
            MatrixKind::F32 => Meta::F32,
            MatrixKind::Half => Meta::F16,
            MatrixKind::Q8_0 => Meta::Q8_0,
        }
    }

    /// The information for a matrix.
    pub(crate) fn of(matrix: &HostMatrix) -> Meta {
        match matrix {
            HostMatrix::Quantized(matrix) => Meta::Quantized {
                format: matrix.format(),
                codebook: matrix.codebook().clone(),
                block: matrix.block(),
                dtype: matrix.dtype(),
                scales: ScaleMeta::of(matrix.scales()),
                mins: matrix.mins().map(ScaleMeta::of),
            },
            HostMatrix::Dense(matrix) => match matrix.data() {
                DenseData::F32(_) => Meta::F32,
                DenseData::F16(_) => Meta::F16,
                DenseData::Bf16(_) => Meta::Bf16,
                DenseData::Q8_0 { .. } => Meta::Q8_0,
            },
        }
    }
}

fn pack_quantized(matrix: &QuantizedMatrix, rows: Range<usize>, layout: &mut MatrixLayout) -> Result<Vec<u32>> {
    let (cols, block) = (matrix.cols(), matrix.block());
    let row_words = layout.row_words as usize;
    let mut words = vec![0u32; rows.len() * row_words];
    words.par_chunks_mut(row_words).zip(rows.clone()).for_each(|(out, row)| pack_codes(matrix, row * cols, cols, out));
    let first = rows.start * cols;
    let blocks = first / block..(rows.end * cols).div_ceil(block);
    layout.block_shift = block.trailing_zeros();
    layout.first_weight = (first % block) as u32;
    let places = pack_scales(matrix.scales(), blocks.clone(), &mut words)?;
    (layout.scales, layout.supers, layout.table, layout.offset) = places.fields();
    (layout.first_block, layout.super_shift) = (places.first_block, places.super_shift);
    if let Some(mins) = matrix.mins() {
        let places = pack_scales(mins, blocks, &mut words)?;
        (layout.mins, layout.min_supers, layout.min_table, layout.min_offset) = places.fields();
        // Scales and minima share one shift if both are double-quantized: the formats that have
        // minima use the same super-block.
        if let (Scales::Double(scales), Scales::Double(mins)) = (matrix.scales(), mins)
            && scales.super_block != mins.super_block
        {
            return Err(bad_super_block(mins.super_block, "it must equal that of the scales"));
        }
        if let Scales::Double(_) = mins {
            (layout.first_block, layout.super_shift) = (places.first_block, places.super_shift);
        }
    }
    Ok(words)
}

fn bad_super_block(got: usize, expected: &str) -> Error {
    Error::invalid("device matrix", "the super-block", got, expected)
}

/// Packs the codes of one row, from flat index `first` on: element e into bits 4 (e mod 8) of word
/// e / 8.
fn pack_codes(matrix: &QuantizedMatrix, first: usize, cols: usize, out: &mut [u32]) {
    if !first.is_multiple_of(2) || !cols.is_multiple_of(8) {
        for e in 0..cols {
            out[e / 8] |= u32::from(matrix.code(first + e)) << (4 * (e % 8));
        }
        return;
    }
    let bytes = &matrix.codes()[first / 2..(first + cols) / 2];
    for (word, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
        // On the host, the first of two codes is in the high nibble.
        let packed = u32::from_le_bytes(*bytes);
        *word = (packed >> 4) & 0x0f0f_0f0f | (packed & 0x0f0f_0f0f) << 4;
    }
}

struct ScalePlaces {
    scales: u32,
    supers: u32,
    table: u32,
    offset: f32,
    first_block: u32,
    super_shift: u32,
}

impl ScalePlaces {
    fn fields(&self) -> (u32, u32, u32, f32) {
        (self.scales, self.supers, self.table, self.offset)
    }
}

/// Appends the scales of `blocks` and their tables. Two scales beyond the last block can be read:
/// a ragged row's last words may end past the last block, and they read the next block's scale
/// too.
fn pack_scales(scales: &Scales, blocks: Range<usize>, words: &mut Vec<u32>) -> Result<ScalePlaces> {
    let place = |words: &Vec<u32>| words.len() as u32;
    let at = place(words);
    match scales {
        Scales::Plain(values) => {
            words.extend(values[blocks].iter().map(|value| value.to_bits()));
            words.extend([0; 2]);
            Ok(ScalePlaces { scales: at, supers: 0, table: 0, offset: 0.0, first_block: 0, super_shift: 0 })
        }
        Scales::Double(double) => {
            if !double.super_block.is_power_of_two() {
                return Err(bad_super_block(double.super_block, "GPU kernels need a power of two"));
            }
            let codes = &double.codes[blocks.clone()];
            words.extend(
                codes.chunks(4).map(|four| four.iter().rev().fold(0u32, |word, &code| word << 8 | u32::from(code))),
            );
            words.push(0);
            let supers = place(words);
            let super_blocks = blocks.start / double.super_block..blocks.end.div_ceil(double.super_block);
            words.extend(double.supers[super_blocks].iter().map(|value| value.to_bits()));
            words.push(0);
            let table = place(words);
            words.extend(double.table.iter().map(|value| value.to_bits()));
            Ok(ScalePlaces {
                scales: at,
                supers,
                table,
                offset: double.offset,
                first_block: (blocks.start % double.super_block) as u32,
                super_shift: double.super_block.trailing_zeros(),
            })
        }
    }
}

fn pack_dense(matrix: &DenseMatrix, rows: Range<usize>, layout: &mut MatrixLayout) -> Vec<u32> {
    let cols = matrix.cols();
    let row_words = layout.row_words as usize;
    let mut words = vec![0u32; rows.len() * row_words];
    let each_row = |words: &mut Vec<u32>, pack: &(dyn Fn(usize, &mut [u32]) + Sync)| {
        words.par_chunks_mut(row_words).zip(rows.clone()).for_each(|(out, row)| pack(row * cols, out));
    };
    let pair = |out: &mut [u32], bits: &mut dyn Iterator<Item = u16>| {
        for (e, value) in bits.enumerate() {
            out[e / 2] |= u32::from(value) << (16 * (e % 2));
        }
    };
    match matrix.data() {
        DenseData::F32(values) => each_row(&mut words, &|first, out| {
            out.iter_mut().zip(&values[first..first + cols]).for_each(|(word, value)| *word = value.to_bits());
        }),
        DenseData::F16(values) => each_row(&mut words, &|first, out| {
            pair(out, &mut values[first..first + cols].iter().map(|value| value.to_bits()));
        }),
        DenseData::Bf16(values) => each_row(&mut words, &|first, out| {
            pair(out, &mut values[first..first + cols].iter().map(|value| value.to_bits()));
        }),
        DenseData::Q8_0 { codes, scales } => {
            each_row(&mut words, &|first, out| {
                for (word, four) in out.iter_mut().zip(codes[first..first + cols].as_chunks::<4>().0) {
                    *word = u32::from_le_bytes(four.map(|code| code as u8));
                }
            });
            layout.scales = words.len() as u32;
            let scales = &scales[rows.start * cols / 32..rows.end * cols / 32];
            words.extend(
                scales
                    .chunks(2)
                    .map(|two| two.iter().rev().fold(0u32, |word, scale| word << 16 | u32::from(scale.to_bits()))),
            );
        }
    }
    words
}

/// Reads the parts back and restores the original matrix.
pub(crate) fn download(gpu: &Gpu, parts: &[Part], meta: &Meta, rows: usize, cols: usize) -> Result<HostMatrix> {
    let mut words_of_parts = Vec::with_capacity(parts.len());
    for part in parts {
        let bytes = gpu.read(&part.buffer, part.buffer.bytes())?;
        words_of_parts.push(bytemuck::pod_collect_to_vec::<u8, u32>(&bytes));
    }
    let parts: Vec<_> = parts.iter().zip(&words_of_parts).collect();
    // Values of dense rows, unpadded.
    let dense = |pick: &dyn Fn(&[u32], usize) -> u32| -> Vec<u32> {
        let row = |(part, words): &(&Part, &Vec<u32>), row: usize| {
            let start = row * part.layout.row_words as usize;
            let words = words[start..start + part.layout.row_words as usize].to_vec();
            (0..cols).map(|e| pick(&words, e)).collect::<Vec<_>>()
        };
        parts.iter().flat_map(|part| (0..part.0.rows.len()).flat_map(|r| row(part, r)).collect::<Vec<_>>()).collect()
    };
    let half = |words: &[u32], e: usize| words[e / 2] >> (16 * (e % 2)) & 0xffff;
    let data = match meta {
        Meta::Quantized { format, codebook, block, dtype, scales, mins } => {
            let n = rows * cols;
            let mut codes = vec![0u8; n.div_ceil(2)];
            for (part, words) in &parts {
                for row in part.rows.clone() {
                    let start = (row - part.rows.start) * part.layout.row_words as usize;
                    unpack_codes(&words[start..], row * cols, cols, &mut codes);
                }
            }
            // The spare nibble of an odd length holds the code of zero, as quantizers leave it.
            let zero = codebook.0.iter().position(|value| *value == 0.0).unwrap_or(0);
            if let (1, Some(last)) = (n % 2, codes.last_mut()) {
                *last |= zero as u8;
            }
            let blocks = |part: &Part| part.rows.start * cols / block..(part.rows.end * cols).div_ceil(*block);
            let scales = unpack_scales(scales, &parts, &blocks, |layout| (layout.scales, layout.supers));
            let mins = mins
                .as_ref()
                .map(|mins| unpack_scales(mins, &parts, &blocks, |layout| (layout.mins, layout.min_supers)));
            let parts = Parts {
                format: *format,
                rows,
                cols,
                codes,
                codebook: codebook.clone(),
                block: *block,
                scales,
                mins,
                dtype: *dtype,
            };
            return QuantizedMatrix::from_parts(parts).map(HostMatrix::Quantized);
        }
        Meta::F32 => DenseData::F32(dense(&|words, e| words[e]).into_iter().map(f32::from_bits).collect()),
        Meta::F16 => DenseData::F16(dense(&half).into_iter().map(|bits| f16::from_bits(bits as u16)).collect()),
        Meta::Bf16 => DenseData::Bf16(dense(&half).into_iter().map(|bits| bf16::from_bits(bits as u16)).collect()),
        Meta::Q8_0 => {
            let byte = |words: &[u32], e: usize| words[e / 4] >> (8 * (e % 4)) & 0xff;
            let scales = parts.iter().flat_map(|(part, words)| {
                let count = part.rows.len() * cols / 32;
                let start = part.layout.scales as usize;
                (0..count).map(move |block| f16::from_bits((words[start + block / 2] >> (16 * (block % 2))) as u16))
            });
            DenseData::Q8_0 {
                codes: dense(&byte).into_iter().map(|byte| byte as u8 as i8).collect(),
                scales: scales.collect(),
            }
        }
    };
    DenseMatrix::new(rows, cols, data).map(HostMatrix::Dense)
}

fn unpack_codes(words: &[u32], first: usize, cols: usize, codes: &mut [u8]) {
    for e in 0..cols {
        let code = (words[e / 8] >> (4 * (e % 8)) & 15) as u8;
        let i = first + e;
        codes[i / 2] |= if i.is_multiple_of(2) { code << 4 } else { code };
    }
}

fn unpack_scales(
    meta: &ScaleMeta,
    parts: &[(&Part, &Vec<u32>)],
    blocks: &dyn Fn(&Part) -> Range<usize>,
    places: impl Fn(&MatrixLayout) -> (u32, u32),
) -> Scales {
    // Two parts may share a block or a super-block at their border; skip what the earlier part has
    // written.
    match meta {
        ScaleMeta::Plain => {
            let mut values = Vec::new();
            for (part, words) in parts {
                let (range, at) = (blocks(part), places(&part.layout).0 as usize);
                let seen = values.len() - range.start;
                values.extend(words[at + seen..at + range.len()].iter().map(|&bits| f32::from_bits(bits)));
            }
            Scales::Plain(values)
        }
        ScaleMeta::Double { table, super_block, offset } => {
            let (mut codes, mut supers) = (Vec::new(), Vec::new());
            for (part, words) in parts {
                let range = blocks(part);
                let (at, supers_at) = places(&part.layout);
                let code = |b: usize| (words[at as usize + b / 4] >> (8 * (b % 4))) as u8;
                codes.extend((codes.len() - range.start..range.len()).map(code));
                let super_blocks = range.start / super_block..range.end.div_ceil(*super_block);
                let seen = supers.len() - super_blocks.start;
                let stored = &words[supers_at as usize + seen..supers_at as usize + super_blocks.len()];
                supers.extend(from_bytes(bytemuck::cast_slice(stored)));
            }
            let (table, super_block, offset) = (table.clone(), *super_block, *offset);
            Scales::Double(DoubleScales { codes, table, supers, super_block, offset })
        }
    }
}
