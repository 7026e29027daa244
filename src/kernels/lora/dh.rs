//! G = s * dY * B: [M, r] from dY [M, N] and B [N, r]. G is the gradient of H = X * A^T in Y = X *
//! W^T + s * H * B^T.
//!
//! Computed in f32; with cooperative matrices in f16, with powers of two and f32 sums, so that
//! gradients of 1e-8 keep their accuracy.

use super::coop::{self, Large, Operands, Small};
use super::down::Tile;
use crate::device::{Dispatch, Gpu};
use crate::error::Result;
use crate::kernels::cpu::product::{Columns, View, parallelism};
use crate::kernels::matrix::is_ragged;
use crate::kernels::{RowFactors, Rows, expect_2d, expect_shape, kernel, params};
use crate::tensor::{Storage, Tensor};

const OP: &str = "lora_dh";

params! {
    struct LoraDhParams {
        first_group: u32,
        groups: u32,
        /// N of the layer: the contracted values.
        k: u32,
        /// M.
        rows: u32,
        rank: u32,
        /// Workgroups along the rank.
        rank_groups: u32,
        /// s.
        scale: f32,
    }
}

kernel! {
    KERNEL = "lora_dh" in "lora/dh.wgsl", LoraDhParams, [dy: Read, b: Read, g: Write],
    variants: |tier| Tile::variants(tier, 1, &[false]),
    twin: tests::twin,
}

/// Computes s * dY * B on the device of `dy`: [M, r].
///
/// # Errors
/// `Error::Shape`(crate::Error::Shape), `Error::DeviceMismatch`(crate::Error::DeviceMismatch),
/// and device errors.
pub fn lora_dh(dy: &Tensor, b: &Tensor, scale: f32) -> Result<Tensor> {
    of_rows(Rows { tensor: dy, factors: &RowFactors::default() }, b, scale)
}

/// Like [`lora_dh`], for a dY that other kernels also read.
pub(crate) fn of_rows(dy: Rows<'_>, b: &Tensor, scale: f32) -> Result<Tensor> {
    let Rows { tensor, .. } = dy;
    let (m, n) = expect_2d(OP, "dY", tensor)?;
    let (_, rank) = expect_2d(OP, "B", b)?;
    expect_shape(OP, "B", b, &[n, rank])?;
    tensor.device().same(&b.device(), OP)?;
    match tensor.storage() {
        Storage::Cpu(cpu, dy) => {
            let mut g = cpu.zeros(m * rank)?;
            let left = View { data: dy, row_stride: n, col_stride: 1 };
            let right = View { data: b.host(OP)?, row_stride: rank, col_stride: 1 };
            Columns::new(&mut g, m, rank).product(left, right, n, scale, false, parallelism(m * rank * n));
            Ok(Tensor::from_host(cpu, &[m, rank], g))
        }
        Storage::Gpu(gpu, _) => dispatch(gpu, dy, b, [m, n, rank], scale),
        Storage::Planned(cpu, _) => Tensor::planned(cpu, &[m, rank]),
    }
}

fn dispatch(gpu: &Gpu, dy: Rows<'_>, b: &Tensor, [m, n, rank]: [usize; 3], scale: f32) -> Result<Tensor> {
    if m == 0 || n == 0 || rank == 0 {
        return Tensor::zeros(&dy.tensor.device(), &[m, rank]);
    }
    if let Some(cooperative) = coop::of(gpu, m) {
        let dy = Large { rows: dy, along: true, dropout: None };
        let operands = Operands::LargeLeft(dy, Small { tensor: b, along: false });
        return coop::product(gpu, cooperative, "g", operands, scale);
    }
    let g = Tensor::uninit(gpu, "g", &[m, rank])?;
    let tile = Tile::of(gpu, [m, n], 1);
    let rank_groups = (rank as u32).div_ceil(tile.ranks);
    let params =
        LoraDhParams { k: n as u32, rows: m as u32, rank: rank as u32, rank_groups, scale, ..Default::default() };
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &tile.defines(gpu.tier(), 1, is_ragged(n), false),
        buffers: &[dy.tensor.buffer(gpu, OP)?, b.buffer(gpu, OP)?, g.buffer(gpu, OP)?],
        params: bytemuck::bytes_of(&params),
        groups: m.div_ceil(tile.tokens as usize) as u64 * u64::from(rank_groups),
        flops_per_group: 2 * u64::from(tile.tokens * tile.ranks) * n as u64,
    })?;
    Ok(g)
}

