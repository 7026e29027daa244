//! OUT [P, Q] = s * the sum over tokens m of L[m, p] * R[m, q], with dropout on R: the gradients
//! of an adapter's weights.
//!
//! | gradient | L | R | s |
//! |---|---|---|---|
//! | dA [r, K] | G = s * dY * B, [M, r] | X [M, K], with the forward's dropout | 1 |
//! | dB [N, r] | dY [M, N] | H = dropout(X) * A^T, [M, r] | s |
//!
//! Computed in f32; with cooperative matrices in f16, with powers of two and f32 sums. Many tokens
//! are summed in parts that a second pass adds up in a fixed order, so every run gives the same
//! bits.

use super::coop::{self, Large, Operands, Small};
use crate::device::{Defines, Dispatch, Gpu, Tier};
use crate::error::{Error, Result};
use crate::kernels::cpu::product::{Columns, View, parallelism};
use crate::kernels::elementwise::dropout::Dropout;
use crate::kernels::qmatmul::lanes::one_subgroup;
use crate::kernels::rows::column_sum::{self, rows_each};
use crate::kernels::{RowFactors, Rows, Scratch, expect_2d, kernel, params};
use crate::tensor::{Storage, Tensor};

const OP: &str = "lora_dw";

params! {
    struct LoraDwParams {
        first_group: u32,
        groups: u32,
        /// M.
        tokens: u32,
        /// Tokens per part.
        tokens_each: u32,
        /// Columns of the wider operand.
        wide: u32,
        /// Columns of the narrower operand.
        narrow: u32,
        /// Workgroups along the wider operand.
        wide_groups: u32,
        /// Workgroups along the narrower operand.
        narrow_groups: u32,
        /// Stride in OUT from one column of the wider operand to the next, in values.
        wide_stride: u32,
        /// The same for the narrower operand.
        narrow_stride: u32,
        /// s.
        scale: f32,
        /// Lower half of the dropout's seed, then the upper half.
        seed_low: u32,
        seed_high: u32,
        /// Values with a hash below this are dropped.
        drop_below: u32,
        /// 1 / (1 - p).
        keep_scale: f32,
    }
}

kernel! {
    KERNEL = "lora_dw" in "lora/dw.wgsl", LoraDwParams, [wide: Read, narrow: Read, out: Write],
    variants: variants,
    twin: tests::twin,
}

/// Computes s * L^T * dropout(R) on the device of `l`: [P, Q].
///
/// # Errors
/// [`Error::Shape`], [`Error::DeviceMismatch`], [`Error::Invalid`] for a dropout probability
/// outside 0..1, and device errors.
pub fn lora_dw(l: &Tensor, r: &Tensor, scale: f32, dropout: Option<Dropout>) -> Result<Tensor> {
    let factors = RowFactors::default();
    let drops = dropout.is_some_and(|dropout| dropout.probability != 0.0);
    let shared = if l.shape().last() > r.shape().last() && !drops { Shared::L(&factors) } else { Shared::R(&factors) };
    run(l, r, shared, scale, dropout)
}

/// Computes dA = G^T * dropout(X), for an X that other kernels also read.
pub(crate) fn of_a(g: &Tensor, x: Rows<'_>, dropout: Option<Dropout>) -> Result<Tensor> {
    run(g, x.tensor, Shared::R(x.factors), 1.0, dropout)
}

/// Computes dB = s * dY^T * H, for a dY that other kernels also read.
pub(crate) fn of_b(dy: Rows<'_>, h: &Tensor, scale: f32) -> Result<Tensor> {
    run(dy.tensor, h, Shared::L(dy.factors), scale, None)
}

