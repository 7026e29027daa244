//! Text from a model, a token at a time.

use std::ops::ControlFlow;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};
use crate::nn::Decoder;

const OP: &str = "generation";

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the largest.
    pub temperature: f32,
    /// Only so many of the likeliest tokens; 0: all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability, in 0..=1; the first one always counts.
    pub top_p: f32,
    /// The same seed chooses the same tokens.
    pub seed: u64,
}

impl Default for Sampling {
    /// The likeliest token, always.
    fn default() -> Self {
        Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// Chooses tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: Sampling,
    random: ChaCha8Rng,
}

impl Sampler {
    /// # Errors
    /// [`Error::Invalid`] for a temperature under 0 or a `top_p` outside 0..=1.
    pub fn new(options: Sampling) -> Result<Sampler> {
        let invalid = |what, got: f32, expected: &str| {
            Err(Error::Invalid { op: OP, what, got: got.to_string(), expected: expected.into() })
        };
        if !options.temperature.is_finite() || options.temperature < 0.0 {
            return invalid("the temperature", options.temperature, "it must be at least 0");
        }
        if !(0.0..=1.0).contains(&options.top_p) {
            return invalid("top_p", options.top_p, "it must be in 0..=1");
        }
        Ok(Sampler { options, random: ChaCha8Rng::seed_from_u64(options.seed) })
    }

    /// The next token for these logits, one a token of the vocabulary.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a logit that is NaN, or none at all.
    pub fn next(&mut self, logits: &[f32]) -> Result<u32> {
        if logits.is_empty() || logits.iter().any(|logit| logit.is_nan()) {
            let got = if logits.is_empty() { "none" } else { "NaN" }.to_owned();
            let expected = "the model's weights or its adapter are broken".into();
            return Err(Error::Invalid { op: OP, what: "a logit", got, expected });
        }
        let Sampling { temperature, top_k, top_p, .. } = self.options;
        if temperature == 0.0 {
            // The first of equals, as argmax has it.
            let best = (1..logits.len()).fold(0, |best, at| if logits[at] > logits[best] { at } else { best });
            return Ok(best as u32);
        }
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let likelier = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if top_k > 0 && top_k < order.len() {
            order.select_nth_unstable_by(top_k - 1, likelier);
            order.truncate(top_k);
        }
        order.sort_unstable_by(likelier);
        let largest = f64::from(logits[order[0] as usize]);
        let weight = |at: &u32| ((f64::from(logits[*at as usize]) - largest) / f64::from(temperature)).exp();
        let weights: Vec<f64> = order.iter().map(weight).collect();
        let total: f64 = weights.iter().sum();
        let (mut kept, mut sum) = (0, 0.0);
        while kept == 0 || (kept < weights.len() && sum < f64::from(top_p) * total) {
            sum += weights[kept];
            kept += 1;
        }
        // 53 random bits are every f64 step of 0..1.
        let mut left = (self.random.next_u64() >> 11) as f64 / 9_007_199_254_740_992.0 * sum;
        for (at, weight) in order.iter().zip(&weights).take(kept) {
            left -= weight;
            if left < 0.0 {
                return Ok(*at);
            }
        }
        // Rounding may leave a crumb of the last one.
        Ok(order[kept - 1])
    }
}

/// Up to `most` tokens after `prompt`, each told to `each` as it comes, which may end it; a token of `stop` ends it too and is
/// not part of the answer.
///
/// # Errors
/// [`Error::Invalid`] if prompt and answer are longer than the model's positions, or the prompt is empty or has ids outside
/// the vocabulary; the device's own.
pub fn generate(
    model: &Decoder,
    prompt: &[u32],
    most: usize,
    sampler: &mut Sampler,
    stop: &[u32],
    mut each: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Vec<u32>> {
    if prompt.is_empty() {
        return Err(Error::Invalid {
            op: OP,
            what: "the prompt",
            got: "empty".into(),
            expected: "it must have at least one token".into(),
        });
    }
    let positions = model.config().max_position_embeddings;
    if prompt.len() >= positions {
        return Err(Error::Invalid {
            op: OP,
            what: "the prompt",
            got: format!("{} tokens", prompt.len()),
            expected: format!("the model has {positions} positions, the answer's included; shorten it"),
        });
    }
    let most = most.min(positions - prompt.len());
    let mut cache = model.cache(prompt.len() + most)?;
    let mut answer: Vec<u32> = Vec::new();
    let mut logits = model.extend(&mut cache, prompt)?;
    while answer.len() < most {
        let token = sampler.next(&logits.to_vec()?)?;
        if stop.contains(&token) {
            break;
        }
        answer.push(token);
        if each(token).is_break() || answer.len() == most {
            break;
        }
        logits = model.extend(&mut cache, &[token])?;
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(options: Sampling, logits: &[f32], count: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(options).unwrap();
        (0..count).map(|_| sampler.next(logits).unwrap()).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(tokens(Sampling::default(), &[0.0, 3.0, 3.0, -1.0], 2), [1, 1]);
    }

    #[test]
    fn frequencies_follow_the_softmax_at_the_temperature() {
        let logits = [0.0f32, 1.0, 2.0, f32::NEG_INFINITY];
        let options = Sampling { temperature: 0.5, top_k: 0, top_p: 1.0, seed: 3 };
        let count = 20_000;
        let chosen = tokens(options, &logits, count);
        let weights: Vec<f64> = logits.iter().map(|&logit| (f64::from(logit) / 0.5).exp()).collect();
        let total: f64 = weights.iter().sum();
        for (token, weight) in weights.iter().enumerate() {
            let share = chosen.iter().filter(|&&at| at as usize == token).count() as f64 / count as f64;
            let wanted = weight / total;
            // Four standard deviations.
            let bound = 4.0 * (wanted * (1.0 - wanted) / count as f64).sqrt();
            assert!((share - wanted).abs() <= bound, "token {token}: {share} instead of {wanted}");
        }
        assert_eq!(chosen, tokens(options, &logits, count), "the same seed, the same tokens");
        assert_ne!(chosen, tokens(Sampling { seed: 4, ..options }, &logits, count));
    }

    #[test]
    fn top_k_and_top_p_leave_the_likeliest() {
        let logits = [1.0f32, 4.0, 3.0, 2.0];
        let only =
            |options: Sampling| tokens(options, &logits, 500).into_iter().collect::<std::collections::BTreeSet<_>>();
        let base = Sampling { temperature: 5.0, ..Sampling::default() };
        assert_eq!(only(base), [0, 1, 2, 3].into());
        assert_eq!(only(Sampling { top_k: 2, ..base }), [1, 2].into());
        assert_eq!(only(Sampling { top_p: 0.0, ..base }), [1].into());
        // Of 0.644, 0.237, 0.087, 0.032 (temperature 1), three make 0.9.
        assert_eq!(only(Sampling { temperature: 1.0, top_p: 0.9, ..base }), [1, 2, 3].into());
    }

    #[test]
    fn what_makes_no_sense_is_an_error() {
        assert!(Sampler::new(Sampling { temperature: -1.0, ..Sampling::default() }).is_err());
        assert!(Sampler::new(Sampling { top_p: 1.5, ..Sampling::default() }).is_err());
        let mut sampler = Sampler::new(Sampling::default()).unwrap();
        assert!(sampler.next(&[0.0, f32::NAN]).unwrap_err().to_string().contains("NaN"));
        assert!(sampler.next(&[]).is_err());
    }
}
