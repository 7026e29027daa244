//! A tokenized example.

use crate::nn::IGNORE_LABEL;
use crate::text::Tokenizer;

/// A tokenized example.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For every token its id, or -100 where it carries no loss. The loss shifts them by one, so that the first counts
    /// for nothing.
    pub labels: Vec<i64>,
}

impl Example {
    /// Its ids and labels in pieces of at most `most` tokens, each without what was before.
    pub fn pieces(&self, most: usize) -> impl Iterator<Item = (&[u32], &[i64])> {
        self.ids.chunks(most).zip(self.labels.chunks(most))
    }

    /// Another token, and whether it carries loss.
    pub(super) fn push(&mut self, id: u32, loss: bool) {
        self.ids.push(id);
        self.labels.push(if loss { id.into() } else { IGNORE_LABEL });
    }

    /// Ends a text. The end token carries loss, also where it was written.
    pub(super) fn end(&mut self, tokenizer: &Tokenizer) {
        if let Some(eos) = tokenizer.eos()
            && !self.ids.last().is_some_and(|last| tokenizer.eos_ids().contains(last))
        {
            self.push(eos, true);
        }
    }
}
