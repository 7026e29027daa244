//! H = dropout(X) * A^T: [M, r] from X [M, K] and A [r, K].

use super::coop::{self, Large, Operands, Small};
use crate::device::{Defines, Dispatch, Gpu, Tier};
use crate::error::Result;
use crate::kernels::cpu::product::{Columns, View, parallelism};
use crate::kernels::elementwise::dropout::Dropout;
use crate::kernels::matrix::is_ragged;
use crate::kernels::qmatmul::lanes::one_subgroup;
use crate::kernels::{RowFactors, Rows, Scratch, expect_2d, expect_shape, kernel, params};
use crate::tensor::{Storage, Tensor};

const OP: &str = "lora_down";

params! {
    struct LoraDownParams {
        first_group: u32,
        groups: u32,
        /// K, in values.
        k: u32,
        /// M.
        rows: u32,
        rank: u32,
        /// Workgroups along the rank.
        rank_groups: u32,
        /// Lower and upper half of the dropout seed of the first A, then of the second and third.
        seed_low: u32,
        seed_high: u32,
        seed_low1: u32,
        seed_high1: u32,
        seed_low2: u32,
        seed_high2: u32,
        /// Values with a hash below this are dropped.
        drop_below: u32,
        /// 1 / (1 - p).
        keep_scale: f32,
    }
}

kernel! {
    KERNEL = "lora_down" in "lora/down.wgsl", LoraDownParams, [x: Read, a: Read, a1: Read, a2: Read, h: Write, h1: Write, h2: Write],
    variants: |tier| Tile::variants(tier, MOST_PARTS, &[false, true]),
    twin: tests::twin,
}

/// Computes dropout(X) * A^T on the device of `x`: [M, r].
///
/// # Errors
/// `Error::Shape`, `Error::DeviceMismatch`, `Error::Invalid` for a probability outside 0..1.
pub fn lora_down(x: &Tensor, a: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
    of_rows(Rows { tensor: x, factors: &RowFactors::default() }, a, dropout)
}

/// Like [`lora_down`], for an X that other kernels also read.
pub(crate) fn of_rows(rows: Rows<'_>, a: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
    let x = rows.tensor;
    let (m, k) = expect_2d(OP, "x", x)?;
    let (rank, _) = expect_2d(OP, "A", a)?;
    expect_shape(OP, "A", a, &[rank, k])?;
    x.device().same(&a.device(), OP)?;
    let dropout = dropout.map_or(Ok(None), |dropout| dropout.active(OP))?;
    match x.storage() {
        Storage::Cpu(cpu, x) => {
            let mut h = cpu.zeros(m * rank)?;
            let mut dropped;
            let x: &[f32] = match dropout {
                Some(dropout) => {
                    dropped = cpu.zeros(m * k)?;
                    dropout.apply(x, &mut dropped);
                    &dropped
                }
                None => x,
            };
            let left = View { data: x, row_stride: k, col_stride: 1 };
            let right = View { data: a.host(OP)?, row_stride: 1, col_stride: k };
            Columns::new(&mut h, m, rank).product(left, right, k, 1.0, false, parallelism(m * rank * k));
            Ok(Tensor::from_host(cpu, &[m, rank], h))
        }
        Storage::Gpu(gpu, _) => {
            if let Some(cooperative) = coop::of(gpu, m).filter(|_| k > 0 && rank > 0) {
                let x = Large { rows, along: true, dropout };
                let operands = Operands::LargeLeft(x, Small { tensor: a, along: true });
                return coop::product(gpu, cooperative, "h", operands, 1.0);
            }
            dispatch(gpu, x, &[(a, dropout)], [m, k, rank]).map(|mut hs| hs.remove(0))
        }
        Storage::Planned(cpu, _) => Scratch::kept(dropout.map(|_| m * k)).beside(cpu, &[m, rank]),
    }
}

