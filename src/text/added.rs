//! Tokens declared in a model's folder besides `tokenizer.json`. They are added like in
//! transformers: after all others, if `tokenizer.json` lacks them. A token's id must be the
//! declared one, because it selects a row of the embedding.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::AddedToken;

use super::guard::{self, Inner};
use crate::error::Result;
use crate::formats::json::JsonObject;

const DECODER: &str = "added_tokens_decoder";

/// Keys of single special tokens that may be missing from the vocabulary, in the order in which
/// transformers adds them. The tokens that begin and end texts must be in the vocabulary.
const SPECIAL: [&str; 5] = ["unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Keys of lists of further special tokens.
const MORE_SPECIAL: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

/// A token as described in a config.
#[derive(Deserialize)]
struct Described {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

impl Described {
    fn token(self) -> AddedToken {
        AddedToken::from(self.content, self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized.unwrap_or(!self.special))
    }
}

/// Adds the tokens in `tokenizer_config.json` and `added_tokens.json` to the tokenizer in the file
/// at `path`.
///
/// # Errors
/// [`Error::File`](crate::Error::File) if tokens are malformed or too many.
pub(super) fn add(
    path: &Path,
    inner: &mut Inner,
    config: Option<&JsonObject>,
    list: Option<&JsonObject>,
) -> Result<()> {
    let special = config.map(special).transpose()?.unwrap_or_default();
    let is_special = |text: &str| special.iter().any(|token| token == text);
    let mut stated: BTreeMap<u32, AddedToken> = BTreeMap::new();
    if let Some(list) = list {
        for text in list.keys() {
            let token = AddedToken::from(text, is_special(text)).normalized(false);
            stated.insert(list.require(text)?, token);
        }
    }
    // These descriptions come before the list's, because they have more detail.
    if let Some(tokens) = config.map(|config| config.object(DECODER)).transpose()?.flatten() {
        for key in tokens.keys() {
            let id = key.parse().map_err(|_| tokens.error(key, "isn't a token id"))?;
            stated.insert(id, tokens.require::<Described>(key)?.token());
        }
    }

    let there = inner.get_added_tokens_decoder();
    let is_there = |text: &str| there.values().any(|token| token.content == text);
    let new: Vec<(u32, AddedToken)> = stated.into_iter().filter(|(_, token)| !is_there(&token.content)).collect();
    let (mut tokens, mut next) = (Vec::new(), next_id(inner));
    for (id, token) in new {
        let got = inner.token_to_id(&token.content).unwrap_or(next);
        if got != id {
            tracing::warn!(
                "{}: {:?} is declared as token {id} in a file beside it, but would be {got}; it is left out",
                path.display(),
                token.content
            );
            continue;
        }
        next += u32::from(got == next);
        tokens.push(token);
    }
    let listed = |text: &String, tokens: &[AddedToken]| tokens.iter().any(|token| token.content == *text);
    for text in special {
        if inner.token_to_id(&text).is_none() && !listed(&text, &tokens) {
            tokens.push(AddedToken::from(text, true));
        }
    }
    if tokens.is_empty() { Ok(()) } else { guard::add(path, inner, tokens) }
}

/// Id of the next token that the library adds.
fn next_id(inner: &Inner) -> u32 {
    let size = inner.get_vocab_size(false) as u32;
    let added = inner.get_added_tokens_decoder().into_keys().max();
    added.map_or(size, |id| size.max(id.saturating_add(1)))
}

/// Special tokens that a config names and that may be new.
fn special(config: &JsonObject) -> Result<Vec<String>> {
    let text = |value: &Value| value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned);
    let mut tokens: Vec<String> = SPECIAL.iter().filter_map(|key| text(config.value(key)?)).collect();
    for key in MORE_SPECIAL {
        match config.value(key) {
            Some(Value::Array(list)) => tokens.extend(list.iter().filter_map(text)),
            Some(Value::Object(map)) => tokens.extend(map.values().filter_map(text)),
            _ => {}
        }
    }
    tokens.retain(|token| !token.is_empty());
    Ok(tokens)
}
