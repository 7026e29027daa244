//! Rotary position embedding (Su et al., "RoFormer", 2021). Pair i (a, b) of a head's D values,
//! for a token at position m, becomes (a cos t - b sin t, b cos t + a sin t) with
//! t = m * theta^(-2 i / D), for i < D / 2. X and Y are [M, H * D].
//!
//! The backward rotates by the negative angle. Angles, including their scaling for long contexts,
//! are computed on the host in f32 like the `transformers` library does
//! (`modeling_rope_utils.py`), so that they agree to the last bits.

use rayon::prelude::*;

use crate::device::{Cpu, Defines, Device, Dispatch, Gpu};
use crate::error::{Error, Result};
use crate::indices::Indices;
use crate::kernels::{expect_2d, kernel, params};
use crate::tensor::{Storage, Tensor};

const OP: &str = "rope";

params! {
    struct RopeParams {
        first_group: u32,
        groups: u32,
        /// Pairs of the first X: M * H * D / 2.
        pairs: u32,
        /// Pairs of both X.
        all_pairs: u32,
        /// Pairs per row of each X: H * D / 2.
        row_pairs: u32,
        row_pairs1: u32,
        /// D / 2.
        half: u32,
        /// Rows of the table.
        positions: u32,
        /// Sign of the angle.
        sign: f32,
    }
}

kernel! {
    KERNEL = "rope" in "elementwise/rope.wgsl", RopeParams, [x: Read, x1: Read, cosines: Read, sines: Read, position: Read, y: Write, y1: Write],
    variants: |_| {
        layouts().into_iter().flat_map(|layout| [false, true].map(|both| layout.clone().with("both", both))).collect()
    },
    twin: tests::twin,
}

/// Which two values of a head form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// (i, i + D / 2), like Hugging Face.
    HalfSplit,
    /// (2 i, 2 i + 1), like the original and GGUF files of the llama architecture.
    Interleaved,
}

/// Scaling of frequencies for contexts longer than in pre-training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    None,
    /// All frequencies are divided by `factor`.
    Linear {
        /// The divisor, above 0.
        factor: f32,
    },
    /// Llama 3.1's scaling: low frequencies are divided by `factor`, high ones stay, those in
    /// between are blended.
    Llama3 {
        /// The divisor of low frequencies, above 0.
        factor: f32,
        /// Wavelengths over `original_max_position_embeddings` / this count as low frequencies.
        low_freq_factor: f32,
        /// Wavelengths below `original_max_position_embeddings` / this count as high frequencies.
        high_freq_factor: f32,
        /// Context length in pre-training, in tokens.
        original_max_position_embeddings: usize,
    },
}

/// Everything that determines a table of angles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base of the frequencies, for example 10,000.
    pub theta: f64,
    /// D, values per head; even.
    pub head_dim: usize,
    /// Scaling for long contexts.
    pub scaling: RopeScaling,
    /// Which two values form a pair.
    pub layout: RopeLayout,
}

impl RopeConfig {
    /// Returns the angle per position for each of the D / 2 pairs.
    pub fn frequencies(&self) -> Vec<f32> {
        let exponent = |i: usize| (2 * i) as f32 / self.head_dim as f32;
        // The power is rounded once, like a correctly rounded f32 power.
        let plain = |i: usize| 1.0 / self.theta.powf(f64::from(exponent(i))) as f32;
        (0..self.head_dim / 2).map(|i| self.scaling.apply(plain(i))).collect()
    }
}

