//! Dot products for the CPU device, straight from packed codes: AVX2 if the processor has it,
//! plain Rust otherwise.

use std::ops::Range;

use crate::kernels::qmatmul::call::GEMV_ROWS;
use crate::quant::HostMatrix;
use crate::quant::QuantizedMatrix;

/// x [M, K] with M <= [`GEMV_ROWS`], prepared for products with the rows of a matrix.
pub(crate) struct FewRows<'a> {
    x: &'a [f32],
    /// Whether the processor has AVX2, FMA and F16C, and K is a multiple of 8.
    #[cfg(target_arch = "x86_64")]
    packed: bool,
    /// For AVX-512, if the matrix can be read that way.
    #[cfg(target_arch = "x86_64")]
    spread: Option<packed::Spread>,
}

impl<'a> FewRows<'a> {
    /// Prepares `x` for products with `w`.
    pub(crate) fn new(w: &HostMatrix, x: &'a [f32]) -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let packed = w.cols().is_multiple_of(8)
                && is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            FewRows { x, packed, spread: if packed { packed::Spread::of(w, x) } else { None } }
        }
        #[cfg(not(target_arch = "x86_64"))]
        FewRows { x }
    }

    /// Computes out[row, t] = W[row, :] . x[t, :] for `rows` of the matrix that this was made for.
    /// `out` is [rows, M].
    pub(crate) fn times(&self, w: &HostMatrix, rows: Range<usize>, out: &mut [f32]) {
        let k = w.cols();
        let m = self.x.len() / k;
        debug_assert!(m <= GEMV_ROWS && out.len() == rows.len() * m);
        #[cfg(target_arch = "x86_64")]
        if self.packed {
            // SAFETY: the processor has AVX2, FMA and F16C.
            unsafe { packed::gemv(w, rows, self, out) };
            return;
        }
        let mut row_values = vec![0.0; k];
        for (row, out) in rows.zip(out.chunks_mut(m)) {
            w.dequantize_rows(row..row + 1, &mut row_values);
            for (out, x) in out.iter_mut().zip(self.x.chunks(k)) {
                *out = dot(&row_values, x);
            }
        }
    }
}

/// Returns the dot product, added up in eight partial sums, which compilers vectorize.
pub(crate) fn dot(left: &[f32], right: &[f32]) -> f32 {
    let (left, left_tail) = left.as_chunks::<8>();
    let (right, right_tail) = right.as_chunks::<8>();
    let mut sums = [0.0f32; 8];
    for (left, right) in left.iter().zip(right) {
        for lane in 0..8 {
            sums[lane] += left[lane] * right[lane];
        }
    }
    let tail: f32 = left_tail.iter().zip(right_tail).map(|(left, right)| left * right).sum();
    sums.iter().sum::<f32>() + tail
}

#[cfg(target_arch = "x86_64")]
mod packed {
    use std::arch::x86_64::*;

    use super::*;
    use crate::quant::{DenseData, DenseMatrix, Q8_BLOCK};

