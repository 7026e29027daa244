//! Softmax cross-entropy of logits [rows, V] with their labels:
//! `loss = log(sum(exp(logits))) - logits[label]`. Its gradient is
//! `(softmax - onehot(label)) * scale`.
//!
//! Both are 0 where the label is [`IGNORE`].
//! [`linear_cross_entropy`](crate::kernels::loss::linear_cross_entropy) calls it for one chunk of
//! tokens after another.

use rayon::prelude::*;

use crate::device::Dispatch;
use crate::error::{Error, Result};
use crate::indices::Indices;
use crate::kernels::cpu::exp::exp;
use crate::kernels::rows::teams::{RowTeams, is_ragged};
use crate::kernels::{kernel, params};
use crate::tensor::{Storage, Tensor};

const OP: &str = "cross_entropy";

/// Label of a token whose prediction doesn't count (-100 in other libraries).
pub const IGNORE: u32 = u32::MAX;

params! {
    struct CrossEntropyParams {
        first_group: u32,
        groups: u32,
        /// V, in values.
        k: u32,
        /// Rows of these logits.
        rows: u32,
        /// Place of the first row's label and loss.
        first: u32,
        /// 0: leave the logits as they are.
        gradient: u32,
        /// Factor of the gradient.
        scale: f32,
    }
}

kernel! {
    KERNEL = "cross_entropy" in "loss/cross_entropy.wgsl", CrossEntropyParams, [labels: Read, logits: Write, losses: Write],
    variants: |tier| [false, true].map(|ragged| RowTeams::long(tier).row_defines(ragged)).to_vec(),
    twin: tests::twin,
}

/// Writes the losses of `logits` [rows, V] to `losses` [M] from `first` on, with the labels at the
/// same places. With a `gradient` scale, the logits are replaced by their gradient; without one,
/// their values are unspecified afterwards.
pub(crate) fn cross_entropy(
    logits: &mut Tensor,
    labels: &Indices,
    first: usize,
    gradient: Option<f32>,
    losses: &mut Tensor,
) -> Result<()> {
    let (rows, v) = crate::kernels::expect_2d(OP, "logits", logits)?;
    logits.unshare()?;
    losses.unshare()?;
    if let Storage::Gpu(gpu, buffer) = logits.storage() {
        let teams = RowTeams::long(gpu.tier());
        let params = CrossEntropyParams {
            k: v as u32,
            rows: rows as u32,
            first: first as u32,
            gradient: gradient.is_some().into(),
            scale: gradient.unwrap_or_default(),
            ..Default::default()
        };
        return gpu.dispatch(Dispatch {
            kernel: &KERNEL,
            defines: &teams.row_defines(is_ragged(v)),
            buffers: &[labels.buffer(gpu, OP)?, buffer, losses.buffer(gpu, OP)?],
            params: bytemuck::bytes_of(&params),
            groups: teams.groups(rows),
            flops_per_group: 64 * teams.group_rows() * v as u64,
        });
    }
    if let Storage::Planned(..) = logits.storage() {
        return Ok(());
    }
    let labels = &labels.host(OP)?[first..first + rows];
    let losses = &mut losses.host_mut(OP)?[first..first + rows];
    logits.host_mut(OP)?.par_chunks_exact_mut(v).zip(labels).zip(losses).for_each(|((logits, &label), loss)| {
        *loss = on_cpu(logits, label, gradient);
    });
    Ok(())
}

/// Returns the loss of one row, and replaces its logits by the gradient if there is a scale.
fn on_cpu(logits: &mut [f32], label: u32, gradient: Option<f32>) -> f32 {
    if label == IGNORE {
        if gradient.is_some() {
            logits.fill(0.0);
        }
        return 0.0;
    }
    let label = (label as usize).min(logits.len() - 1);
    let target = logits[label];
    let largest = largest(logits);
    // Short sums in f32, their sum in f64.
    let sum = logits.chunks_mut(1024).map(|block| f64::from(exp_sum(block, largest))).sum::<f64>();
    if let Some(scale) = gradient {
        let factor = (f64::from(scale) / sum) as f32;
        logits.iter_mut().for_each(|value| *value *= factor);
        logits[label] -= scale;
    }
    sum.ln() as f32 + (largest - target)
}

