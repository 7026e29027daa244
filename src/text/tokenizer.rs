//! Tokenizers: `tokenizer.json` and the settings beside it, read with Hugging Face's `tokenizers`.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::PostProcessorWrapper;

use super::added;
use super::chat::ChatTemplate;
use super::guard::{self, Inner};
use super::long;
use super::panics::guarded;
use super::steps::Chain;
use crate::error::{Error, Result};
use crate::formats::input::{MAX_SMALL, read_small_text};
use crate::formats::json::JsonObject;
use crate::hash::text_hash;

const OP: &str = "tokenizer";

const CANNOT_ENCODE: &str = "can't encode the text";

/// Tokens that end a turn or a text if they are special tokens; ends of turns come first.
pub(super) const EOS_TOKENS: [&str; 14] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|end|>",
    "<|return|>",
    "<|eot|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",
    "<eos>",
    "</s>",
];

/// Converts text to token ids and back.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    /// File that it was read from.
    path: PathBuf,
    /// Without post-processor, truncation or padding.
    inner: Inner,
    /// Largest id plus 1.
    vocab_size: usize,
    special: BTreeSet<u32>,
    bos: Option<u32>,
    bos_text: String,
    eos: Vec<u32>,
    eos_text: String,
    /// Whether `encode` adds these tokens around a text.
    add_bos: bool,
    add_eos: bool,
    chat_template: Option<String>,
}

/// Parts of a tokenizer.
pub(super) struct Parts {
    pub(super) path: PathBuf,
    pub(super) inner: Inner,
    pub(super) bos: Option<u32>,
    /// The main one first; may repeat.
    pub(super) eos: Vec<u32>,
    pub(super) add_bos: bool,
    pub(super) add_eos: bool,
    pub(super) chat_template: Option<String>,
}