    /// [`FewRows::times`] if K is a multiple of 8.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn gemv(w: &HostMatrix, rows: Range<usize>, x: &FewRows<'_>, out: &mut [f32]) {
        match x.x.len() / w.cols() {
            1 => rows_of::<1>(w, rows, x, out),
            2 => rows_of::<2>(w, rows, x, out),
            3 => rows_of::<3>(w, rows, x, out),
            4 => rows_of::<4>(w, rows, x, out),
            5 => rows_of::<5>(w, rows, x, out),
            6 => rows_of::<6>(w, rows, x, out),
            7 => rows_of::<7>(w, rows, x, out),
            _ => rows_of::<8>(w, rows, x, out),
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn rows_of<const M: usize>(w: &HostMatrix, rows: Range<usize>, few: &FewRows<'_>, out: &mut [f32]) {
        let x = few.x;
        // No slice below may end before its last load.
        assert!(
            w.cols().is_multiple_of(8)
                && x.len() == M * w.cols()
                && out.len() == rows.len() * M
                && rows.end <= w.rows()
        );
        match w {
            HostMatrix::Quantized(w) => match &few.spread {
                // SAFETY: a `Spread` exists only if the processor has AVX-512.
                Some(spread) => unsafe { quantized_by_128::<M>(w, rows, spread, out) },
                None => quantized::<M>(w, rows, x, out),
            },
            HostMatrix::Dense(w) => dense::<M>(w, rows, x, out),
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn quantized<const M: usize>(w: &QuantizedMatrix, rows: Range<usize>, x: &[f32], out: &mut [f32]) {
        let k = w.cols();
        let codebook = &w.codebook().0;
        // SAFETY: the codebook has 16 values.
        let (low, high) = unsafe { (_mm256_loadu_ps(codebook.as_ptr()), _mm256_loadu_ps(codebook.as_ptr().add(8))) };
        // The first of two codes is in the high nibble of a byte.
        let shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
        let mut in_row = RowBlocks::new(w);
        for (row, out) in rows.zip(out.chunks_exact_mut(M)) {
            let (words, _) = w.codes()[row * k / 2..(row + 1) * k / 2].as_chunks::<4>();
            let mut sums = [_mm256_setzero_ps(); M];
            for (span, scale, min) in in_row.of(row) {
                let (scale, min) = (_mm256_set1_ps(scale), _mm256_set1_ps(min));
                for at in span.step_by(8) {
                    let word = u32::from_le_bytes(words[at / 8]);
                    let codes = _mm256_srlv_epi32(_mm256_set1_epi32(word as i32), shifts);
                    // The permutation looks at three bits; the fourth selects the half of the
                    // codebook.
                    let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
                    let values = _mm256_blendv_ps(
                        _mm256_permutevar8x32_ps(low, codes),
                        _mm256_permutevar8x32_ps(high, codes),
                        upper,
                    );
                    add_products(&mut sums, _mm256_fmadd_ps(values, scale, min), x, k, at);
                }
            }
            total(&sums, out);
        }
    }

    /// Weights per register of codes.
    const CHUNK: usize = 128;
    /// The weight that each nibble of a little-endian word of codes belongs to. The first of two
    /// codes is in the high nibble of a byte.
    const NIBBLES: [usize; 8] = [1, 0, 3, 2, 5, 4, 7, 6];

    /// x in the order that [`quantized_by_128`] reads. For each chunk of a row (padded with
    /// zeros): first the values that meet the lowest nibble of each of 16 words, then those of the
    /// next nibble, and so on. Also the sum of the eight values of each word.
    pub(crate) struct Spread {
        values: Vec<f32>,
        sums: Vec<f32>,
        /// Chunks per row.
        chunks: usize,
    }

    impl Spread {
        /// Prepares x, for rows of whole blocks of a power of two of weights.
        pub(crate) fn of(w: &HostMatrix, x: &[f32]) -> Option<Self> {
            let HostMatrix::Quantized(w) = w else { return None };
            let whole = w.block().is_power_of_two() && w.block() >= 8 && w.cols().is_multiple_of(w.block());
            (whole && is_x86_feature_detected!("avx512f")).then(|| Spread::new(x, w.cols()))
        }

        fn new(x: &[f32], k: usize) -> Self {
            let chunks = k.div_ceil(CHUNK);
            let mut spread = Spread {
                values: vec![0.0; x.len() / k * chunks * CHUNK],
                sums: vec![0.0; x.len() / k * chunks * 16],
                chunks,
            };
            for (row, x) in x.chunks_exact(k).enumerate() {
                let values = &mut spread.values[row * chunks * CHUNK..];
                let sums = &mut spread.sums[row * chunks * 16..];
                for (index, word) in x.as_chunks::<8>().0.iter().enumerate() {
                    let (chunk, lane) = (index / 16, index % 16);
                    for (nibble, &at) in NIBBLES.iter().enumerate() {
                        values[chunk * CHUNK + nibble * 16 + lane] = word[at];
                    }
                    sums[chunk * 16 + lane] = word.iter().sum();
                }
            }
            spread
        }
    }

    /// Like [`quantized`], for rows of whole blocks of a power of two of weights. It takes 16
    /// words of codes at a time, one nibble of each. The permutation looks at four bits, so a code
    /// needs only a shift; scales are applied once per eight products.
    #[target_feature(enable = "avx512f")]
    fn quantized_by_128<const M: usize>(w: &QuantizedMatrix, rows: Range<usize>, spread: &Spread, out: &mut [f32]) {
        let (k, block) = (w.cols(), w.block());
        // SAFETY: the codebook has 16 values.
        let codebook = unsafe { _mm512_loadu_ps(w.codebook().0.as_ptr()) };
        // No load below may go past these.
        assert!(spread.chunks == k.div_ceil(CHUNK) && spread.sums.len() == M * spread.chunks * 16);
        let (values, word_sums, chunks) = (spread.values.as_ptr(), spread.sums.as_ptr(), spread.chunks);
        // The block of a chunk that each word is in.
        let of_block: [i32; 16] = std::array::from_fn(|lane| (8 * lane / block) as i32);
        // SAFETY: there are 16 values.
        let of_block = unsafe { _mm512_loadu_si512(of_block.as_ptr().cast()) };
        let mut in_row = RowBlocks::new(w);
        let has_mins = w.mins().is_some();
        for (row, out) in rows.zip(out.chunks_exact_mut(M)) {
            let codes = &w.codes()[row * k / 2..(row + 1) * k / 2];
            let (scales, mins) = in_row.whole(row);
            let mut sums = [_mm512_setzero_ps(); M];
            for chunk in 0..chunks {
                let words = (k - chunk * CHUNK).min(CHUNK) / 8;
                // SAFETY: the row has this many words left; the other lanes are not loaded.
                let words = unsafe {
                    let mask = ((1u32 << words) - 1) as __mmask16;
                    _mm512_maskz_loadu_epi32(mask, codes.as_ptr().add(chunk * CHUNK / 2).cast())
                };
                let mut products = [_mm512_setzero_ps(); M];
                macro_rules! nibble {
                    ($($nibble:literal)*) => {$(
                        let weights =
                            _mm512_permutexvar_ps(_mm512_srli_epi32::<{ 4 * $nibble }>(words), codebook);
                        for (t, product) in products.iter_mut().enumerate() {
                            // SAFETY: x has M rows of `chunks` chunks.
                            let x = unsafe {
                                _mm512_loadu_ps(values.add((t * chunks + chunk) * CHUNK + 16 * $nibble))
                            };
                            *product = _mm512_fmadd_ps(weights, x, *product);
                        }
                    )*};
                }
                nibble!(0 1 2 3 4 5 6 7);
                let first = chunk * CHUNK / block;
                let each = |values: &[f32]| {
                    // SAFETY: `whole` returns 16 values more than there are blocks.
                    let values = unsafe { _mm512_loadu_ps(values[first..first + 16].as_ptr()) };
                    _mm512_permutexvar_ps(of_block, values)
                };
                let scale = each(scales);
                for (sum, product) in sums.iter_mut().zip(products) {
                    *sum = _mm512_fmadd_ps(product, scale, *sum);
                }
                if has_mins {
                    let min = each(mins);
                    for (t, sum) in sums.iter_mut().enumerate() {
                        // SAFETY: there are 16 sums for each chunk of M rows.
                        let of_words = unsafe { _mm512_loadu_ps(word_sums.add((t * chunks + chunk) * 16)) };
                        *sum = _mm512_fmadd_ps(of_words, min, *sum);
                    }
                }
            }
            for (sum, out) in sums.iter().zip(out) {
                *out = _mm512_reduce_add_ps(*sum);
            }
        }
    }

    /// The blocks of a row, with their scales and minima. Blocks may cross rows.
    struct RowBlocks<'a> {
        w: &'a QuantizedMatrix,
        scales: Vec<f32>,
        mins: Vec<f32>,
    }

    impl<'a> RowBlocks<'a> {
        fn new(w: &'a QuantizedMatrix) -> Self {
            // Plus the values that a register reads past the last block.
            let most = w.cols() / w.block() + 2 + 16;
            RowBlocks { w, scales: vec![0.0; most], mins: vec![0.0; most] }
        }

        /// Decodes the scales and minima of the blocks of a row.
        fn decode(&mut self, row: usize) -> Range<usize> {
            let (k, block) = (self.w.cols(), self.w.block());
            let blocks = row * k / block..((row + 1) * k).div_ceil(block);
            self.w.scales().decode_into(blocks.clone(), &mut self.scales[..blocks.len()]);
            if let Some(mins) = self.w.mins() {
                mins.decode_into(blocks.clone(), &mut self.mins[..blocks.len()]);
            }
            blocks
        }

        /// Scale and minimum of each block, for a row of whole blocks, and 16 further values.
        fn whole(&mut self, row: usize) -> (&[f32], &[f32]) {
            self.decode(row);
            (&self.scales, &self.mins)
        }

        /// Columns, scale and minimum of each block of a row.
        fn of(&mut self, row: usize) -> impl Iterator<Item = (Range<usize>, f32, f32)> {
            let (k, block) = (self.w.cols(), self.w.block());
            let first = row * k;
            let blocks = self.decode(row);
            let start = move |b: usize| (b * block).clamp(first, first + k) - first;
            blocks
                .zip(self.scales.iter().zip(&self.mins))
                .map(move |(b, (&scale, &min))| (start(b)..start(b + 1), scale, min))
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn dense<const M: usize>(w: &DenseMatrix, rows: Range<usize>, x: &[f32], out: &mut [f32]) {
        // SAFETY (of all loads): eight values from a multiple of 8 below rows * cols, itself a
        // multiple of 8.
        match w.data() {
            DenseData::F32(values) => {
                of_eights::<M>(rows, x, out, |at| unsafe { _mm256_loadu_ps(values[at..at + 8].as_ptr()) })
            }
            DenseData::F16(values) => of_eights::<M>(rows, x, out, |at| unsafe {
                _mm256_cvtph_ps(_mm_loadu_si128(values[at..at + 8].as_ptr().cast()))
            }),
            DenseData::Bf16(values) => of_eights::<M>(rows, x, out, |at| unsafe {
                let halves = _mm_loadu_si128(values[at..at + 8].as_ptr().cast());
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
            }),
            DenseData::Q8_0 { codes, scales } => of_eights::<M>(rows, x, out, |at| unsafe {
                let codes = _mm256_cvtepi8_epi32(_mm_loadl_epi64(codes[at..at + 8].as_ptr().cast()));
                let scale = _mm256_cvtph_ps(_mm_set1_epi16(scales[at / Q8_BLOCK].to_bits() as i16));
                _mm256_mul_ps(_mm256_cvtepi32_ps(codes), scale)
            }),
        }
    }

    /// Computes products of rows whose weights come from `decode`: eight at a time, from a flat
    /// index on.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn of_eights<const M: usize>(rows: Range<usize>, x: &[f32], out: &mut [f32], decode: impl Fn(usize) -> __m256) {
        let k = x.len() / M;
        for (row, out) in rows.zip(out.chunks_exact_mut(M)) {
            let mut sums = [_mm256_setzero_ps(); M];
            for at in (0..k).step_by(8) {
                add_products(&mut sums, decode(row * k + at), x, k, at);
            }
            total(&sums, out);
        }
    }

    /// Adds to each row's sums the products of eight weights with its values from column `at` on.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn add_products<const M: usize>(sums: &mut [__m256; M], weights: __m256, x: &[f32], k: usize, at: usize) {
        for (t, sum) in sums.iter_mut().enumerate() {
            // SAFETY: at + 8 <= k, and x has M rows of k.
            let x = unsafe { _mm256_loadu_ps(x.as_ptr().add(t * k + at)) };
            *sum = _mm256_fmadd_ps(weights, x, *sum);
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn total<const M: usize>(sums: &[__m256; M], out: &mut [f32]) {
        for (sum, out) in sums.iter().zip(out) {
            let mut lanes = [0.0f32; 8];
            // SAFETY: there is room for eight values.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), *sum) };
            *out = lanes.iter().sum();
        }
    }
}
