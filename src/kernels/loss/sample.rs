//! Chooses a token by logits [1, V]: the likeliest, or one drawn at random from the likeliest few.
//!
//! Every device chooses the same token. Order, weights and sums are integers, computed from the
//! logits by operations that have only one possible result. Tokens are ordered by likelihood
//! (larger logits first; equal logits by lower id). A token's weight is 2^31 * 2^-(q / 2^14),
//! where q is the distance of its logit from the largest one, in whole steps of T * ln(2) / 2^14.
//! So probabilities are accurate to one part in ten thousand, and a token that is 2^31 times less
//! likely than the likeliest is never drawn. Three tokens are found as places in that order: the
//! k-th token, the end of the shortest prefix that reaches the probability p, and the token in
//! whose weight the random number falls.

use super::sample_cpu;
pub use super::sampling::Sampling;
use super::sampling::{OP, SampleParams};
use crate::device::{Defines, Dispatch, Tier};
use crate::error::{Error, Result};
use crate::indices::Indices;
use crate::kernels::kernel;
use crate::tensor::{Storage, Tensor};

kernel! {
    KERNEL = "sample" in "loss/sample.wgsl", SampleParams, [logits: Read, ids: Write],
    variants: |tier| [false, true].map(|greedy| defines(tier, greedy)).to_vec(),
    twin: tests::twin,
}

fn defines(tier: Tier, greedy: bool) -> Defines {
    let threads: u32 = if tier == Tier::Software { 8 } else { 256 };
    Defines::new().with("threads", threads).with("greedy", greedy)
}

/// Chooses token `number` of a seed for `logits` [1, V], on their device. [`checked`] detects that
/// there is none.
///
/// # Errors
/// [`Error::Shape`] unless there is one row of logits, [`Error::Invalid`] for an empty row or
/// options out of range, and device errors.
pub fn sample(logits: &Tensor, sampling: &Sampling, number: u64) -> Result<Indices> {
    sampling.check()?;
    let len = logits.len();
    crate::kernels::expect_shape(OP, "logits", logits, &[1, len])?;
    if len == 0 {
        return Err(bad_logit("none"));
    }
    let params = SampleParams::new(len, sampling, number);
    let greedy = sampling.temperature == 0.0;
    match logits.storage() {
        Storage::Cpu(_, values) => {
            let token = if greedy { sample_cpu::likeliest(values) } else { sample_cpu::draw(values, &params) };
            Indices::from_slice(&logits.device(), &[token.unwrap_or(NONE)])
        }
        Storage::Gpu(gpu, buffer) => {
            let token = Indices::uninit(gpu, OP, 1)?;
            gpu.dispatch(Dispatch {
                kernel: &KERNEL,
                defines: &defines(gpu.tier(), greedy),
                buffers: &[buffer, token.buffer(gpu, OP)?],
                params: bytemuck::bytes_of(&params),
                groups: 1,
                flops_per_group: 64 * len as u64,
            })?;
            Ok(token)
        }
        Storage::Planned(..) => Indices::from_slice(&logits.device(), &[NONE]),
    }
}

/// Result in place of a token if a logit is NaN.
const NONE: u32 = u32::MAX;

/// Checks the result of [`sample`], as read from the device.
///
/// # Errors
/// [`Error::Invalid`] if a logit was NaN.
pub fn checked(token: u32) -> Result<u32> {
    if token == NONE { Err(bad_logit("NaN")) } else { Ok(token) }
}

fn bad_logit(got: &str) -> Error {
    Error::invalid(OP, "a logit", got, "the model's weights or its adapter are broken")
}

