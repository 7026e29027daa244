//! Loss and perplexity of a model on given tokens.

use serde::Serialize;

use crate::error::{Error, Result};
use crate::nn::{Decoder, Tokens, shifted_labels};

/// Result of [`evaluate`], with the fields of `qlora eval --json`.
#[derive(Clone, Copy, Debug, Serialize, PartialEq)]
pub struct Evaluation {
    /// Mean cross-entropy of the tokens that carry loss, in nats.
    pub loss: f64,
    /// e^loss.
    pub perplexity: f64,
    /// Tokens that carried loss.
    pub tokens: usize,
}

/// A good value for `pass_tokens` in [`evaluate`] if memory isn't a concern.
pub const PASS_TOKENS: usize = 512;

/// Computes the mean loss over sequences of token ids with labels in Hugging Face's form: one
/// label per token, -100 for no loss, not shifted yet. Short sequences share a forward pass of up
/// to `pass_tokens` tokens. `progress` gets the number of sequences done.
///
/// # Errors
/// [`Error::Shape`] if a sequence has a different number of labels than ids. [`Error::Invalid`] if
/// no token carries loss, the loss isn't finite, or a sequence is longer than the model's
/// positions or has ids outside its vocabulary. The device's own errors.
pub fn evaluate<'a>(
    model: &Decoder,
    sequences: impl IntoIterator<Item = (&'a [u32], impl AsRef<[i64]>)>,
    pass_tokens: usize,
    mut progress: impl FnMut(usize),
) -> Result<Evaluation> {
    let (mut sum, mut count, mut done) = (0.0, 0, 0);
    let mut pack = Pack::default();
    let mut run = |pack: &mut Pack, sequences: usize| -> Result<()> {
        let pack = std::mem::take(pack);
        if pack.ids.is_empty() {
            return Ok(());
        }
        let tokens = Tokens::packed(pack.ids, 1, pack.segments)?;
        let labels = shifted_labels(&tokens, &pack.labels, model.config().vocab_size)?;
        let batch = model.batch(&tokens, Some(&labels))?;
        if batch.label_tokens() > 0 {
            // Summed in f64 for accuracy over many tokens.
            sum += model.evaluate(&batch)?.1.to_vec()?.iter().map(|&loss| f64::from(loss)).sum::<f64>();
            count += batch.label_tokens();
        }
        progress(sequences);
        Ok(())
    };
    for (ids, labels) in sequences {
        let labels = labels.as_ref();
        if ids.len() != labels.len() {
            return Err(Error::shape("evaluation", "number of labels", ids.len(), labels.len()));
        }
        if !pack.ids.is_empty() && pack.ids.len() + ids.len() > pass_tokens {
            run(&mut pack, done)?;
        }
        pack.push(ids, labels);
        done += 1;
    }
    run(&mut pack, done)?;
    if count == 0 {
        return Err(Error::invalid(
            "evaluation",
            "the data",
            format!("{done} sequences without a token that carries loss"),
            "labels count from the second token on, unless they are -100",
        ));
    }
    let loss = sum / count as f64;
    if !loss.is_finite() {
        return Err(Error::invalid("evaluation", "the loss", loss, "the model's weights or its adapter are broken"));
    }
    Ok(Evaluation { loss, perplexity: loss.exp(), tokens: count })
}

/// Sequences packed into one row.
#[derive(Default)]
struct Pack {
    ids: Vec<u32>,
    labels: Vec<i64>,
    segments: Vec<u32>,
    sequences: u32,
}

impl Pack {
    fn push(&mut self, ids: &[u32], labels: &[i64]) {
        self.sequences += 1;
        self.ids.extend_from_slice(ids);
        self.labels.extend_from_slice(labels);
        self.segments.resize(self.ids.len(), self.sequences);
    }
}