/// The formula, for any real type.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(dy: &[T], b: &[T], [m, n, rank]: [usize; 3], scale: T) -> Vec<T> {
    let value = |i: usize, j: usize| (0..n).map(|e| dy[i * n + e] * b[e * rank + j]).sum::<T>() * scale;
    (0..m * rank).map(|at| value(at / rank, at % rank)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::Device;
    use crate::testing;

    fn check(device: &Device, [m, n, rank]: [usize; 3], amplitude: f32, seed: u64) {
        let dy = testing::values(seed, m * n, amplitude);
        let b = testing::values(seed + 1, n * rank, 1.0);
        let tensor = |shape: &[usize], values: &[f32]| Tensor::from_slice(device, shape, values).unwrap();
        let g = lora_dh(&tensor(&[m, n], &dy), &tensor(&[n, rank], &b), 0.5).unwrap();
        assert_eq!(g.shape(), [m, rank]);
        let (wanted, terms) = testing::with_terms([&dy, &b], |[dy, b]| reference(dy, b, [m, n, rank], 0.5));
        let bounds = coop::tolerance(device, m).bounds(&terms);
        let context = format!("{} M={m} N={n} r={rank} dY {amplitude}", testing::name(device));
        testing::assert_close(&context, &g.to_vec().unwrap(), &wanted, &bounds);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
        #[test]
        fn odd_shapes_on_every_device_and_tier(
            m in 1..=257usize,
            n in prop_oneof![1..=257usize, (1..=32usize).prop_map(|words| 8 * words)],
            rank in prop_oneof![1..=40usize, Just(130usize)],
            seed in 0..1000u64,
        ) {
            for device in testing::devices() {
                check(&device, [m, n, rank], 1.0, seed);
            }
        }
    }

    pub fn twin(device: &Device) {
        for shape in [[3, 8, 0], [0, 8, 2], [3, 64, 16], [40, 640, 16]] {
            for amplitude in [1e-8, 1e4] {
                check(device, shape, amplitude, 1);
            }
        }
    }

    /// <dH, G> for a step dH along H equals the change of <dY, Y>, with Y = s * H * B^T.
    #[test]
    fn the_reference_is_the_gradient_of_the_forward() {
        let [m, n, rank] = [3, 5, 2];
        let wide = |seed, len| testing::values(seed, len, 1.0).into_iter().map(f64::from).collect::<Vec<f64>>();
        let (dy, b, h) = (wide(1, m * n), wide(2, n * rank), wide(3, m * rank));
        let up = |h: &[f64]| crate::kernels::lora::down::reference(h, &b, [m, n, rank], None);
        let objective = |h: &[f64]| up(h).iter().zip(&dy).map(|(y, dy)| 0.5 * y * dy).sum::<f64>();
        testing::assert_gradient("H", &h, &reference(&dy, &b, [m, n, rank], 0.5), objective);
    }

    #[test]
    fn shapes_that_disagree_are_named() {
        let zeros = |shape: &[usize]| Tensor::zeros(&Device::cpu(), shape).unwrap();
        assert_eq!(
            lora_dh(&zeros(&[2, 3]), &zeros(&[4, 1]), 1.0).unwrap_err().to_string(),
            "lora_dh: B: expected [3, 1], got [4, 1]"
        );
        assert_eq!(
            lora_dh(&zeros(&[2]), &zeros(&[2, 1]), 1.0).unwrap_err().to_string(),
            "lora_dh: dY: expected [rows, columns], got [2]"
        );
    }
}