/// Like [`lora_down`], for several A that read the same X.
///
/// # Errors
/// Like [`lora_down`].
pub(crate) fn lora_down_all(rows: Rows<'_>, parts: &[(&Tensor, Option<Dropout>)]) -> Result<Vec<Tensor>> {
    let each = || parts.iter().map(|&(a, dropout)| of_rows(rows, a, dropout)).collect();
    let x = rows.tensor;
    let Storage::Gpu(gpu, _) = x.storage() else { return each() };
    let [(first, dropout), others @ ..] = parts else { return each() };
    let probability = |dropout: &Option<Dropout>| dropout.map_or(0.0, |dropout| dropout.probability);
    let alike = |(a, other): &(&Tensor, _)| a.shape() == first.shape() && probability(other) == probability(dropout);
    let (m, k) = expect_2d(OP, "x", x)?;
    if parts.len() > MOST_PARTS || !others.iter().all(alike) || coop::of(gpu, m).is_some() {
        return each();
    }
    let (rank, _) = expect_2d(OP, "A", first)?;
    let mut active = Vec::new();
    for (a, dropout) in parts {
        expect_shape(OP, "A", a, &[rank, k])?;
        x.device().same(&a.device(), OP)?;
        active.push((*a, dropout.map_or(Ok(None), |dropout| dropout.active(OP))?));
    }
    dispatch(gpu, x, &active, [m, k, rank])
}

/// Maximum number of A per dispatch.
const MOST_PARTS: usize = 3;

/// Rows of X and of A per workgroup on hardware, and its threads.
const TILE: (u32, u32, u32) = (8, 4, 64);
/// The same for few rows of X. These give at most two workgroups per processor, so a workgroup
/// owns little and more threads share it.
const FEW: [(u32, u32); 4] = [(1, 1), (2, 1), (4, 2), (8, 2)];
const FEW_THREADS: u32 = 256;
/// Partial sums of a workgroup without subgroups.
const PARTIAL_SUMS: u32 = 2048;
/// Threads per workgroup on software drivers.
const SOFTWARE_THREADS: u32 = 8;

/// Division of a product with few columns.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    /// Rows that a workgroup owns.
    pub tokens: u32,
    /// Columns that it owns.
    pub ranks: u32,
    threads: u32,
    /// Whether the lanes of a software driver share what they load.
    share: bool,
}

impl Tile {
    /// The tile for `m` rows and `parts` right sides at a time. `share`: workgroups can be one
    /// subgroup of eight, and rows are whole words.
    pub fn new(tier: Tier, m: usize, parts: usize, share: bool) -> Tile {
        if tier != Tier::Software {
            let few = FEW.into_iter().find(|&(tokens, _)| m <= tokens as usize);
            let (tokens, ranks, threads) = few.map_or(TILE, |(tokens, ranks)| (tokens, ranks, FEW_THREADS));
            // Keeps the number of sums per thread about the same.
            let tokens = tokens.min(TILE.0 >> (parts - 1));
            let most = if tier.subgroups() { threads } else { PARTIAL_SUMS / (tokens * ranks) };
            return Tile { tokens, ranks, threads: threads.min(most), share: false };
        }
        let most = if share { 32 / parts.next_power_of_two() } else { 8 };
        let tokens = m.next_power_of_two().min(most) as u32;
        Tile { tokens, ranks: SOFTWARE_THREADS, threads: SOFTWARE_THREADS, share }
    }

    /// Like [`Tile::new`], for a device and rows of `k` values.
    pub fn of(gpu: &Gpu, [m, k]: [usize; 2], parts: usize) -> Tile {
        Tile::new(gpu.tier(), m, parts, one_subgroup(gpu) && !is_ragged(k))
    }

    /// Text constants of the variant.
    pub fn defines(self, tier: Tier, parts: usize, ragged: bool, dropout: bool) -> Defines {
        Defines::new()
            .with("ragged", ragged)
            .with("dropout", dropout)
            .with("software", tier == Tier::Software)
            .with("subgroups", tier.subgroups())
            .with("share", self.share)
            .with("tokens", self.tokens)
            .with("ranks", self.ranks)
            .with("threads", self.threads)
            .with("parts", parts as u32)
    }

    /// Text constants of every variant with up to `parts` right sides.
    pub fn variants(tier: Tier, parts: usize, dropouts: &[bool]) -> Vec<Defines> {
        let mut all = Vec::new();
        for parts in 1..=parts {
            for (share, ragged) in [(false, false), (false, true), (true, false)] {
                for m in [1, 2, 4, 8, 16, 32] {
                    let tile = Tile::new(tier, m, parts, share);
                    all.extend(dropouts.iter().map(|&dropout| tile.defines(tier, parts, ragged, dropout)));
                }
            }
        }
        all
    }
}

