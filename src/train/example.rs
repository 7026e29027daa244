//! Tokenized examples.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::nn::IGNORE_LABEL;
use crate::text::Tokenizer;

/// A tokenized example: token ids with a label each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    ids: Vec<u32>,
    labels: Labels,
}

/// Labels in the most compact form, since a text may have millions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Labels {
    /// Every token is its own label.
    #[default]
    All,
    /// Where true, the token is its own label; otherwise it has none.
    Where(Vec<bool>),
    /// Labels that differ from the tokens; -100 for none.
    Other(Vec<i64>),
}

impl Example {
    /// Creates an example from ids and labels: one label per token, -100 for no loss. The loss
    /// shifts labels by one, so the first is ignored.
    ///
    /// # Errors
    /// [`Error::Shape`] if the numbers of labels and ids differ.
    pub fn new(ids: Vec<u32>, labels: Vec<i64>) -> Result<Self> {
        if labels.len() != ids.len() {
            return Err(Error::shape("an example", "the number of labels", ids.len(), labels.len()));
        }
        let all = ids.iter().zip(&labels);
        let own = |(&id, &label): (&u32, &i64)| label == i64::from(id);
        let labels = if all.clone().all(own) {
            Labels::All
        } else if all.clone().all(|(id, label)| *label == IGNORE_LABEL || own((id, label))) {
            Labels::Where(all.map(own).collect())
        } else {
            Labels::Other(labels)
        };
        Ok(Example { ids, labels })
    }

    /// Creates an example in which all tokens carry loss.
    pub(super) fn all(ids: Vec<u32>) -> Self {
        Example { ids, labels: Labels::All }
    }

    /// Token ids.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Each token's label: usually its id, or -100 for no loss. The loss shifts labels by one, so
    /// the first is ignored.
    pub fn labels(&self) -> impl Iterator<Item = i64> {
        self.labels_of(0..self.ids.len())
    }

    /// Labels of these tokens.
    pub(super) fn labels_of(&self, range: Range<usize>) -> impl Iterator<Item = i64> {
        range.map(|at| match &self.labels {
            Labels::Where(loss) if !loss[at] => IGNORE_LABEL,
            Labels::Other(labels) => labels[at],
            _ => self.ids[at].into(),
        })
    }

    /// Number of tokens with loss.
    pub fn label_tokens(&self) -> usize {
        self.labels().skip(1).filter(|&label| label != IGNORE_LABEL).count()
    }

    /// Splits ids and labels into pieces of at most `most` tokens. A piece doesn't see earlier
    /// ones.
    pub fn pieces(&self, most: usize) -> impl Iterator<Item = (&[u32], Vec<i64>)> {
        self.ranges(most).map(|range| (&self.ids[range.clone()], self.labels_of(range).collect()))
    }

    /// Token ranges of the pieces.
    pub(super) fn ranges(&self, most: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let len = self.ids.len();
        (0..len).step_by(most.max(1)).map(move |start| start..len.min(start + most))
    }

    /// Appends a token, with or without loss.
    pub(super) fn push(&mut self, id: u32, loss: bool) {
        match &mut self.labels {
            Labels::All if loss => {}
            Labels::All => {
                let mut all = vec![true; self.ids.len()];
                all.push(false);
                self.labels = Labels::Where(all);
            }
            Labels::Where(all) => all.push(loss),
            Labels::Other(labels) => labels.push(if loss { id.into() } else { IGNORE_LABEL }),
        }
        self.ids.push(id);
    }

    /// Ends a text. The end token carries loss, even if the text already contained it.
    pub(super) fn end(&mut self, tokenizer: &Tokenizer) {
        if let Some(eos) = tokenizer.eos()
            && !self.ids.last().is_some_and(|last| tokenizer.eos_ids().contains(last))
        {
            self.push(eos, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_those_that_were_given() {
        for labels in [vec![5, 6, 7], vec![-100, 6, -100], vec![-100, 7, 8]] {
            let example = Example::new(vec![5, 6, 7], labels.clone()).unwrap();
            assert!(example.labels().eq(labels.iter().copied()), "{example:?}");
            assert_eq!(example.label_tokens(), labels[1..].iter().filter(|&&label| label != -100).count());
            let pieces: Vec<_> = example.pieces(2).collect();
            assert_eq!(pieces, [(&[5, 6][..], labels[..2].to_vec()), (&[7][..], labels[2..].to_vec())]);
        }
        assert_eq!(
            Example::new(vec![5], vec![5, 6]).unwrap_err().to_string(),
            "an example: the number of labels: expected 1, got 2"
        );
    }

    #[test]
    fn tokens_one_by_one_make_the_same_example() {
        for labels in [vec![5, 6, 7], vec![-100, 6, -100], vec![5, -100, 7]] {
            let mut example = Example::default();
            for (id, &label) in (5..).zip(&labels) {
                example.push(id, label != -100);
            }
            assert_eq!(example, Example::new(vec![5, 6, 7], labels).unwrap());
        }
    }
}