impl Tokenizer {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { path, inner, bos, mut eos, add_bos, add_eos, chat_template } = parts;
        let mut seen = BTreeSet::new();
        eos.retain(|&id| seen.insert(id));
        let text = |id: Option<u32>| id.and_then(|id| inner.id_to_token(id)).unwrap_or_default();
        let added = inner.get_added_tokens_decoder();
        Tokenizer {
            path,
            vocab_size: inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1),
            special: added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect(),
            bos_text: text(bos),
            eos_text: text(eos.first().copied()),
            add_bos,
            add_eos,
            bos,
            eos,
            chat_template,
            inner,
        }
    }

    /// Reads a `tokenizer.json`. The begin token is the one that the file's post-processor adds.
    /// The end tokens are well-known special tokens (`<|im_end|>`, `<|eot_id|>`, `<|endoftext|>`,
    /// `</s>` and the like). [`from_dir`](Self::from_dir) has better information.
    ///
    /// # Errors
    /// [`Error::Io`] if it can't be read, [`Error::File`] if it is malformed.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Ok(Self::new(parts(path, guard::read(path)?)?))
    }

    /// Reads the tokenizer of a Hugging Face model: `tokenizer.json` and, if they exist,
    /// `tokenizer_config.json` (begin and end tokens, chat template, tokens that `tokenizer.json`
    /// lacks), `added_tokens.json` (more such tokens), `generation_config.json` (more end tokens)
    /// and `chat_template.jinja`, which overrides the template in the config.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::File`] for a file that can't be read, is malformed, or names a
    /// token that isn't in the vocabulary.
    pub fn from_dir(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join("tokenizer.json");
        let optional = |name: &str| {
            let path = folder.join(name);
            path.exists().then(|| JsonObject::read(&path)).transpose()
        };
        let (config, list) = (optional("tokenizer_config.json")?, optional("added_tokens.json")?);
        let mut inner = guard::read(&path)?;
        added::add(&path, &mut inner, config.as_ref(), list.as_ref())?;
        let mut parts = parts(&path, inner)?;

        let mut stated = Vec::new();
        if let Some(config) = config {
            parts.bos = token(&config, "bos_token", &parts.inner)?.or(parts.bos);
            stated.extend(token(&config, "eos_token", &parts.inner)?);
            parts.add_bos = config.get("add_bos_token")?.unwrap_or(parts.add_bos);
            parts.add_eos = config.get("add_eos_token")?.unwrap_or(parts.add_eos);
            parts.chat_template = template(&config)?;
        }
        if let Some(config) = optional("generation_config.json")? {
            match config.get("eos_token_id")? {
                Some(OneOrMore::One(id)) => stated.push(id),
                Some(OneOrMore::More(ids)) => stated.extend(ids),
                None => {}
            }
        }
        parts.eos.splice(..0, stated);

        let jinja = folder.join("chat_template.jinja");
        if jinja.exists() {
            let text = read_small_text(&jinja, MAX_SMALL)?;
            parts.chat_template = Some(text);
        }
        Ok(Self::new(parts))
    }

    /// Returns the ids of a text. Special tokens written in it become their ids. `add_special`
    /// adds what the model expects around a text (usually its begin token), unless the text
    /// already has it.
    ///
    /// # Errors
    /// [`Error::File`] with the tokenizer's file if it can't represent the text, or would make too
    /// much of it.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let mut ids = if long::is_long(text.len()) {
            long::encode(text, |part| self.encode_spans(part))?
        } else {
            guarded(&self.path, CANNOT_ENCODE, || self.inner.encode_fast(text, false))?.get_ids().to_vec()
        };
        let before = self.begin(ids.first().copied()).filter(|_| add_special);
        let after = self.eos().filter(|eos| add_special && self.add_eos && ids.last() != Some(eos));
        ids.splice(..0, before);
        ids.extend(after);
        Ok(ids)
    }

    /// Returns the begin token, if the model expects one and the text doesn't start with it.
    pub(crate) fn begin(&self, first: Option<u32>) -> Option<u32> {
        self.bos.filter(|_| self.add_bos && first != self.bos)
    }

    /// Returns the ids of a text without anything around it, each with its range of bytes in the
    /// text.
    pub(crate) fn encode_spans(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = guarded(&self.path, CANNOT_ENCODE, || self.inner.encode(text, false))?;
        let spans = encoding.get_offsets().iter().map(|&(start, end)| start..end);
        Ok(encoding.get_ids().iter().copied().zip(spans).collect())
    }

    /// Returns the text of ids, without special tokens if `skip_special`. Bytes that aren't UTF-8
    /// become U+FFFD. Ids without a token give no text: many models have more rows in their
    /// embedding than their tokenizer has tokens.
    ///
    /// # Errors
    /// [`Error::File`] with the tokenizer's file if it can't decode them.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        guarded(&self.path, "can't decode the ids", || self.inner.decode(ids, skip_special))
    }

    /// Decodes ids that arrive one by one.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, skip_special, ids: Vec::new(), settled: 0, shown: String::new() }
    }

    /// Returns a hash of everything that determines the ids of a text or a chat.
    ///
    /// # Errors
    /// [`Error::File`] if the tokenizer can't be written as JSON; no such case is known.
    pub fn fingerprint(&self) -> Result<String> {
        let json = guarded(&self.path, "can't be written", || self.inner.to_string(false))?;
        let around = (self.bos, &self.eos, self.add_bos, self.add_eos, &self.chat_template);
        Ok(text_hash(&format!("{json}{around:?}")))
    }

    /// Largest id plus 1.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Checks that a model whose embedding has `model_vocab` rows has one for every id. The
    /// embedding may be longer. Added tokens may lie past its end if no text begins with one
    /// (padding tokens often do); this gives a warning.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is shorter.
    pub fn check_vocabulary(&self, model_vocab: usize) -> Result<()> {
        if self.vocab_size <= model_vocab {
            return Ok(());
        }
        let is_past = |id: u32| id as usize >= model_vocab;
        let added = self.inner.get_added_tokens_decoder();
        let most = self.inner.get_vocab(true).into_values().filter(|id| !added.contains_key(id)).max();
        if most.is_some_and(is_past) || self.bos.is_some_and(|bos| self.add_bos && is_past(bos)) {
            return Err(Error::invalid(
                OP,
                "the vocabulary",
                format!("{} tokens", self.vocab_size),
                format!("the model has {model_vocab}; this tokenizer belongs to another model"),
            ));
        }
        let mut past: Vec<_> = added.iter().filter(|(id, _)| is_past(**id)).collect();
        past.sort_by_key(|(id, _)| **id);
        let names: Vec<String> = past.iter().map(|(id, token)| format!("{:?} ({id})", token.content)).collect();
        tracing::warn!(
            "{}: the model has {model_vocab} rows, but none for {}; text with such a token can't be used",
            self.path.display(),
            names.join(", ")
        );
        Ok(())
    }

    pub(super) fn inner(&self) -> &Inner {
        &self.inner
    }

    /// Whether texts get a begin token, and an end token.
    pub(super) fn adds(&self) -> (bool, bool) {
        (self.add_bos, self.add_eos)
    }

    /// Token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Text of that token; empty if there is none.
    pub fn bos_text(&self) -> &str {
        &self.bos_text
    }

    /// Token that ends a text, the first of [`eos_ids`](Self::eos_ids).
    pub fn eos(&self) -> Option<u32> {
        self.eos.first().copied()
    }

    /// Text of that token; empty if there is none.
    pub fn eos_text(&self) -> &str {
        &self.eos_text
    }

    /// Tokens that end a text or a turn. Generation stops after one of them.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// Id of a token, by its text in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Source of the model's chat template.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Compiles the model's chat template.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the model has none, [`Error::Template`] if it is malformed.
    pub fn chat(&self) -> Result<ChatTemplate> {
        let missing = || Error::invalid(OP, "the chat template", "missing", "chats need a model with a chat template");
        ChatTemplate::new(self.chat_template().ok_or_else(missing)?)
    }
}