/// Computes H for each of at most [`MOST_PARTS`] A of one shape. Their dropouts have one
/// probability, above 0.
fn dispatch(
    gpu: &Gpu,
    x: &Tensor,
    parts: &[(&Tensor, Option<Dropout>)],
    [m, k, rank]: [usize; 3],
) -> Result<Vec<Tensor>> {
    let hs = parts.iter().map(|_| Tensor::uninit(gpu, "h", &[m, rank])).collect::<Result<Vec<_>>>()?;
    if m == 0 || rank == 0 {
        return Ok(hs);
    }
    let tile = Tile::of(gpu, [m, k], parts.len());
    let rank_groups = (rank as u32).div_ceil(tile.ranks);
    // Unused bindings need a buffer; any will do.
    let part = |index: usize| parts[index.min(parts.len() - 1)];
    let seed = |index: usize| Dropout::params(part(index).1);
    let ((seed_low, seed_high, drop_below, keep_scale), (seed_low1, seed_high1, ..), (seed_low2, seed_high2, ..)) =
        (seed(0), seed(1), seed(2));
    let params = LoraDownParams {
        k: k as u32,
        rows: m as u32,
        rank: rank as u32,
        rank_groups,
        seed_low,
        seed_high,
        seed_low1,
        seed_high1,
        seed_low2,
        seed_high2,
        drop_below,
        keep_scale,
        ..Default::default()
    };
    let a = |index: usize| part(index).0.buffer(gpu, OP);
    let h = |index: usize| hs[index.min(hs.len() - 1)].buffer(gpu, OP);
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &tile.defines(gpu.tier(), parts.len(), is_ragged(k), part(0).1.is_some()),
        buffers: &[x.buffer(gpu, OP)?, a(0)?, a(1)?, a(2)?, h(0)?, h(1)?, h(2)?],
        params: bytemuck::bytes_of(&params),
        groups: m.div_ceil(tile.tokens as usize) as u64 * u64::from(rank_groups),
        flops_per_group: 2 * u64::from(tile.tokens * tile.ranks) * (k * parts.len()) as u64,
    })?;
    Ok(hs)
}