/// Chooses the same token, by sorting everything and adding sums as in the definition.
#[cfg(test)]
pub(crate) fn reference(logits: &[f32], sampling: &Sampling, number: u64) -> u32 {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // Turns -0 into 0.
    order.sort_by(|&a, &b| (logits[b] + 0.0).total_cmp(&(logits[a] + 0.0)).then(a.cmp(&b)));
    if sampling.temperature == 0.0 {
        return order[0] as u32;
    }
    let params = SampleParams::new(logits.len(), sampling, number);
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k);
    }
    let largest = logits[order[0]];
    let weights: Vec<u128> =
        order.iter().map(|&id| params.steps(logits[id], largest).map_or(0, super::sampling::weight).into()).collect();
    let sums: Vec<u128> = weights
        .iter()
        .scan(0, |sum, weight| {
            *sum += weight;
            Some(*sum)
        })
        .collect();
    let last = order.len() - 1;
    let target = if params.cut_p > 0 { (u128::from(params.top_p) * sums[last]) >> 32 } else { u128::MAX };
    let end = (0..last).find(|&at| sums[at] >= target).unwrap_or(last);
    let drawn = (u128::from(params.random) * sums[end]) >> 32;
    order[(0..end).find(|&at| sums[at] > drawn).unwrap_or(end)] as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::sampling::weight;
    use super::*;
    use crate::device::Device;
    use crate::testing;

    fn chosen(device: &Device, logits: &[f32], sampling: &Sampling, number: u64) -> Result<u32> {
        let logits = Tensor::from_slice(device, &[1, logits.len()], logits).unwrap();
        checked(sample(&logits, sampling, number)?.to_vec()?[0])
    }

    /// Checks that every device and tier chooses the same token.
    fn check(logits: &[f32], sampling: &Sampling, numbers: std::ops::Range<u64>) {
        testing::devices().iter().for_each(|device| check_on(device, logits, sampling, numbers.clone()));
    }

    fn check_on(device: &Device, logits: &[f32], sampling: &Sampling, numbers: std::ops::Range<u64>) {
        for number in numbers {
            let wanted = reference(logits, sampling, number);
            let got = chosen(device, logits, sampling, number).unwrap();
            let name = testing::name(device);
            assert_eq!(got, wanted, "{name}: token {number} of {} by {sampling:?}", logits.len());
        }
    }

    pub fn twin(device: &Device) {
        let logits = testing::values(3, 1000, 5.0);
        check_on(device, &logits, &Sampling::default(), 0..1);
        for (top_k, top_p) in [(0, 1.0), (40, 1.0), (0, 0.9), (40, 0.5)] {
            check_on(device, &logits, &Sampling { temperature: 0.7, top_k, top_p, seed: 1 }, 0..4);
        }
    }

    fn drawn(options: Sampling, logits: &[f32], count: u64) -> Vec<u32> {
        (0..count).map(|number| chosen(&Device::cpu(), logits, &options, number).unwrap()).collect()
    }

    /// The tokens that may be drawn.
    fn support(options: Sampling, logits: &[f32]) -> Vec<u32> {
        let mut tokens = drawn(options, logits, 500);
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    }

    const WARM: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 3 };

    #[test]
    fn weights_are_powers_of_two_and_fall() {
        assert_eq!((weight(0), weight(1 << 14), weight(30 << 14)), (1 << 31, 1 << 30, 2));
        for q in 0..1 << 14 {
            let wanted = (31.0 - f64::from(q) / f64::from(1 << 14)).exp2();
            assert!((weight(q) as f64 / wanted - 1.0).abs() < 1e-4, "{q}: {} instead of {wanted}", weight(q));
            assert!(weight(q + 1) <= weight(q), "{q}");
        }
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let greedy = Sampling::default();
        for logits in
            [&[0.0, 3.0, 3.0, -1.0][..], &[-0.0, 0.0], &[f32::NEG_INFINITY; 5], &[-1.0, f32::INFINITY], &[7.0]]
        {
            check(logits, &greedy, 0..1);
        }
        assert_eq!(drawn(greedy, &[0.0, 3.0, 3.0, -1.0], 2), [1, 1]);
        let mut many = testing::values(1, 49_157, 5.0);
        many[1000] = 5.0;
        many[49_156] = 5.0;
        assert_eq!(reference(&many, &greedy, 0), 1000);
        check(&many, &greedy, 0..1);
        check(&many[1001..], &greedy, 0..1);
    }

    #[test]
    fn frequencies_follow_the_softmax_at_the_temperature() {
        let logits = [0.0f32, 1.0, 2.0, f32::NEG_INFINITY];
        let options = Sampling { temperature: 0.5, ..WARM };
        let count = 20_000;
        let tokens = drawn(options, &logits, count);
        let weights: Vec<f64> = logits.iter().map(|&logit| (f64::from(logit) / 0.5).exp()).collect();
        let total: f64 = weights.iter().sum();
        for (token, weight) in weights.iter().enumerate() {
            let share = tokens.iter().filter(|&&at| at as usize == token).count() as f64 / count as f64;
            let wanted = weight / total;
            // Four standard deviations.
            let bound = 4.0 * (wanted * (1.0 - wanted) / count as f64).sqrt();
            assert!((share - wanted).abs() <= bound, "token {token}: {share} instead of {wanted}");
        }
        assert_eq!(tokens, drawn(options, &logits, count), "the same seed, the same tokens");
        assert_ne!(tokens, drawn(Sampling { seed: 4, ..options }, &logits, count));
    }

    #[test]
    fn top_k_and_top_p_leave_the_likeliest() {
        let logits = [1.0f32, 4.0, 3.0, 2.0];
        let base = Sampling { temperature: 5.0, ..WARM };
        assert_eq!(support(base, &logits), [0, 1, 2, 3]);
        assert_eq!(support(Sampling { top_k: 2, ..base }, &logits), [1, 2]);
        assert_eq!(support(Sampling { top_p: 0.0, ..base }, &logits), [1]);
        // With 0.644, 0.237, 0.087, 0.032 (temperature 1), three tokens reach 0.9.
        assert_eq!(support(Sampling { top_p: 0.9, ..WARM }, &logits), [1, 2, 3]);
        // Among equals, lower ids win; with 1/4 each, two tokens are exactly half.
        assert_eq!(support(Sampling { top_k: 3, ..WARM }, &[2.0; 5]), [0, 1, 2]);
        assert_eq!(support(Sampling { top_p: 0.5, ..WARM }, &[2.0; 4]), [0, 1]);
        assert_eq!(support(Sampling { top_p: 0.5000001, ..WARM }, &[2.0; 4]), [0, 1, 2]);
        // top_p applies to what top_k keeps: 1/2 of 3.
        assert_eq!(support(Sampling { top_k: 3, top_p: 0.5, ..WARM }, &[2.0; 4]), [0, 1]);
    }

    #[test]
    fn ties_infinities_and_logits_less_than_a_step_apart() {
        let inf = f32::INFINITY;
        let near: Vec<f32> = (0..600).map(|i| f32::from_bits(3.0f32.to_bits() + (i * 7919) % 601)).collect();
        let around_zero: Vec<f32> = (0..300).map(|i| [1e-30, -1e-30, 0.0, -0.0][i % 4] * i as f32).collect();
        let cases: [&[f32]; 8] = [
            &[1.5; 700],
            &[-inf, 2.0, -inf, 2.0],
            &[inf, 1.0, inf],
            &[-inf; 9],
            &near,
            &around_zero,
            &[5.0],
            &[100.0, 90.0, 80.0, 75.0],
        ];
        for logits in cases {
            for (top_k, top_p, temperature) in [
                (0, 1.0, 1.0),
                (3, 1.0, 0.7),
                (0, 0.6, 1.3),
                (400, 0.9, 5.0),
                (2, 0.0, 1.0),
                (0, 1.0, 1e-40),
                (7, 0.5, 3e38),
            ] {
                check(logits, &Sampling { temperature, top_k, top_p, seed: 9 }, 0..3);
            }
        }
    }

    #[test]
    fn a_whole_vocabulary() {
        let logits: Vec<f32> = testing::values(7, 49_155, 1.0).iter().map(|x| 20.0 * x * x * x - 3.0).collect();
        for (top_k, top_p, temperature) in [(0, 1.0, 1.0), (40, 0.95, 0.8), (20_000, 0.999, 3.0)] {
            check(&logits, &Sampling { temperature, top_k, top_p, seed: 1 }, 0..2);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
        #[test]
        fn the_same_token_on_every_device_and_tier(
            len in 1..3000usize,
            spread in prop_oneof![Just(0.001f32), Just(1.0), Just(10.0), Just(1e6)],
            coarse: bool,
            temperature in 0.01..4.0f32,
            top_k in prop_oneof![Just(0usize), 1..60usize, 1..3000usize],
            top_p in prop_oneof![Just(1.0f32), 0.0..1.0f32],
            seed in 0..1000u64,
        ) {
            let mut logits = testing::values(seed, len, spread);
            if coarse {
                // Many equal logits.
                logits.iter_mut().for_each(|x| *x = (*x * 16.0 / spread).round() * spread / 16.0);
            }
            check(&logits, &Sampling { temperature, top_k, top_p, seed }, 0..2);
        }
    }

    #[test]
    fn what_makes_no_sense_is_an_error() {
        for device in testing::devices() {
            for temperature in [0.0, 1.0] {
                let sampling = Sampling { temperature, ..WARM };
                for nan in [f32::NAN, -f32::NAN] {
                    for at in [0, 1, 4999] {
                        let mut logits = testing::values(1, 5000, 1.0);
                        logits[at] = nan;
                        let error = chosen(&device, &logits, &sampling, 0).unwrap_err().to_string();
                        assert_eq!(error, "generation: a logit is NaN; the model's weights or its adapter are broken");
                    }
                }
                assert_eq!(
                    chosen(&device, &[], &sampling, 0).unwrap_err().to_string(),
                    "generation: a logit is none; the model's weights or its adapter are broken"
                );
            }
            let two = Tensor::zeros(&device, &[2, 3]).unwrap();
            assert_eq!(
                sample(&two, &WARM, 0).unwrap_err().to_string(),
                "generation: logits: expected [1, 6], got [2, 3]"
            );
            let wrong = Sampling { top_p: 1.5, ..WARM };
            assert_eq!(
                chosen(&device, &[1.0], &wrong, 0).unwrap_err().to_string(),
                "generation: top_p is 1.5; it must be in 0..=1"
            );
        }
    }
}
