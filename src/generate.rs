//! Text generation, token by token.

use std::collections::VecDeque;
use std::ops::ControlFlow;

use crate::device::{Device, Tier};
use crate::error::{Error, Result};
use crate::indices::Indices;
use crate::kernels::loss::sample::{checked, sample};
use crate::kernels::rows::embedding::check_ids;
use crate::nn::Decoder;

pub use crate::kernels::loss::sample::Sampling;

const OP: &str = "generation";

/// Samples tokens one after another.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: Sampling,
    /// Tokens sampled so far.
    number: u64,
}

impl Sampler {
    /// # Errors
    /// [`Error::Invalid`] for a temperature under 0 or a `top_p` outside 0..=1.
    pub fn new(options: Sampling) -> Result<Sampler> {
        options.check()?;
        Ok(Sampler { options, number: 0 })
    }
}

/// Generates up to `most` tokens after `prompt` and passes each to `each`, which may end the
/// generation. A token in `stop` also ends it and is not returned.
///
/// # Errors
/// [`Error::Invalid`] if the prompt is empty, leaves no free position for an answer, or has ids
/// outside the vocabulary. The device's own errors.
pub fn generate(
    model: &Decoder,
    prompt: &[u32],
    most: usize,
    sampler: &mut Sampler,
    stop: &[u32],
    mut each: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Vec<u32>> {
    if prompt.is_empty() {
        return Err(Error::invalid(OP, "the prompt", "empty", "it must have at least one token"));
    }
    let positions = model.config().max_position_embeddings;
    if prompt.len() >= positions {
        return Err(Error::invalid(
            OP,
            "the prompt",
            format!("{} tokens", prompt.len()),
            format!("the model has {positions} positions for prompt and answer; shorten it"),
        ));
    }
    check_ids(prompt, model.config().vocab_size)?;
    let most = most.min(positions - prompt.len());
    let mut cache = model.cache(prompt.len() + most)?;
    let at_once = at_once(model.device());
    let mut answer = Vec::new();
    let mut under_way = VecDeque::new();
    let mut last = Indices::from_slice(model.device(), prompt)?;
    loop {
        while under_way.len() < at_once && answer.len() + under_way.len() < most {
            let logits = model.append(&mut cache, &last)?;
            last = sample(&logits, &sampler.options, sampler.number + under_way.len() as u64)?;
            under_way.push_back(last.start_read()?);
        }
        let Some(next) = under_way.pop_front() else { break };
        let token = checked(next.finish()?[0])?;
        sampler.number += 1;
        if stop.contains(&token) {
            break;
        }
        answer.push(token);
        if each(token).is_break() {
            break;
        }
    }
    Ok(answer)
}

/// Tokens in flight. A GPU computes one token while the host receives the one before and records
/// the next. That work is wasted if the received token was the last. On processors nothing would
/// be idle, so one token is in flight.
fn at_once(device: &Device) -> usize {
    match device {
        Device::Gpu(gpu) if gpu.tier() != Tier::Software => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_an_error() {
        assert_eq!(
            Sampler::new(Sampling { temperature: -1.0, ..Sampling::default() }).unwrap_err().to_string(),
            "generation: the temperature is -1; it must be at least 0"
        );
        assert_eq!(
            Sampler::new(Sampling { top_p: 1.5, ..Sampling::default() }).unwrap_err().to_string(),
            "generation: top_p is 1.5; it must be in 0..=1"
        );
    }
}
