//! Token sequences in the form that the decoder takes.

use std::sync::Arc;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::indices::Indices;
use crate::kernels::attention::visibility::Visibility;
use crate::kernels::loss::cross_entropy::{IGNORE, check_labels};

const OP: &str = "batch";

/// Label of tokens without loss, as in Hugging Face.
pub const IGNORE_LABEL: i64 = -100;

/// Segment number of padding.
pub const PADDING: u32 = 0;

/// `rows` sequences of `length` tokens, row-major, with segments that decide which tokens see each
/// other.
#[derive(Clone, Debug)]
pub struct Tokens {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Number of sequences.
    pub rows: usize,
    /// Tokens per sequence, padding included.
    pub length: usize,
    /// Which packed sequence of its row a token belongs to, from 1; [`PADDING`] for padding. A
    /// token sees itself and the earlier tokens of its segment.
    pub segments: Vec<u32>,
}

impl Tokens {
    /// Full-length sequences without padding.
    ///
    /// # Errors
    /// [`Error::Shape`] if `ids` are not `rows` rows.
    pub fn new(ids: Vec<u32>, rows: usize) -> Result<Tokens> {
        let segments = vec![1; ids.len()];
        Tokens::packed(ids, rows, segments)
    }

    /// Sequences with a mask: 1 for tokens, 0 for padding, which may be at either end.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub fn masked(ids: Vec<u32>, rows: usize, mask: &[i64]) -> Result<Tokens> {
        let segments = mask.iter().map(|&mask| if mask == 0 { PADDING } else { 1 }).collect();
        Tokens::packed(ids, rows, segments)
    }

    /// Several sequences per row, told apart by segment ids.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub fn packed(ids: Vec<u32>, rows: usize, segments: Vec<u32>) -> Result<Tokens> {
        if rows == 0 || ids.is_empty() || !ids.len().is_multiple_of(rows) {
            return Err(Error::shape(OP, "number of token ids", format!("{rows} rows of equal length"), ids.len()));
        }
        if segments.len() != ids.len() {
            return Err(Error::shape(OP, "number of segment ids (or mask values)", ids.len(), segments.len()));
        }
        Ok(Tokens { length: ids.len() / rows, ids, rows, segments })
    }

    /// Each token's position within its segment.
    pub(crate) fn positions(&self) -> Vec<u32> {
        let mut positions = vec![0; self.ids.len()];
        for at in 0..positions.len() {
            if at % self.length > 0 && self.segments[at] == self.segments[at - 1] {
                positions[at] = positions[at - 1] + 1;
            }
        }
        positions
    }
}

/// Shifts labels in Hugging Face's form (one per token, [`IGNORE_LABEL`] for none) into the form
/// that the loss takes: each position has the label of the next token. The last position of a row
/// or segment has none.
///
/// # Errors
/// [`Error::Shape`], and [`Error::Invalid`] for a label outside the vocabulary, with its position.
pub fn shifted_labels(tokens: &Tokens, labels: &[i64], vocabulary: usize) -> Result<Vec<u32>> {
    if labels.len() != tokens.ids.len() {
        return Err(Error::shape(OP, "number of labels", tokens.ids.len(), labels.len()));
    }
    let mut shifted = vec![IGNORE; labels.len()];
    for (at, &label) in labels.iter().enumerate() {
        if label == IGNORE_LABEL {
            continue;
        }
        if !(0..vocabulary as i64).contains(&label) {
            return Err(Error::invalid(
                OP,
                "a label",
                format!("{label} at token {at}"),
                format!("a label must be {IGNORE_LABEL} or below the vocabulary size, {vocabulary}"),
            ));
        }
        if at % tokens.length > 0 && tokens.segments[at] == tokens.segments[at - 1] && tokens.segments[at] != PADDING {
            shifted[at - 1] = label as u32;
        }
    }
    Ok(shifted)
}

/// A batch on a device.
#[derive(Clone, Debug)]
pub struct Batch {
    pub(super) ids: Indices,
    pub(super) positions: Indices,
    /// Largest position plus 1.
    pub(super) positions_end: usize,
    /// Visibility without a window and, if some layers have one, with the model's window.
    pub(super) visibility: Arc<Visibility>,
    pub(super) windowed: Option<Arc<Visibility>>,
    labels: Option<Indices>,
    label_tokens: usize,
    shape: [usize; 2],
}