/// Replaces values by exp(value - largest) and sums them. Compilers vectorize two loops, but not
/// one.
fn exp_sum(values: &mut [f32], largest: f32) -> f32 {
    values.iter_mut().for_each(|value| *value = exp(*value - largest));
    let (eights, tail) = values.as_chunks::<8>();
    let mut sums = [0.0f32; 8];
    for eight in eights {
        for lane in 0..8 {
            sums[lane] += eight[lane];
        }
    }
    sums.iter().chain(tail).sum()
}

/// Returns the largest value, ignoring NaN.
fn largest(values: &[f32]) -> f32 {
    let (eights, tail) = values.as_chunks::<8>();
    let mut most = [f32::MIN; 8];
    for eight in eights {
        for lane in 0..8 {
            most[lane] = if eight[lane] > most[lane] { eight[lane] } else { most[lane] };
        }
    }
    most.iter().chain(tail).fold(f32::MIN, |most, &value| most.max(value))
}

/// Returns an error with the position of the first label that is neither below `vocabulary` nor
/// [`IGNORE`].
///
/// # Errors
/// [`Error::Invalid`].
pub fn check_labels(labels: &[u32], vocabulary: usize) -> Result<()> {
    match labels.iter().position(|&label| label != IGNORE && label as usize >= vocabulary) {
        None => Ok(()),
        Some(index) => Err(Error::invalid(
            OP,
            "a label",
            format!("{} at index {index}", labels[index]),
            format!("the vocabulary has {vocabulary} tokens"),
        )),
    }
}

