//! factor[m] = the power of two that brings the largest |X[m, :]| into [2^13, 2^14): for f16 staging, so that neither
//! activations of 1e5 nor gradients of 1e-8 are lost. That of a row of zeros is the largest there is, 2^126, and so never the
//! smallest of several rows'.

use std::sync::{Arc, OnceLock};

use super::{expect_2d, kernel, params};
use crate::device::{Buffer, Defines, Dispatch, Gpu};
use crate::error::Result;
use crate::tensor::Tensor;

params! {
    struct RowFactorParams {
        first_group: u32,
        groups: u32,
        /// K, in values.
        k: u32,
        /// M.
        rows: u32,
    }
}

kernel! {
    /// `shaders/row_factor.wgsl`
    KERNEL = "row_factor", RowFactorParams, [x: Read, factor: Write]
}

/// Invocations a workgroup, at least; a power of two.
const THREADS: u32 = 64;
/// The fewest and the most that own a row; powers of two.
const TEAMS: [u32; 2] = [4, 256];
/// Values that one of them reads at a time, about.
const EACH: usize = 16;

/// The invocations that own a row of `k` values.
fn team(k: usize) -> u32 {
    let [fewest, most] = TEAMS;
    k.div_ceil(EACH).next_power_of_two().clamp(fewest as usize, most as usize) as u32
}

/// The variant's text constants. `quads`: rows are whole quads, and are read four values at a time.
fn defines(team: u32, quads: bool) -> Defines {
    Defines::new().with("threads", THREADS.max(team)).with("team", team).with("quads", quads)
}

/// Every variant's text constants, for the registry test.
pub(crate) fn variants() -> Vec<Defines> {
    let [fewest, most] = TEAMS.map(u32::trailing_zeros);
    (fewest..=most).flat_map(|log| [false, true].map(|quads| defines(1 << log, quads))).collect()
}

/// The factors of a matrix's rows. The first kernel that stages the matrix finds them, and clones share them. They are those of
/// one matrix, whose values stay as they are.
#[derive(Clone, Default)]
pub(crate) struct RowFactors(Arc<OnceLock<Buffer>>);

/// A matrix that several kernels may stage.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub tensor: &'a Tensor,
    pub factors: &'a RowFactors,
}

impl<'a> Rows<'a> {
    /// The factors, which are found now unless they are there.
    pub fn found(self, gpu: &Gpu, op: &'static str) -> Result<&'a Buffer> {
        let RowFactors(found) = self.factors;
        if let Some(factors) = found.get() {
            return Ok(factors);
        }
        let (rows, k) = expect_2d(op, "a matrix with row factors", self.tensor)?;
        let factors = dispatch(gpu, self.tensor.buffer(gpu, op)?, rows, k)?;
        Ok(found.get_or_init(|| factors))
    }
}

/// The factors of `rows` rows of `k` values.
fn dispatch(gpu: &Gpu, x: &Buffer, rows: usize, k: usize) -> Result<Buffer> {
    let factor = gpu.alloc("row factors", rows as u64 * 4)?;
    let team = team(k);
    let group_rows = THREADS.max(team) / team;
    let params = RowFactorParams { k: k as u32, rows: rows as u32, ..Default::default() };
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(team, k.is_multiple_of(4)),
        buffers: &[x, &factor],
        params: bytemuck::bytes_of(&params),
        groups: rows.div_ceil(group_rows as usize) as u64,
        flops_per_group: 2 * u64::from(group_rows) * k as u64,
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

    #[test]
    fn factors_bring_every_row_into_the_range_of_f16() {
        let largest = [0.0, 1e-38, 2e-38, 1e-8, 0.3, 1.0, 2.0, 1e5, 3e38];
        let rows = largest.len();
        for device in testing::gpus() {
            let Device::Gpu(gpu) = &device else { continue };
            // Short rows and long ones, of whole quads and not; the largest value is the last or another one.
            for k in [2, 3, 4, 16, 77, 80, 576, 1533, 1536, 5000] {
                for at in [k / 3, k - 1] {
                    let value = |i: usize| {
                        let below = if i % k == at { 1.0 } else { [0.9, -0.25, 0.1][i * 7 / 3 % 3] };
                        largest[i / k] * below * [1.0, -1.0][i % 2]
                    };
                    let x: Vec<f32> = (0..rows * k).map(value).collect();
                    let tensor = Tensor::from_slice(&device, &[rows, k], &x).unwrap();
                    let factors = dispatch(gpu, tensor.buffer(gpu, "test").unwrap(), rows, k).unwrap();
                    let factors = from_bytes(&gpu.read(&factors, 4 * rows as u64).unwrap());
                    let wanted: Vec<f32> = x.chunks(k).map(reference).collect();
                    assert_eq!(factors, wanted, "{device:?} K={k}");
                }
            }
        }
        assert_eq!(reference(&[0.0, -1.5]) * 1.5, 12288.0);
    }
}
