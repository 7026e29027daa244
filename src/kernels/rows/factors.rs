//! A matrix whose rows several kernels stage as f16. Its row factors and packed rows are computed
//! once.

use std::sync::{Arc, OnceLock};

use super::pack_rows;
use super::row_factor;
use crate::device::{Buffer, Gpu};
use crate::error::Result;
use crate::kernels::expect_2d;
use crate::tensor::Tensor;

/// Factors of a matrix's rows, and on devices with cooperative matrices the rows as f16. The first
/// kernel that stages the matrix computes them, and clones share them. They belong to one matrix,
/// whose values must not change.
#[derive(Clone, Default)]
pub(crate) struct RowFactors {
    factors: Arc<OnceLock<Buffer>>,
    packed: Arc<OnceLock<Buffer>>,
}

impl RowFactors {
    /// Returns the factors alone, for a backward pass: packed rows would occupy memory until then.
    pub fn without_rows(&self) -> RowFactors {
        RowFactors { factors: self.factors.clone(), ..RowFactors::default() }
    }
}

/// A matrix that several kernels may stage.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub tensor: &'a Tensor,
    pub factors: &'a RowFactors,
}

impl<'a> Rows<'a> {
    /// Returns the factors; computes them if they aren't there yet.
    pub fn found(self, gpu: &Gpu, op: &'static str) -> Result<&'a Buffer> {
        let RowFactors { factors, .. } = self.factors;
        if let Some(found) = factors.get() {
            return Ok(found);
        }
        let (rows, k) = self.shape(op)?;
        let found = gpu.alloc("row factors", rows as u64 * 4)?;
        row_factor::dispatch(gpu, self.tensor.buffer(gpu, op)?, &found, [rows, k])?;
        Ok(factors.get_or_init(|| found))
    }

    /// Returns the factors for a kernel that runs beside a product with the same matrix. If the
    /// product reads packed rows, one pass computes both.
    pub fn found_beside_product(self, gpu: &Gpu, op: &'static str) -> Result<&'a Buffer> {
        if self.factors.factors.get().is_none() && gpu.cooperative().is_some() {
            self.packed(gpu, op)?;
        }
        self.found(gpu, op)
    }

    /// Returns the rows as f16 for cooperative matrices, and their factors; packs them if they
    /// aren't there yet.
    pub fn packed(self, gpu: &Gpu, op: &'static str) -> Result<[&'a Buffer; 2]> {
        let RowFactors { factors, packed } = self.factors;
        if let (Some(rows), Some(found)) = (packed.get(), factors.get()) {
            return Ok([rows, found]);
        }
        let (rows, k) = self.shape(op)?;
        let found = gpu.alloc("row factors", rows as u64 * 4)?;
        let new = gpu.alloc("packed rows", 4 * pack_rows::words(rows, k) as u64)?;
        pack_rows::dispatch(gpu, self.tensor.buffer(gpu, op)?, [&found, &new], [rows, k])?;
        Ok([packed.get_or_init(|| new), factors.get_or_init(|| found)])
    }

    fn shape(self, op: &'static str) -> Result<(usize, usize)> {
        expect_2d(op, "a matrix with row factors", self.tensor)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use half::f16;

    use super::*;
    use crate::device::Device;
    use crate::kernels::rows::pack_rows::PACKED;
    use crate::tensor::from_bytes;
    use crate::testing;

    #[test]
    fn clones_share_what_the_first_reader_finds() {
        for device in testing::gpus() {
            let Device::Gpu(gpu) = &device else { continue };
            let (tensor, factors) = (Tensor::zeros(&device, &[3, 8]).unwrap(), RowFactors::default());
            let clone = factors.clone();
            let [first, second] =
                [&factors, &clone].map(|factors| Rows { tensor: &tensor, factors }.found(gpu, "test").unwrap());
            assert!(std::ptr::eq(first, second), "{device:?}");
        }
    }

    pub fn twin(device: &Device) {
        let Device::Gpu(gpu) = device else { return };
        let largest = [0.0, 1e-38, 2e-38, 1e-8, 0.3, 1.0, 2.0, 1e5, 3e38];
        let rows = largest.len();
        // Short and long rows, with and without a multiple of 4 values; the largest value is
        // the last or another one.
        for k in [2, 3, 4, 16, 77, 80, 576, 1533, 1536, 5000] {
            for at in [k / 3, k - 1] {
                let value = |i: usize| {
                    let below = if i % k == at { 1.0 } else { [0.9, -0.25, 0.1][i * 7 / 3 % 3] };
                    largest[i / k] * below * [1.0, -1.0][i % 2]
                };
                let x: Vec<f32> = (0..rows * k).map(value).collect();
                let tensor = Tensor::from_slice(device, &[rows, k], &x).unwrap();
                let own = RowFactors::default();
                let operand = Rows { tensor: &tensor, factors: &own };
                let found = operand.found(gpu, "test").unwrap();
                let found: Vec<f32> = from_bytes(&gpu.read(found, 4 * rows as u64).unwrap());
                let wanted: Vec<f32> = x.chunks(k).map(row_factor::reference).collect();
                assert_eq!(found, wanted, "{device:?} K={k}");
                if gpu.cooperative().is_none() {
                    continue;
                }
                let [packed, found] = operand.packed(gpu, "test").unwrap();
                let found: Vec<f32> = from_bytes(&gpu.read(found, 4 * rows as u64).unwrap());
                assert_eq!(found, wanted, "{device:?} K={k}, packed");
                let bytes = gpu.read(packed, 4 * pack_rows::words(rows, k) as u64).unwrap();
                let packed: Vec<f16> =
                    bytes.chunks_exact(2).map(|pair| f16::from_le_bytes([pair[0], pair[1]])).collect();
                for ((row, factor), packed) in x.chunks(k).zip(&wanted).zip(packed.chunks(k.next_multiple_of(PACKED))) {
                    let (values, zeros) = packed.split_at(k);
                    // Drivers may treat subnormal values as zero.
                    let is = |(value, &got): (&f32, &f16)| {
                        got == f16::from_f32(value * factor) || value.abs() < f32::MIN_POSITIVE && got == f16::ZERO
                    };
                    assert!(row.iter().zip(values).all(is), "{device:?} K={k}: {row:?} packed as {values:?}");
                    assert!(zeros.iter().all(|&zero| zero == f16::ZERO), "{device:?} K={k}: padded by {zeros:?}");
                }
            }
        }
        assert_eq!(row_factor::reference(&[0.0, -1.5]) * 1.5, 12288.0);
    }
}