/// The formula, for any real type.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(
    x: &[T],
    a: &[T],
    [m, rank, k]: [usize; 3],
    dropout: Option<Dropout>,
) -> Vec<T> {
    let factor = |i: usize| dropout.map_or(T::one(), |dropout| T::of(dropout.factor(i as u32)));
    let value = |i: usize, j: usize| (0..k).map(|e| x[i * k + e] * factor(i * k + e) * a[j * k + e]).sum();
    (0..m * rank).map(|at| value(at / rank, at % rank)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::Device;
    use crate::testing;

    fn check(device: &Device, [m, rank, k]: [usize; 3], dropout: Option<Dropout>, seed: u64) {
        let x = testing::values(seed, m * k, 1.0);
        let a = testing::values(seed + 1, rank * k, 1.0);
        let tensor = |shape: &[usize], values: &[f32]| Tensor::from_slice(device, shape, values).unwrap();
        let (x_tensor, a_tensor) = (tensor(&[m, k], &x), tensor(&[rank, k], &a));
        let h = lora_down(&x_tensor, &a_tensor, dropout).unwrap();
        assert_eq!(h.shape(), [m, rank]);
        // Computed together with others, the result is the same to the bit.
        let other = tensor(&[rank, k], &testing::values(seed + 2, rank * k, 1.0));
        let reseeded = |by| dropout.map(|dropout| Dropout { seed: dropout.seed.wrapping_add(by), ..dropout });
        let beside = [(&other, reseeded(1)), (&a_tensor, dropout), (&a_tensor, reseeded(2))];
        for count in 2..=3 {
            let rows = Rows { tensor: &x_tensor, factors: &RowFactors::default() };
            let all = lora_down_all(rows, &beside[..count]).unwrap();
            for (all, &(a, dropout)) in all.iter().zip(&beside) {
                let alone = lora_down(&x_tensor, a, dropout).unwrap();
                assert_eq!(
                    all.to_vec().unwrap(),
                    alone.to_vec().unwrap(),
                    "{} M={m} r={rank} K={k}",
                    testing::name(device)
                );
            }
        }
        let (wanted, terms) = testing::with_terms([&x, &a], |[x, a]| reference(x, a, [m, rank, k], dropout));
        let bounds = coop::tolerance(device, m).bounds(&terms);
        let context = format!("{} M={m} r={rank} K={k} {dropout:?}", testing::name(device));
        testing::assert_close(&context, &h.to_vec().unwrap(), &wanted, &bounds);
    }

    pub fn twin(device: &Device) {
        for shape in [[1, 16, 64], [9, 3, 70], [65, 40, 128], [300, 16, 96]] {
            check(device, shape, None, 1);
            check(device, shape, Some(Dropout { probability: 0.3, seed: 5 }), 2);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
        #[test]
        fn odd_shapes_on_every_device_and_tier(
            m in 1..=257usize,
            rank in prop_oneof![1..=40usize, Just(512usize)],
            k in prop_oneof![1..=257usize, (1..=32usize).prop_map(|words| 8 * words)],
            probability in prop_oneof![Just(0.0f32), 0.01..0.99f32],
            seed: u64,
        ) {
            for device in testing::devices() {
                check(&device, [m, rank, k], Some(Dropout { probability, seed }), seed % 1000);
            }
        }
    }

    #[test]
    fn rows_of_any_size_survive_beside_each_other() {
        let (m, rank, k) = (20, 5, 1700);
        let x: Vec<f32> = testing::values(1, m * k, 1.0);
        let sizes = [1e5, 1e-8, 0.0, 1.0];
        let x: Vec<f32> = x.iter().enumerate().map(|(i, x)| x * sizes[i / k % 4]).collect();
        let a: Vec<f32> = testing::values(2, rank * k, 1.0);
        let a: Vec<f32> = a.iter().enumerate().map(|(i, a)| a * sizes[i / k % 4]).collect();
        let (wanted, terms) = testing::with_terms([&x, &a], |[x, a]| reference(x, a, [m, rank, k], None));
        for device in testing::devices() {
            let tensor = |shape: &[usize], values: &[f32]| Tensor::from_slice(&device, shape, values).unwrap();
            let h = lora_down(&tensor(&[m, k], &x), &tensor(&[rank, k], &a), None).unwrap();
            let bounds = coop::tolerance(&device, m).bounds(&terms);
            testing::assert_close(&testing::name(&device), &h.to_vec().unwrap(), &wanted, &bounds);
        }
    }

    #[test]
    fn rank_zero_is_nothing() {
        for device in testing::devices() {
            check(&device, [3, 0, 8], None, 1);
        }
    }

    #[test]
    fn dropout_drops_its_share_and_keeps_the_mean() {
        let dropout = Dropout { probability: 0.3, seed: 0x1234_5678_9abc_def0 };
        let n = 200_000;
        let factors: Vec<f32> = (0..n).map(|i| dropout.factor(i)).collect();
        let dropped = factors.iter().filter(|&&factor| factor == 0.0).count() as f64 / f64::from(n);
        // Four standard deviations of a binomial share.
        assert!((dropped - 0.3).abs() < 4.0 * (0.21 / f64::from(n)).sqrt(), "{dropped}");
        assert!(factors.iter().all(|&factor| factor == 0.0 || factor == 1.0 / (1.0 - 0.3)));
        let other = Dropout { seed: dropout.seed + 1, ..dropout };
        let same = (0..n).filter(|&i| (dropout.factor(i) == 0.0) == (other.factor(i) == 0.0)).count() as f64;
        // Independent masks agree with probability 0.3^2 + 0.7^2.
        assert!((same / f64::from(n) - 0.58).abs() < 0.01, "{same}");
        let mut filled = vec![0.0; 1003];
        dropout.factors(5, &mut filled);
        assert_eq!(filled, factors[5..1008]);
        // Neighbours are independent too.
        let pairs = factors.windows(2).filter(|pair| pair[0] == 0.0 && pair[1] == 0.0).count() as f64;
        assert!((pairs / f64::from(n) - 0.09).abs() < 0.005, "{pairs}");
    }

    #[test]
    fn a_probability_of_one_is_an_error() {
        let device = Device::cpu();
        let zeros = |shape: &[usize]| Tensor::zeros(&device, shape).unwrap();
        for probability in [1.0, -0.1, f32::NAN] {
            let result = lora_down(&zeros(&[1, 2]), &zeros(&[1, 2]), Some(Dropout { probability, seed: 0 }));
            let wanted =
                format!("lora_down: the dropout probability is {probability}; it must be at least 0 and less than 1");
            assert_eq!(result.unwrap_err().to_string(), wanted);
        }
        let result = lora_down(&zeros(&[1, 2]), &zeros(&[1, 3]), None);
        assert_eq!(result.unwrap_err().to_string(), "lora_down: A: expected [1, 2], got [1, 3]");
    }
}