/// Which operand is the larger one, and the factors of its rows. With dropout it is R.
#[derive(Clone, Copy)]
enum Shared<'a> {
    L(&'a RowFactors),
    R(&'a RowFactors),
}

fn run(l: &Tensor, r: &Tensor, shared: Shared<'_>, scale: f32, dropout: Option<Dropout>) -> Result<Tensor> {
    let (m, rows) = expect_2d(OP, "L", l)?;
    let (r_m, cols) = expect_2d(OP, "R", r)?;
    if m != r_m {
        return Err(Error::shape(OP, "rows of R", format!("{m}, as in L"), r_m));
    }
    l.device().same(&r.device(), OP)?;
    let dropout = dropout.map_or(Ok(None), |dropout| dropout.active(OP))?;
    match l.storage() {
        Storage::Cpu(cpu, l) => {
            let mut out = cpu.zeros(rows * cols)?;
            let mut r = r.host(OP)?;
            let mut dropped;
            if let Some(dropout) = dropout {
                dropped = cpu.zeros(r.len())?;
                dropout.apply(r, &mut dropped);
                r = &dropped;
            }
            let left = View { data: l, row_stride: 1, col_stride: rows };
            let right = View { data: r, row_stride: cols, col_stride: 1 };
            Columns::new(&mut out, rows, cols).product(left, right, m, scale, false, parallelism(m * rows * cols));
            Ok(Tensor::from_host(cpu, &[rows, cols], out))
        }
        Storage::Gpu(gpu, _) => dispatch(gpu, [l, r], shared, scale, dropout),
        Storage::Planned(cpu, _) => Scratch::kept(dropout.map(|_| r.len())).beside(cpu, &[rows, cols]),
    }
}

/// Maximum values of all partial gradients together: 32 MiB.
const MAX_PARTIAL_VALUES: usize = 8 << 20;

/// The piece of OUT that an invocation owns, and how it is computed.
#[derive(Clone, Copy)]
struct Tile {
    /// Columns of the wider operand per invocation.
    columns: u32,
    /// Columns of the narrower operand per invocation.
    ranks: u32,
    threads: u32,
    /// Whether the lanes of a software driver share what they load.
    share: bool,
}

/// Tokens at a time, where lanes share what they load.
const STEPS: u32 = 4;

impl Tile {
    /// The tile for `narrow` columns of the narrower operand.
    fn new(tier: Tier, narrow: usize, share: bool) -> Tile {
        let (ranks, threads) = match tier {
            Tier::Software if share && narrow > 8 => (16, 8),
            Tier::Software => (8, 8),
            _ => (8, 64),
        };
        Tile { columns: 4, ranks, threads, share: share && tier == Tier::Software }
    }

    fn defines(self, dropout: &'static str) -> Defines {
        Defines::new()
            .with("columns", self.columns)
            .with("ranks", self.ranks)
            .with("threads", self.threads)
            .with("share", self.share)
            .with("steps", STEPS)
            .with("dropout", dropout)
    }
}

/// Text constants of every variant.
fn variants(tier: Tier) -> Vec<Defines> {
    let tiles = [(8, false), (8, true), (16, true)].map(|(narrow, share)| Tile::new(tier, narrow, share));
    tiles.iter().flat_map(|tile| ["none", "wide", "narrow"].map(|dropout| tile.defines(dropout))).collect()
}

/// Division of the work.
struct Division {
    tile: Tile,
    /// Workgroups along the wider operand.
    wide_groups: usize,
    /// Workgroups along the narrower operand.
    narrow_groups: usize,
    /// Tokens per part.
    each: usize,
    parts: usize,
}

impl Division {
    /// Divides OUT [rows, cols], neither of them 0, computed from `m` tokens.
    fn of(gpu: &Gpu, m: usize, rows: usize, cols: usize) -> Division {
        let tile = Tile::new(gpu.tier(), rows.min(cols), one_subgroup(gpu));
        let wide_groups = rows.max(cols).div_ceil((tile.columns * tile.threads) as usize);
        let narrow_groups = rows.min(cols).div_ceil(tile.ranks as usize);
        let most_parts = (MAX_PARTIAL_VALUES / (rows * cols)).max(1);
        let each = rows_each(gpu.tier(), wide_groups * narrow_groups, m).max(m.div_ceil(most_parts));
        Division { tile, wide_groups, narrow_groups, each, parts: m.div_ceil(each) }
    }
}

fn dispatch(
    gpu: &Gpu,
    [l, r]: [&Tensor; 2],
    shared: Shared<'_>,
    scale: f32,
    dropout: Option<Dropout>,
) -> Result<Tensor> {
    let (m, rows, cols) = (l.shape()[0], l.shape()[1], r.shape()[1]);
    if m == 0 || rows == 0 || cols == 0 {
        return Tensor::zeros(&l.device(), &[rows, cols]);
    }
    if let Some(cooperative) = coop::of(gpu, m) {
        let large = |tensor, factors| Large { rows: Rows { tensor, factors }, along: false, dropout };
        let small = |tensor| Small { tensor, along: false };
        let operands = match shared {
            Shared::L(factors) => Operands::LargeLeft(large(l, factors), small(r)),
            Shared::R(factors) => Operands::LargeRight(small(l), large(r, factors)),
        };
        return coop::product(gpu, cooperative, "weight gradient", operands, scale);
    }
    let out = Tensor::uninit(gpu, "weight gradient", &[rows, cols])?;
    let r_is_wide = cols >= rows;
    let (wide, narrow) = if r_is_wide { (r, l) } else { (l, r) };
    let (wide_stride, narrow_stride) = if r_is_wide { (1, cols) } else { (cols, 1) };
    let Division { tile, wide_groups, narrow_groups, each, parts } = Division::of(gpu, m, rows, cols);
    let (seed_low, seed_high, drop_below, keep_scale) = Dropout::params(dropout);
    let params = LoraDwParams {
        tokens: m as u32,
        tokens_each: each as u32,
        wide: rows.max(cols) as u32,
        narrow: rows.min(cols) as u32,
        wide_groups: wide_groups as u32,
        narrow_groups: narrow_groups as u32,
        wide_stride: wide_stride as u32,
        narrow_stride: narrow_stride as u32,
        scale: if parts == 1 { scale } else { 1.0 },
        seed_low,
        seed_high,
        drop_below,
        keep_scale,
        ..Default::default()
    };
    let partial =
        if parts == 1 { None } else { Some(gpu.alloc("partial gradients", (parts * rows * cols * 4) as u64)?) };
    let end = out.buffer(gpu, OP)?;
    let dropped = match dropout {
        None => "none",
        Some(_) if r_is_wide => "wide",
        Some(_) => "narrow",
    };
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &tile.defines(dropped),
        buffers: &[wide.buffer(gpu, OP)?, narrow.buffer(gpu, OP)?, partial.as_ref().unwrap_or(end)],
        params: bytemuck::bytes_of(&params),
        groups: (wide_groups * narrow_groups * parts) as u64,
        flops_per_group: 2 * u64::from(tile.columns * tile.ranks * tile.threads) * each as u64,
    })?;
    if let Some(partial) = partial {
        column_sum::dispatch(gpu, &partial, None, [parts, rows * cols], scale, end, false)?;
    }
    Ok(out)
}

