//! factor[m] = the power of two that brings the largest |X[m, :]| into [2^13, 2^14): for f16 staging, so that neither
//! activations of 1e5 nor gradients of 1e-8 are lost. That of a row of zeros is the largest there is, 2^126, and so never the
//! smallest of several rows'.

use super::{kernel, params};
use crate::device::{Buffer, Defines, Dispatch, Gpu};
use crate::error::Result;

params! {
    struct RowFactorParams {
        first_group: u32,
        groups: u32,
        /// K, in values.
        k: u32,
    }
}

kernel! {
    /// `shaders/row_factor.wgsl`
    KERNEL = "row_factor", RowFactorParams, [x: Read, factor: Write]
}

/// Invocations a workgroup; a power of two.
const THREADS: u32 = 64;

/// The variant's text constants.
pub(crate) fn defines() -> Defines {
    Defines::new().with("threads", THREADS)
}

/// The factors of `rows` rows of `k` values.
pub(crate) fn dispatch(gpu: &Gpu, x: &Buffer, rows: usize, k: usize) -> Result<Buffer> {
    let factor = gpu.alloc("row factors", rows as u64 * 4)?;
    let params = RowFactorParams { k: k as u32, ..Default::default() };
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(),
        buffers: &[x, &factor],
        params: bytemuck::bytes_of(&params),
        groups: rows as u64,
        flops_per_group: 2 * k as u64,
    })?;
    Ok(factor)
}

/// The formula for one row.
#[cfg(test)]
pub(crate) fn reference(row: &[f32]) -> f32 {
    let largest = row.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    let exponent = (largest.to_bits() >> 23) as i32;
    f32::from_bits(((127 + 13 + 127 - exponent).clamp(1, 253) as u32) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::tensor::{Tensor, from_bytes};
    use crate::testing;

    #[test]
    fn factors_bring_every_row_into_the_range_of_f16() {
        let k = 77;
        let largest = [0.0, 1e-38, 2e-38, 1e-8, 0.3, 1.0, 2.0, 1e5, 3e38];
        let x: Vec<f32> = (0..largest.len() * k)
            .map(|i| largest[i / k] * [1.0, -0.25, 0.1, -1.0][i * 7 / 3 % 4] * ((i % k) as f32 / (k - 1) as f32))
            .collect();
        for device in testing::gpus() {
            let Device::Gpu(gpu) = &device else { continue };
            let tensor = Tensor::from_slice(&device, &[largest.len(), k], &x).unwrap();
            let factors = dispatch(gpu, tensor.buffer(gpu, "test").unwrap(), largest.len(), k).unwrap();
            let factors = from_bytes(&gpu.read(&factors, 4 * largest.len() as u64).unwrap());
            for (row, factor) in x.chunks(k).zip(factors) {
                assert_eq!(factor, reference(row), "{device:?}: {row:?}");
            }
        }
        assert_eq!(reference(&[0.0, -1.5]) * 1.5, 12288.0);
    }
}
