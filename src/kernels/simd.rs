//! Dot products for the CPU device, straight from packed codes: AVX2 where the processor has it, plain Rust elsewhere.

use std::ops::Range;

use super::matrix::HostMatrix;
use super::qmatmul_operands::GEMV_ROWS;
use crate::quant::QuantizedMatrix;

/// out[row, t] = W[row, :] . x[t, :] for `rows` of W; `x` is [M, K] with M <= [`GEMV_ROWS`], `out` [rows, M].
pub(crate) fn gemv(w: &HostMatrix, rows: Range<usize>, x: &[f32], out: &mut [f32]) {
    let k = w.cols();
    let m = x.len() / k;
    debug_assert!(m <= GEMV_ROWS && out.len() == rows.len() * m);
    #[cfg(target_arch = "x86_64")]
    if let HostMatrix::Quantized(matrix) = w
        && k.is_multiple_of(8)
        && matrix.mins().is_none()
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
    {
        // SAFETY: the processor has AVX2 and FMA.
        unsafe { packed::gemv(matrix, rows, x, out) };
        return;
    }
    let mut row_values = vec![0.0; k];
    for (row, out) in rows.zip(out.chunks_mut(m)) {
        w.dequantize_rows(row..row + 1, &mut row_values);
        for (out, x) in out.iter_mut().zip(x.chunks(k)) {
            *out = dot(&row_values, x);
        }
    }
}

/// The sum of products, in eight partial sums, which compilers turn into vectors.
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

    /// [`super::gemv`] for K a multiple of 8, without minima.
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn gemv(w: &QuantizedMatrix, rows: Range<usize>, x: &[f32], out: &mut [f32]) {
        match x.len() / w.cols() {
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

    #[target_feature(enable = "avx2,fma")]
    fn rows_of<const M: usize>(w: &QuantizedMatrix, rows: Range<usize>, x: &[f32], out: &mut [f32]) {
        let (k, block) = (w.cols(), w.block());
        // No slice below may end before its last load.
        assert!(k % 8 == 0 && x.len() == M * k && out.len() == rows.len() * M);
        let codebook = &w.codebook().0;
        // SAFETY: the codebook has 16 values.
        let (low, high) = unsafe { (_mm256_loadu_ps(codebook.as_ptr()), _mm256_loadu_ps(codebook.as_ptr().add(8))) };
        // The first of two codes is in a byte's high nibble.
        let shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
        let mut scales = vec![0.0f32; k / block + 2];
        for (row, out) in rows.zip(out.chunks_exact_mut(M)) {
            let first = row * k;
            let blocks = first / block..(first + k).div_ceil(block);
            let scales = &mut scales[..blocks.len()];
            w.scales().decode_into(blocks, scales);
            let (words, _) = w.codes()[first / 2..(first + k) / 2].as_chunks::<4>();
            let mut sums = [_mm256_setzero_ps(); M];
            let mut start = 0;
            for &scale in &*scales {
                // Where the block ends in this row: blocks may cross rows, but their borders are multiples of 8.
                let end = ((first + start) / block * block + block - first).min(k);
                let mut of_block = [_mm256_setzero_ps(); M];
                for at in (start..end).step_by(8) {
                    let word = u32::from_le_bytes(words[at / 8]);
                    let codes = _mm256_srlv_epi32(_mm256_set1_epi32(word as i32), shifts);
                    // The permutation looks at three bits; the fourth chooses the half of the codebook.
                    let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
                    let values = _mm256_blendv_ps(
                        _mm256_permutevar8x32_ps(low, codes),
                        _mm256_permutevar8x32_ps(high, codes),
                        upper,
                    );
                    for (t, sum) in of_block.iter_mut().enumerate() {
                        // SAFETY: at + 8 <= k, and x has M rows of k.
                        let x = unsafe { _mm256_loadu_ps(x.as_ptr().add(t * k + at)) };
                        *sum = _mm256_fmadd_ps(values, x, *sum);
                    }
                }
                for t in 0..M {
                    sums[t] = _mm256_fmadd_ps(of_block[t], _mm256_set1_ps(scale), sums[t]);
                }
                start = end;
            }
            for t in 0..M {
                let mut lanes = [0.0f32; 8];
                // SAFETY: there is room for eight values.
                unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sums[t]) };
                out[t] = lanes.iter().sum();
            }
        }
    }
}