impl Batch {
    /// Copies tokens to a device, with labels from [`shifted_labels`] if a loss will be computed.
    /// `vocabulary` bounds the ids; `window` is the model's sliding window.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an id or a label outside the vocabulary, [`Error::Shape`] if the
    /// number of labels is wrong, and errors of the device.
    pub fn new(
        device: &Device,
        tokens: &Tokens,
        labels: Option<&[u32]>,
        vocabulary: usize,
        window: Option<usize>,
    ) -> Result<Batch> {
        crate::kernels::rows::embedding::check_ids(&tokens.ids, vocabulary)?;
        if let Some(labels) = labels
            && labels.len() != tokens.ids.len()
        {
            return Err(Error::shape(OP, "number of labels", tokens.ids.len(), labels.len()));
        }
        check_labels(labels.unwrap_or_default(), vocabulary)?;
        let positions = tokens.positions();
        let visibility = |window| Visibility::causal(device, &tokens.segments, tokens.length, window).map(Arc::new);
        Ok(Batch {
            ids: Indices::from_slice(device, &tokens.ids)?,
            positions_end: positions.iter().max().map_or(0, |&last| last as usize + 1),
            positions: Indices::from_slice(device, &positions)?,
            visibility: visibility(None)?,
            // A window at least as long as every sequence changes nothing.
            windowed: window
                .filter(|&window| window < tokens.length)
                .map(|window| visibility(Some(window)))
                .transpose()?,
            labels: labels.map(|labels| Indices::from_slice(device, labels)).transpose()?,
            label_tokens: labels.map_or(0, |labels| labels.iter().filter(|&&label| label != IGNORE).count()),
            shape: [tokens.rows, tokens.length],
        })
    }

    /// Number of tokens, padding included.
    pub(crate) fn len(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    /// Number of positions with loss.
    pub fn label_tokens(&self) -> usize {
        self.label_tokens
    }

    /// Shifted labels.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the batch was made without labels.
    pub(crate) fn labels(&self) -> Result<&Indices> {
        self.labels.as_ref().ok_or_else(|| Error::invalid(OP, "the batch", "without labels", "a loss needs labels"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_start_anew_with_every_segment_and_row() {
        let tokens = Tokens::packed(vec![7; 8], 2, vec![1, 1, 2, 2, 0, 0, 1, 1]).unwrap();
        assert_eq!(tokens.positions(), [0, 1, 0, 1, 0, 1, 0, 1]);
        assert_eq!(Tokens::new(vec![7; 6], 2).unwrap().positions(), [0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn labels_move_to_the_position_that_predicts_them() {
        let tokens = Tokens::packed(vec![1; 6], 1, vec![1, 1, 1, 2, 2, 0]).unwrap();
        let shifted = shifted_labels(&tokens, &[10, 11, -100, 13, 14, 15], 20).unwrap();
        // The first label of a segment and the labels of padding can't be predicted.
        assert_eq!(shifted, [11, IGNORE, IGNORE, 14, IGNORE, IGNORE]);
        let error = shifted_labels(&tokens, &[10, 11, 20, 13, 14, 15], 20).unwrap_err().to_string();
        assert!(error.contains("20 at token 2"), "{error}");
        assert_eq!(
            shifted_labels(&tokens, &[10], 20).unwrap_err().to_string(),
            "batch: number of labels: expected 6, got 1"
        );
    }

    #[test]
    fn counts_that_disagree_are_named() {
        assert!(Tokens::new(vec![1; 5], 2).unwrap_err().to_string().contains("token ids"));
        assert_eq!(
            Tokens::new(vec![], 0).unwrap_err().to_string(),
            "batch: number of token ids: expected 0 rows of equal length, got 0"
        );
        assert_eq!(
            Tokens::masked(vec![1; 4], 2, &[1; 3]).unwrap_err().to_string(),
            "batch: number of segment ids (or mask values): expected 4, got 3"
        );
    }

    #[test]
    fn ids_outside_the_vocabulary_are_named() {
        let tokens = Tokens::new(vec![1, 5, 2, 3], 2).unwrap();
        let error = Batch::new(&Device::cpu(), &tokens, None, 5, None).unwrap_err().to_string();
        assert_eq!(error, "embedding: an id is 5 at index 1; the table has 5 rows");
        let error = Batch::new(&Device::cpu(), &tokens, Some(&[6, 0, 0, 0]), 6, None).unwrap_err().to_string();
        assert_eq!(error, "cross_entropy: a label is 6 at index 0; the vocabulary has 6 tokens");
        let labels = [IGNORE, 2, IGNORE, 1];
        let batch = Batch::new(&Device::cpu(), &tokens, Some(&labels), 6, None).unwrap();
        assert_eq!((batch.label_tokens(), batch.shape, batch.len()), (2, [2, 2], 4));
    }
}