/// The formula, for any real type.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(
    l: &[T],
    r: &[T],
    [m, rows, cols]: [usize; 3],
    scale: T,
    dropout: Option<Dropout>,
) -> Vec<T> {
    let factor = |i: usize| dropout.map_or(T::one(), |dropout| T::of(dropout.factor(i as u32)));
    let value = |p: usize, q: usize| {
        (0..m).map(|e| l[e * rows + p] * r[e * cols + q] * factor(e * cols + q)).sum::<T>() * scale
    };
    (0..rows * cols).map(|at| value(at / cols, at % cols)).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::Device;
    use crate::kernels::lora::dh;
    use crate::kernels::lora::down;
    use crate::testing;

    fn check(device: &Device, shape: [usize; 3], dropout: Option<Dropout>, amplitude: f32, seed: u64) {
        let [m, rows, cols] = shape;
        let l = testing::values(seed, m * rows, amplitude);
        let r = testing::values(seed + 1, m * cols, 1.0);
        let tensor = |shape: &[usize], values: &[f32]| Tensor::from_slice(device, shape, values).unwrap();
        let (l_tensor, r_tensor) = (tensor(&[m, rows], &l), tensor(&[m, cols], &r));
        let out = lora_dw(&l_tensor, &r_tensor, 0.5, dropout).unwrap();
        assert_eq!(out.shape(), [rows, cols]);
        let (wanted, terms) = testing::with_terms([&l, &r], |[l, r]| reference(l, r, shape, 0.5, dropout));
        let bounds = coop::tolerance(device, m).bounds(&terms);
        let context = format!("{} M={m} P={rows} Q={cols} L {amplitude} {dropout:?}", testing::name(device));
        let got = out.to_vec().unwrap();
        testing::assert_close(&context, &got, &wanted, &bounds);
        assert_eq!(got, lora_dw(&l_tensor, &r_tensor, 0.5, dropout).unwrap().to_vec().unwrap(), "{context}: again");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
        #[test]
        fn odd_shapes_on_every_device_and_tier(
            m in 1..=257usize,
            rank in 1..=40usize,
            width in 1..=257usize,
            // Whether this is dA or dB.
            of_a: bool,
            probability in prop_oneof![Just(0.0f32), 0.01..0.99f32],
            seed in 0..1000u64,
        ) {
            let shape = if of_a { [m, rank, width] } else { [m, width, rank] };
            for device in testing::devices() {
                check(&device, shape, Some(Dropout { probability, seed }), 1.0, seed);
            }
        }
    }

    pub fn twin(device: &Device) {
        for (shape, amplitude) in
            [([0, 3, 4], 1.0), ([3, 0, 4], 1.0), ([3, 4, 0], 1.0), ([5, 16, 64], 1e-8), ([5, 64, 16], 1e4)]
        {
            check(device, shape, None, amplitude, 1);
        }
        check(device, [3000, 8, 24], Some(Dropout { probability: 0.2, seed: 4 }), 1e-8, 1);
        check(device, [3000, 24, 1], None, 1e4, 1);
    }

    #[test]
    fn tiny_gradients_survive_beside_rows_of_padding() {
        let (m, rank, cols) = (70, 16, 40);
        // Every third token is padding, without a gradient.
        let mut l = testing::values(1, m * rank, 1e-8);
        l.chunks_mut(3 * rank).for_each(|rows| rows[..rank].fill(0.0));
        for x in [1.0, 1e5] {
            let r = testing::values(2, m * cols, x);
            let (wanted, terms) = testing::with_terms([&l, &r], |[l, r]| reference(l, r, [m, rank, cols], 0.5, None));
            for device in testing::devices() {
                let tensor = |shape: &[usize], values: &[f32]| Tensor::from_slice(&device, shape, values).unwrap();
                let out = lora_dw(&tensor(&[m, rank], &l), &tensor(&[m, cols], &r), 0.5, None).unwrap();
                let bounds = coop::tolerance(&device, m).bounds(&terms);
                let context = format!("{} X x {x}", testing::name(&device));
                testing::assert_close(&context, &out.to_vec().unwrap(), &wanted, &bounds);
            }
        }
    }

    /// The gradients of <dY, Y>, with Y = s * H * B^T and H = dropout(X) * A^T.
    #[test]
    fn the_references_are_the_gradients_of_the_forward() {
        let [m, n, k, rank] = [4, 5, 6, 2];
        let scale = 0.5;
        let dropout = Some(Dropout { probability: 0.4, seed: 9 });
        let wide = |seed, len| testing::values(seed, len, 1.0).into_iter().map(f64::from).collect::<Vec<f64>>();
        let (x, dy, a, b) = (wide(1, m * k), wide(2, m * n), wide(3, rank * k), wide(4, n * rank));
        let down = |a: &[f64]| down::reference(&x, a, [m, rank, k], dropout);
        let objective = |a: &[f64], b: &[f64]| {
            let y = down::reference(&down(a), b, [m, n, rank], None);
            y.iter().zip(&dy).map(|(y, dy)| scale * y * dy).sum::<f64>()
        };
        let g = dh::reference(&dy, &b, [m, n, rank], scale);
        let d_a = reference(&g, &x, [m, rank, k], 1.0, dropout);
        testing::assert_gradient("A", &a, &d_a, |a| objective(a, &b));
        let d_b = reference(&dy, &down(&a), [m, n, rank], scale, None);
        testing::assert_gradient("B", &b, &d_b, |b| objective(&a, b));
    }

    #[test]
    fn bad_input_is_named() {
        let zeros = |shape: &[usize]| Tensor::zeros(&Device::cpu(), shape).unwrap();
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        assert!(message(lora_dw(&zeros(&[2, 3]), &zeros(&[3, 2]), 1.0, None)).contains("rows of R"));
        let all = Some(Dropout { probability: 1.0, seed: 0 });
        assert_eq!(
            message(lora_dw(&zeros(&[2, 3]), &zeros(&[2, 3]), 1.0, all)),
            "lora_dw: the dropout probability is 1; it must be at least 0 and less than 1"
        );
    }
}