/// Text from ids that arrive one by one. It never ends inside a character: bytes that may still
/// become one are held back.
#[derive(Clone, Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// Ids of the last piece of text, which determine how the next one joins it, followed by those
    /// that aren't text yet.
    ids: Vec<u32>,
    /// Number of the former.
    settled: usize,
    /// Text of the former.
    shown: String,
}

impl DecodeStream<'_> {
    /// Returns the text that `id` completes, often none. An id without a token gives none.
    ///
    /// # Errors
    /// Errors of [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        let is_skipped = self.skip_special && self.tokenizer.special.contains(&id);
        if is_skipped || self.tokenizer.inner.id_to_token(id).is_none() {
            return Ok(String::new());
        }
        let before = self.ids.len();
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, self.skip_special).inspect_err(|_| self.ids.truncate(before))?;
        let Some(new) = text.get(self.shown.len()..).filter(|new| !new.is_empty() && !new.ends_with('\u{FFFD}')) else {
            return Ok(String::new());
        };
        let new = new.to_owned();
        self.ids.drain(..self.settled);
        self.settled = self.ids.len();
        self.shown = self.tokenizer.decode(&self.ids, self.skip_special)?;
        Ok(new)
    }

    /// Returns the text held back, as far as it can be written: the ids ended inside a character.
    ///
    /// # Errors
    /// Same as [`push`](Self::push).
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        Ok(text.get(self.shown.len()..).unwrap_or_default().to_owned())
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(u32),
    More(Vec<u32>),
}

/// Parts that follow from a `tokenizer.json` alone.
fn parts(path: &Path, mut inner: Inner) -> Result<Parts> {
    let special = inner.get_added_tokens_decoder();
    let known = EOS_TOKENS.iter().filter_map(|&name| inner.token_to_id(name));
    let eos: Vec<u32> = known.filter(|id| special.get(id).is_some_and(|token| token.special)).collect();

    // Encode a letter to see what the post-processor adds; the crate has no other way to ask.
    let ids = |special| {
        let ids = || inner.encode_fast("a", special).map(|encoding| encoding.get_ids().to_vec());
        guarded(path, "can't encode a letter", ids)
    };
    let (bare, whole) = (ids(false)?, ids(true)?);
    let start = whole.windows(bare.len().max(1)).position(|window| window == bare).unwrap_or(0);
    let bos = whole[..start].first().copied();
    let end = whole.get(start + bare.len()).copied();
    let eos = end.into_iter().chain(eos).collect();
    inner.with_post_processor(None::<Chain<PostProcessorWrapper>>);
    let (add_bos, add_eos) = (bos.is_some(), end.is_some());
    Ok(Parts { path: path.into(), inner, bos, eos, add_bos, add_eos, chat_template: None })
}

/// Id of a token that a config gives as text or as an object with `content`.
fn token(config: &JsonObject, key: &str, inner: &Inner) -> Result<Option<u32>> {
    let Some(value) = config.value(key) else { return Ok(None) };
    let text = value.as_str().or_else(|| value.get("content")?.as_str());
    let text = text.ok_or_else(|| config.error(key, format!("is {value}, not a token")))?;
    match inner.token_to_id(text) {
        Some(id) => Ok(Some(id)),
        None => Err(config.error(key, format!("{text:?} is not in the vocabulary"))),
    }
}

/// Reads `chat_template`: one template, or several with names, among which `default` is used.
fn template(config: &JsonObject) -> Result<Option<String>> {
    const KEY: &str = "chat_template";
    let Some(value) = config.value(KEY) else { return Ok(None) };
    let named = |list: &Vec<Value>| {
        let default = list.iter().find(|entry| entry.get("name").is_some_and(|name| name == "default"))?;
        default.get("template")?.as_str().map(str::to_owned)
    };
    let source = value.as_str().map(str::to_owned).or_else(|| named(value.as_array()?));
    source.map(Some).ok_or_else(|| config.error(KEY, "is neither a template nor a list with one named default"))
}