/// The formula, for any real type. Returns the rows' losses, and their gradients times `scale`.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(logits: &[T], labels: &[u32], scale: T) -> (Vec<T>, Vec<T>) {
    let v = logits.len() / labels.len().max(1);
    let (mut losses, mut gradient) = (Vec::new(), Vec::new());
    for (row, &label) in logits.chunks(v.max(1)).zip(labels) {
        if label == IGNORE {
            losses.push(T::zero());
            gradient.extend(row.iter().map(|_| T::zero()));
            continue;
        }
        let largest = row.iter().fold(T::neg_infinity(), |most, &value| most.max(value));
        let sum = row.iter().map(|&value| (value - largest).exp()).sum::<T>();
        losses.push(sum.ln() + largest - row[label as usize]);
        let onehot = |j: usize| if j == label as usize { T::one() } else { T::zero() };
        gradient.extend((0..v).map(|j| ((row[j] - largest).exp() / sum - onehot(j)) * scale));
    }
    (losses, gradient)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::Device;
    use crate::testing::tolerances::CROSS_ENTROPY;
    use crate::testing::{self, wide};

    fn check(device: &Device, rows: usize, v: usize, amplitude: f32, seed: u64) {
        let scale = 0.25;
        let logits = testing::values(seed, rows * v, amplitude);
        let labels: Vec<u32> =
            (0..rows).map(|i| if i % 3 == 1 { IGNORE } else { ((i * 7919 + seed as usize) % v) as u32 }).collect();
        check_labels(&labels, v).unwrap();
        let (wanted_losses, wanted) = reference(&wide(&logits), &labels, f64::from(scale));
        let context = format!("{} {rows} x {v} amplitude {amplitude}", testing::name(device));
        // One extra row before and one after, which must stay as they are.
        let padded = [&[7][..], &labels, &[7]].concat();
        let labels = Indices::from_slice(device, &padded).unwrap();
        for gradient in [None, Some(scale)] {
            let mut tensor = Tensor::from_slice(device, &[rows, v], &logits).unwrap();
            let mut losses = Tensor::from_slice(device, &[rows + 2], &vec![-1.0; rows + 2]).unwrap();
            cross_entropy(&mut tensor, &labels, 1, gradient, &mut losses).unwrap();
            let losses = losses.to_vec().unwrap();
            assert_eq!((losses[0], losses[rows + 1]), (-1.0, -1.0), "{context}");
            let terms = (v as f64).ln() + 2.0 * f64::from(amplitude);
            testing::assert_close(
                &context,
                &losses[1..=rows],
                &wanted_losses,
                &CROSS_ENTROPY.f32.bounds(&vec![terms; rows]),
            );
            if gradient.is_none() {
                continue;
            }
            let got = tensor.to_vec().unwrap();
            // A logit's rounding error becomes a relative error of its softmax.
            let relative = 1e-5 + 1e-6 * f64::from(amplitude);
            let bound = |(i, wanted): (usize, &f64)| {
                let label = padded[1 + i / v] as usize == i % v;
                relative * (wanted.abs() + if label { 2.0 * f64::from(scale) } else { 0.0 }) + 1e-30
            };
            let bounds: Vec<f64> = wanted.iter().enumerate().map(bound).collect();
            testing::assert_close(&context, &got, &wanted, &bounds);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
        #[test]
        fn odd_shapes_on_every_device_and_tier(
            rows in 0..=41usize,
            v in prop_oneof![1..=257usize, (1..=64usize).prop_map(|quads| 4 * quads), Just(1000usize)],
            seed in 0..1000u64,
        ) {
            for device in testing::devices() {
                check(&device, rows, v, 5.0, seed);
            }
        }
    }

    pub fn twin(device: &Device) {
        for (rows, v) in [(0, 5), (9, 257), (41, 1000)] {
            check(device, rows, v, 5.0, 1);
        }
        // A large vocabulary.
        check(device, 3, 50_000, 5.0, 1);
        if matches!(device, Device::Cpu(_)) {
            check(device, 9, 50_257, 5.0, 1);
        }
    }

    #[test]
    fn huge_logits_stay_finite() {
        for device in testing::devices() {
            // Near 1e4, neighbouring f32 numbers are 1e-3 apart; the compared values are exact in
            // f32.
            let logits = [1e4, -1e4, 0.0, 1e4 - 1.0, -3e38, 1.0, 2.0, 3.0, 3e38, 0.0, 0.0, 0.0];
            let labels = Indices::from_slice(&device, &[1, 3, 0]).unwrap();
            let mut tensor = Tensor::from_slice(&device, &[3, 4], &logits).unwrap();
            let mut losses = Tensor::zeros(&device, &[3]).unwrap();
            cross_entropy(&mut tensor, &labels, 0, Some(1.0), &mut losses).unwrap();
            let (wanted_losses, wanted) = reference(&wide(&logits), &[1, 3, 0], 1.0);
            let bounds: Vec<f64> = wanted_losses.iter().map(|loss| 1e-5 * (1.0 + loss)).collect();
            testing::assert_close(&testing::name(&device), &losses.to_vec().unwrap(), &wanted_losses, &bounds);
            testing::assert_close(&testing::name(&device), &tensor.to_vec().unwrap(), &wanted, &[1e-5; 12]);
        }
    }

    #[test]
    fn the_reference_is_the_gradient_of_the_loss() {
        let logits = wide(&testing::values(1, 33, 3.0));
        let labels = [4, IGNORE, 10];
        let (_, gradient) = reference(&logits, &labels, 0.5);
        testing::assert_gradient("logits", &logits, &gradient, |logits| {
            0.5 * reference(logits, &labels, 1.0).0.iter().sum::<f64>()
        });
    }

    #[test]
    fn a_label_past_the_vocabulary_is_named() {
        let message = check_labels(&[3, IGNORE, 5, 9], 5).unwrap_err().to_string();
        assert!(message.contains("5 at index 2") && message.contains("5 tokens"), "{message}");
        check_labels(&[IGNORE, 4], 5).unwrap();
    }
}
