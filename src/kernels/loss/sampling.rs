//! Rules for sampling, and the integer weights of tokens that every device computes alike.

use crate::error::{Error, Result};
use crate::kernels::params;
use crate::seed::mix;

pub(crate) const OP: &str = "generation";

/// Rules for choosing the next token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this; 0 takes the largest.
    pub temperature: f32,
    /// Keeps only this many of the likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps only the likeliest tokens that together have this probability, in 0..=1. The first
    /// one is always kept.
    pub top_p: f32,
    /// The same seed chooses the same tokens.
    pub seed: u64,
}

impl Default for Sampling {
    /// Always the likeliest token.
    fn default() -> Self {
        Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a temperature below 0 or a `top_p` outside 0..=1.
    pub(crate) fn check(&self) -> Result<()> {
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            return Err(Error::invalid(OP, "the temperature", self.temperature, "it must be at least 0"));
        }
        if !(0.0..=1.0).contains(&self.top_p) {
            return Err(Error::invalid(OP, "top_p", self.top_p, "it must be in 0..=1"));
        }
        Ok(())
    }
}

params! {
    struct SampleParams {
        first_group: u32,
        groups: u32,
        /// V, in values.
        len: u32,
        /// Number of tokens to keep; 0: all.
        top_k: u32,
        /// 0: `top_p` keeps all tokens.
        cut_p: u32,
        /// `top_p` as a share of all weights, in units of 2^-32.
        top_p: u32,
        /// The random number, in units of 2^-32.
        random: u32,
        /// Steps per logit difference of 1.
        steps: f32,
        /// Difference from the largest logit at which weights become 0.
        farthest: f32,
    }
}

/// log2 of the number of steps that halve a weight.
const OCTAVE: u32 = 14;
/// Halvings after which a weight is 0.
const OCTAVES: u32 = 31;

impl SampleParams {
    /// Parameters for token `number` of a seed. `sampling` has been checked, and its temperature
    /// is not 0.
    pub(crate) fn new(len: usize, sampling: &Sampling, number: u64) -> SampleParams {
        // Within these bounds, neither steps nor distances overflow.
        let temperature = f64::from(sampling.temperature.clamp(1e-30, 1e30));
        SampleParams {
            len: len as u32,
            top_k: sampling.top_k.min(len) as u32,
            cut_p: (sampling.top_p < 1.0).into(),
            // 1 isn't representable, and isn't used.
            top_p: (f64::from(sampling.top_p) * 4_294_967_296.0) as u32,
            random: (mix(sampling.seed, number) >> 32) as u32,
            steps: (f64::from(1u32 << OCTAVE) / (temperature * std::f64::consts::LN_2)) as f32,
            farthest: (f64::from(OCTAVES) * temperature * std::f64::consts::LN_2) as f32,
            ..Default::default()
        }
    }

    /// Steps from the largest logit, or `None` if the weight is 0.
    pub(crate) fn steps(&self, logit: f32, largest: f32) -> Option<u32> {
        let far = bounded(largest) - bounded(logit);
        (far < self.farthest).then_some((far * self.steps) as u32)
    }
}

/// Replaces infinities by large numbers.
fn bounded(logit: f32) -> f32 {
    logit.clamp(-1e38, 1e38)
}

/// 2^31 * 2^-(q / 2^14). The fractional power is a polynomial in 16 bits.
pub(crate) fn weight(q: u32) -> u64 {
    let f = (q & ((1 << OCTAVE) - 1)) << (16 - OCTAVE);
    // Horner's scheme. The coefficients, in units of 2^-16, are those of the exponential's series,
    // shifted to make up for truncation.
    let y = [59, 611, 3643, 15750, 45427, 65536u32].into_iter().reduce(|sum, c| c - ((f * sum) >> 16)).unwrap_or(0);
    (u64::from(y) << 15) >> (q >> OCTAVE)
}

/// An integer with the order of the logits; both zeros are equal.
pub(crate) fn key(logit: f32) -> u32 {
    let bits = logit.to_bits();
    if bits > 1 << 31 { !bits } else { bits | 1 << 31 }
}
