//! Examples given as token ids.

use serde_json::{Map, Value};

use super::object::{LineResult, field};
use crate::nn::IGNORE_LABEL;
use crate::train::example::Example;

/// Keys of such a line, as written by transformers and TRL.
pub(super) const KEYS: [&str; 7] = [
    "input_ids",
    "labels",
    "attention_mask",
    "assistant_masks",
    "completion_mask",
    "token_type_ids",
    "special_tokens_mask",
];

/// Reads the ids of a line. A token carries loss if it has a label and is in every mask. Padding
/// is dropped.
pub(super) fn example(object: &Map<String, Value>) -> LineResult<Example> {
    let ids: Vec<u32> = field(object, "input_ids")?;
    let is_given = |key: &str| object.get(key).is_some_and(|value| !value.is_null());
    let list = |key: &str| is_given(key).then(|| values(object, key, ids.len())).transpose();
    let mask = |key: &str| -> LineResult<Option<Vec<bool>>> {
        let Some(values) = list(key)? else { return Ok(None) };
        match values.iter().find(|&&value| value != 0 && value != 1) {
            Some(value) => Err(format!("`{key}`: {value} is neither 0 nor 1")),
            None => Ok(Some(values.into_iter().map(|value| value == 1).collect())),
        }
    };
    if let Some(other) = list("token_type_ids")?.into_iter().flatten().find(|&kind| kind != 0) {
        return Err(format!("`token_type_ids`: {other}; only 0 is supported"));
    }

    let mut labels = list("labels")?.unwrap_or_else(|| ids.iter().copied().map(i64::from).collect());
    for key in ["assistant_masks", "completion_mask"] {
        for (label, in_mask) in labels.iter_mut().zip(mask(key)?.into_iter().flatten()) {
            if !in_mask {
                *label = IGNORE_LABEL;
            }
        }
    }
    // Padding may be at either end.
    let shown = mask("attention_mask")?.unwrap_or_else(|| vec![true; ids.len()]);
    let start = shown.iter().position(|&shown| shown).unwrap_or(0);
    let end = shown.iter().rposition(|&shown| shown).map_or(0, |last| last + 1);
    if shown[start..end.max(start)].contains(&false) {
        return Err("`attention_mask`: has a 0 between two 1; only padding at the ends is supported".into());
    }
    let range = start..end.max(start);
    Example::new(ids[range.clone()].to_vec(), labels[range].to_vec()).map_err(|e| e.to_string())
}

/// Reads a list with one number per id.
fn values(object: &Map<String, Value>, key: &str, ids: usize) -> LineResult<Vec<i64>> {
    let values: Vec<i64> = field(object, key)?;
    if values.len() == ids { Ok(values) } else { Err(format!("has {} {key}, but {ids} input_ids", values.len())) }
}

/// Checks that every id and label of an example is in the vocabulary.
pub(super) fn check(example: &Example, rows: usize) -> LineResult<()> {
    if let Some(id) = example.ids().iter().find(|&&id| id as usize >= rows) {
        return Err(format!("token {id} is outside the model's vocabulary of {rows} tokens"));
    }
    let known = |label: i64| label == IGNORE_LABEL || (0..rows as i64).contains(&label);
    match example.labels().find(|&label| !known(label)) {
        Some(label) => {
            Err(format!("`labels`: {label} is neither {IGNORE_LABEL} nor in the vocabulary of {rows} tokens"))
        }
        None => Ok(()),
    }
}