impl RopeScaling {
    fn apply(self, frequency: f32) -> f32 {
        match self {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings,
            } => {
                let context = original_max_position_embeddings as f32;
                let wavelength = std::f32::consts::TAU / frequency;
                if wavelength < context / high {
                    frequency
                } else if wavelength > context / low {
                    frequency / factor
                } else {
                    let smooth = (context / wavelength - low) / (high - low);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}

/// Cosine and sine of the angles at every position, [positions, D / 2] each, on a device.
#[derive(Clone, Debug)]
pub struct RopeTable {
    config: RopeConfig,
    cosines: Tensor,
    sines: Tensor,
}

impl RopeTable {
    /// Makes the table for positions 0 to `positions` - 1.
    ///
    /// # Errors
    /// [`Error::Invalid`] for no positions, an odd or empty head, or numbers that are not positive
    /// and finite; [`Error::TooLarge`] and [`Error::OutOfMemory`] from the device.
    pub fn new(device: &Device, config: &RopeConfig, positions: usize) -> Result<RopeTable> {
        let frequencies = config.frequencies();
        let even = config.head_dim > 0 && config.head_dim.is_multiple_of(2);
        if !even || positions == 0 || !frequencies.iter().all(|value| value.is_finite() && *value > 0.0) {
            return Err(Error::invalid(
                OP,
                "the table",
                format!("for theta {}, {} values per head and {positions} positions", config.theta, config.head_dim),
                "it needs a position, an even number of values per head, and positive factors",
            ));
        }
        let angles = (0..positions).flat_map(|position| frequencies.iter().map(move |f| position as f32 * f));
        // The angle is rounded to f32; its sine and cosine are computed in f64, so that every
        // platform has the same table.
        let tensor = |of: fn(f64) -> f64| {
            let values = || angles.clone().map(|angle| of(angle.into()) as f32).collect();
            Tensor::from_values(device, &[positions, config.head_dim / 2], values)
        };
        Ok(RopeTable { config: *config, cosines: tensor(f64::cos)?, sines: tensor(f64::sin)? })
    }

    /// The config that the table was made from.
    pub fn config(&self) -> &RopeConfig {
        &self.config
    }

    /// [positions, D / 2].
    pub(crate) fn cosines(&self) -> &Tensor {
        &self.cosines
    }

    /// [positions, D / 2].
    pub(crate) fn sines(&self) -> &Tensor {
        &self.sines
    }

    /// Number of positions in the table.
    pub fn positions(&self) -> usize {
        self.cosines.shape()[0]
    }
}

/// Rotates the pairs of `x` [M, H * D] by the angles of its M tokens' `positions`.
///
/// Positions must be below the table's length. A GPU can't check them; larger ones count as the
/// table's last position.
///
/// # Errors
/// [`Error::Shape`], [`Error::DeviceMismatch`]; on the CPU [`Error::Invalid`] for a position
/// outside the table.
pub fn rope(x: &Tensor, table: &RopeTable, positions: &Indices) -> Result<Tensor> {
    turn([x], table, positions, 1.0).map(|[y]| y)
}

/// Returns the gradient of X, given the gradient `dy` [M, H * D] of Y: rotated back. Arguments and
/// errors are those of [`rope`].
pub fn rope_backward(dy: &Tensor, table: &RopeTable, positions: &Indices) -> Result<Tensor> {
    turn([dy], table, positions, -1.0).map(|[dx]| dx)
}

/// Like [`rope`], or [`rope_backward`] if `back`, for queries and keys at once.
pub(crate) fn rope_both(xs: [&Tensor; 2], table: &RopeTable, positions: &Indices, back: bool) -> Result<[Tensor; 2]> {
    turn(xs, table, positions, if back { -1.0 } else { 1.0 })
}

/// Maximum number of X per dispatch.
const MOST: usize = 2;

/// Rotates at most [`MOST`] X.
fn turn<const N: usize>(xs: [&Tensor; N], table: &RopeTable, positions: &Indices, sign: f32) -> Result<[Tensor; N]> {
    const { assert!(0 < N && N <= MOST) };
    let head_dim = table.config.head_dim;
    for x in xs {
        let (m, cols) = expect_2d(OP, "x", x)?;
        if cols == 0 || !cols.is_multiple_of(head_dim) {
            let expected = format!("[rows, a multiple of {head_dim}]");
            return Err(Error::shape(OP, "x", expected, format!("{:?}", x.shape())));
        }
        positions.expect_len(OP, "positions", m)?;
        x.device().same(&table.cosines.device(), OP)?;
        x.device().same(&positions.device(), OP)?;
    }
    let ys = match xs[0].storage() {
        Storage::Cpu(cpu, _) => on_cpu(cpu, &xs, table, positions, sign)?,
        Storage::Gpu(gpu, _) => dispatch(gpu, &xs, table, positions, sign)?,
        Storage::Planned(cpu, _) => xs.iter().map(|x| Tensor::planned(cpu, x.shape())).collect::<Result<_>>()?,
    };
    let mut ys = ys.into_iter();
    Ok(xs.map(|_| ys.next().unwrap_or_else(|| unreachable!("one result for each"))))
}

fn on_cpu(cpu: &Cpu, xs: &[&Tensor], table: &RopeTable, positions: &Indices, sign: f32) -> Result<Vec<Tensor>> {
    let positions = positions.host(OP)?;
    if let Some(position) = positions.iter().find(|&&position| position as usize >= table.positions()) {
        let expected = format!("the table has {} positions", table.positions());
        return Err(Error::invalid(OP, "a position", position, expected));
    }
    let turned = |x: &&Tensor| {
        let mut y = cpu.zeros(x.len())?;
        turn_rows(x.host(OP)?, table, positions, sign, x.shape()[1], &mut y)?;
        Ok(Tensor::from_host(cpu, x.shape(), y))
    };
    xs.iter().map(turned).collect()
}

/// Rows per task: enough for a few microseconds of work.
const TASK: usize = 16;

/// Rotates the rows of `x`, of `cols` values each, into `y`.
pub(crate) fn turn_rows(
    x: &[f32],
    table: &RopeTable,
    positions: &[u32],
    sign: f32,
    cols: usize,
    y: &mut [f32],
) -> Result<()> {
    let half = table.config.head_dim / 2;
    let (cosines, sines) = (table.cosines.host(OP)?, table.sines.host(OP)?);
    let rows = x.par_chunks_exact(cols).zip(y.par_chunks_exact_mut(cols)).zip(positions);
    rows.with_min_len(TASK).for_each(|((x, y), &position)| {
        let at = position as usize * half;
        let (cosines, sines) = (&cosines[at..at + half], &sines[at..at + half]);
        for (x, y) in x.chunks_exact(2 * half).zip(y.chunks_exact_mut(2 * half)) {
            match table.config.layout {
                RopeLayout::HalfSplit => {
                    let ((a, b), (first, second)) = (x.split_at(half), y.split_at_mut(half));
                    let pairs = a.iter().zip(b).zip(first.iter_mut().zip(second));
                    for (((a, b), (first, second)), (cosine, sine)) in pairs.zip(cosines.iter().zip(sines)) {
                        (*first, *second) = (a * cosine - b * (sign * sine), b * cosine + a * (sign * sine));
                    }
                }
                RopeLayout::Interleaved => {
                    let pairs = x.as_chunks::<2>().0.iter().zip(y.as_chunks_mut::<2>().0);
                    for (([a, b], y), (cosine, sine)) in pairs.zip(cosines.iter().zip(sines)) {
                        *y = [a * cosine - b * (sign * sine), b * cosine + a * (sign * sine)];
                    }
                }
            }
        }
    });
    Ok(())
}

/// Invocations per workgroup, with one pair each.
pub(crate) const THREADS: u32 = 64;

/// Text constants of a layout.
pub(crate) fn defines(layout: RopeLayout) -> Defines {
    Defines::new().with("interleaved", layout == RopeLayout::Interleaved).with("threads", THREADS)
}

/// Text constants of every layout.
pub(crate) fn layouts() -> Vec<Defines> {
    [RopeLayout::HalfSplit, RopeLayout::Interleaved].map(defines).into()
}

fn dispatch(gpu: &Gpu, xs: &[&Tensor], table: &RopeTable, positions: &Indices, sign: f32) -> Result<Vec<Tensor>> {
    let ys = xs.iter().map(|x| Tensor::uninit(gpu, "rope", x.shape())).collect::<Result<Vec<_>>>()?;
    // With a single X the second is unused. It still needs a result of its own, because no buffer
    // may be written under two names.
    let x1 = xs[xs.len() - 1];
    let unused;
    let y1 = match ys.get(1) {
        Some(y1) => y1.buffer(gpu, OP)?,
        None => {
            unused = gpu.alloc("unused result", 4)?;
            &unused
        }
    };
    let pairs = (xs[0].len() / 2) as u32;
    let all_pairs = xs.iter().map(|x| (x.len() / 2) as u32).sum();
    let row_pairs = |x: &Tensor| (x.shape()[1] / 2) as u32;
    let params = RopeParams {
        pairs,
        all_pairs,
        row_pairs: row_pairs(xs[0]),
        row_pairs1: row_pairs(x1),
        half: (table.config.head_dim / 2) as u32,
        positions: table.positions() as u32,
        sign,
        ..Default::default()
    };
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(table.config.layout).with("both", xs.len() > 1),
        buffers: &[
            xs[0].buffer(gpu, OP)?,
            x1.buffer(gpu, OP)?,
            table.cosines.buffer(gpu, OP)?,
            table.sines.buffer(gpu, OP)?,
            positions.buffer(gpu, OP)?,
            ys[0].buffer(gpu, OP)?,
            y1,
        ],
        params: bytemuck::bytes_of(&params),
        groups: u64::from(all_pairs.div_ceil(THREADS)),
        flops_per_group: 6 * u64::from(THREADS),
    })?;
    Ok(ys)
}

/// The formula, for any real type; `sign` is -1 for the backward. The angles use the f32
/// frequencies.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(x: &[T], config: &RopeConfig, positions: &[u32], sign: f32) -> Vec<T> {
    let frequencies = config.frequencies();
    let (head_dim, half) = (config.head_dim, config.head_dim / 2);
    let mut y = vec![T::zero(); x.len()];
    let heads = x.len() / head_dim / positions.len().max(1);
    for head in 0..positions.len() * heads {
        for (i, &frequency) in frequencies.iter().enumerate() {
            let (first, second) = match config.layout {
                RopeLayout::HalfSplit => (head * head_dim + i, head * head_dim + i + half),
                RopeLayout::Interleaved => (head * head_dim + 2 * i, head * head_dim + 2 * i + 1),
            };
            let angle = T::of(positions[head / heads] as f32 * frequency);
            let (sin, cos) = (T::of(sign) * angle).sin_cos();
            y[first] = x[first] * cos - x[second] * sin;
            y[second] = x[second] * cos + x[first] * sin;
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing;
    use crate::testing::tolerances::ROPE;

    const LAYOUTS: [RopeLayout; 2] = [RopeLayout::HalfSplit, RopeLayout::Interleaved];

    fn config(head_dim: usize, layout: RopeLayout) -> RopeConfig {
        RopeConfig { theta: 10_000.0, head_dim, scaling: RopeScaling::None, layout }
    }

    fn llama3() -> RopeScaling {
        RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        }
    }

    fn positions(seed: u64, m: usize, below: usize) -> Vec<u32> {
        let half = below as f32 / 2.0;
        testing::values(seed, m, half).iter().map(|value| (value + half) as u32 % below as u32).collect()
    }

    fn check(device: &Device, [m, heads]: [usize; 2], config: &RopeConfig, seed: u64) {
        let rows = 300;
        let table = RopeTable::new(device, config, rows).unwrap();
        let (x, positions) = (testing::values(seed, m * heads * config.head_dim, 2.0), positions(seed + 1, m, rows));
        let tensor = Tensor::from_slice(device, &[m, heads * config.head_dim], &x).unwrap();
        let indices = Indices::from_slice(device, &positions).unwrap();
        let wide: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        let run = [rope, rope_backward].map(|run| run(&tensor, &table, &indices).unwrap().to_vec().unwrap());
        for (got, sign) in run.iter().zip([1.0, -1.0]) {
            let wanted = reference(&wide, config, &positions, sign);
            let context = format!("{} M={m} H={heads} {config:?} sign {sign}", testing::name(device));
            // Two products of values up to 2 with f32 cosines.
            testing::assert_close(&context, got, &wanted, &ROPE.f32.bounds(&vec![1.0; x.len()]));
        }
        // Computed together with others, the result is the same to the bit.
        let other = Tensor::from_slice(device, &[m, 2 * heads * config.head_dim], &[x.clone(), x].concat()).unwrap();
        for (back, alone) in [false, true].into_iter().zip(&run) {
            let turn = |xs| rope_both(xs, &table, &indices, back).unwrap().map(|y| y.to_vec().unwrap());
            let ([first, others], [again, last]) = (turn([&tensor, &other]), turn([&other, &tensor]));
            assert_eq!((&first, &last, &others), (alone, alone, &again), "{}", testing::name(device));
        }
    }

    pub fn twin(device: &Device) {
        for layout in LAYOUTS {
            for (shape, half) in [([1, 1], 1), ([7, 3], 5), ([70, 4], 32)] {
                check(device, shape, &config(2 * half, layout), 3);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
        #[test]
        fn odd_shapes_on_every_device_and_tier(
            m in 1..=257usize,
            heads in 1..=5usize,
            half in 1..=40usize,
            layout in prop::sample::select(LAYOUTS.to_vec()),
            seed in 0..1000u64,
        ) {
            for device in testing::devices() {
                check(&device, [m, heads], &config(2 * half, layout), seed);
            }
        }

        #[test]
        fn the_backward_is_the_transpose(m in 1..20usize, layout in prop::sample::select(LAYOUTS.to_vec()), seed in 0..1000u64) {
            let config = RopeConfig { scaling: llama3(), ..config(16, layout) };
            let wide = |seed| testing::values(seed, m * 32, 1.0).iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
            let (x, dy, positions) = (wide(seed), wide(seed + 1), positions(seed, m, 1000));
            let dot = |left: &[f64], right: &[f64]| left.iter().zip(right).map(|(l, r)| l * r).sum::<f64>();
            let forward = dot(&reference(&x, &config, &positions, 1.0), &dy);
            let backward = dot(&reference(&dy, &config, &positions, -1.0), &x);
            prop_assert!((forward - backward).abs() < 1e-12 * (m * 32) as f64, "{forward} against {backward}");
        }
    }

    #[test]
    fn interleaved_is_half_split_of_permuted_values() {
        let (m, heads, head_dim) = (5, 3, 8);
        // Row j + i * D / 2 of a head, with i in 0..2, becomes row 2 j + i: reshape(H, 2, D /
        // 2).swapaxes(1, 2).
        let permute = |x: &[f32]| -> Vec<f32> {
            let from = |at: usize| at / head_dim * head_dim + at % head_dim / 2 + at % 2 * (head_dim / 2);
            (0..x.len()).map(|at| x[from(at)]).collect()
        };
        for device in testing::devices() {
            let x = testing::values(1, m * heads * head_dim, 1.0);
            let indices = Indices::from_slice(&device, &[0, 7, 3, 9, 1]).unwrap();
            let run = |x: &[f32], layout| {
                let table = RopeTable::new(&device, &config(head_dim, layout), 10).unwrap();
                let x = Tensor::from_slice(&device, &[m, heads * head_dim], x).unwrap();
                rope(&x, &table, &indices).unwrap().to_vec().unwrap()
            };
            let split = run(&x, RopeLayout::HalfSplit);
            assert_eq!(run(&permute(&x), RopeLayout::Interleaved), permute(&split), "{}", testing::name(&device));
        }
    }

    #[test]
    fn scaled_frequencies_are_those_of_transformers() {
        let plain = RopeConfig { theta: 500_000.0, ..config(64, RopeLayout::HalfSplit) };
        let scaled = RopeConfig { scaling: llama3(), ..plain };
        let (plain_values, scaled) = (plain.frequencies(), scaled.frequencies());
        // Frequencies of Llama 3.2 1B, computed in f64: the last unscaled one, those in between,
        // the first divided one, the last one.
        let known = [
            (1, 0.663_601_237_696, 1.0),
            (14, 0.003_211_445_994_752_6, 1.0),
            (15, 0.001_290_547_928_209_3, 1.651_329_245_763_9),
            (16, 0.000_429_556_796_559_37, 3.292_262_102_940_9),
            (17, 0.000_097_082_878_026_277, 9.666_728_978_753_3),
            (18, 0.000_019_461_638_184_831, 32.0),
            (31, 0.000_000_094_183_067_254_349, 32.0),
        ];
        for (i, wanted, divided_by) in known {
            let (scaled, plain) = (f64::from(scaled[i]), f64::from(plain_values[i]));
            assert!((scaled - wanted).abs() < 1e-6 * wanted, "{i}: {scaled}");
            assert!((plain / scaled - divided_by).abs() < 1e-5 * divided_by, "{i}: {plain} to {scaled}");
        }
        let linear = RopeConfig { scaling: RopeScaling::Linear { factor: 4.0 }, ..plain };
        assert!(linear.frequencies().iter().zip(&plain_values).all(|(linear, plain)| *linear == plain / 4.0));
    }

    #[test]
    fn what_is_outside_is_an_error_or_the_last_position() {
        for device in testing::devices() {
            let table = RopeTable::new(&device, &config(8, RopeLayout::HalfSplit), 10).unwrap();
            let x = Tensor::from_slice(&device, &[1, 8], &[1.0; 8]).unwrap();
            let run = |position: u32| rope(&x, &table, &Indices::from_slice(&device, &[position]).unwrap());
            match &device {
                Device::Cpu(_) => {
                    assert_eq!(run(10).unwrap_err().to_string(), "rope: a position is 10; the table has 10 positions")
                }
                Device::Gpu(_) => assert_eq!(run(10).unwrap().to_vec().unwrap(), run(9).unwrap().to_vec().unwrap()),
            }
            let two = Indices::from_slice(&device, &[1, 2]).unwrap();
            assert_eq!(rope(&x, &table, &two).unwrap_err().to_string(), "rope: positions: expected 1 values, got 2");
            let x = Tensor::zeros(&device, &[2, 12]).unwrap();
            assert!(rope(&x, &table, &two).unwrap_err().to_string().contains("multiple of 8"));
        }
        let device = Device::cpu();
        for (config, positions) in [
            (config(7, RopeLayout::HalfSplit), 4),
            (config(0, RopeLayout::HalfSplit), 4),
            (config(8, RopeLayout::HalfSplit), 0),
            (RopeConfig { theta: 0.0, ..config(8, RopeLayout::HalfSplit) }, 4),
            (RopeConfig { scaling: RopeScaling::Linear { factor: 0.0 }, ..config(8, RopeLayout::HalfSplit) }, 4),
        ] {
            let error = RopeTable::new(&device, &config, positions).unwrap_err().to_string();
            let (theta, width) = (config.theta, config.head_dim);
            let wanted =
                format!("rope: the table is for theta {theta}, {width} values per head and {positions} positions;");
            assert!(error.starts_with(&wanted), "{error}");
        }
    }
}
