//! Tokenizers: `tokenizer.json` and the settings beside it, through Hugging Face's `tokenizers`.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::{PostProcessorWrapper, Tokenizer as Inner};

use super::chat::ChatTemplate;
use crate::error::{Error, Result};
use crate::formats::input::{MAX_SMALL, read_small, read_small_text};
use crate::formats::json::JsonObject;
use crate::hash::text_hash;

const OP: &str = "tokenizer";

/// Tokens that end a turn or a text wherever they are special tokens, the ends of turns first.
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

/// Text to token ids and back.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    /// Without post-processor, truncation or padding.
    inner: Inner,
    /// One more than the largest id.
    vocab_size: usize,
    special: BTreeSet<u32>,
    bos: Option<u32>,
    bos_text: String,
    eos: Vec<u32>,
    eos_text: String,
    /// Whether `encode` puts these tokens around a text.
    add_bos: bool,
    add_eos: bool,
    chat_template: Option<String>,
}

/// What a tokenizer is made of.
pub(super) struct Parts {
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
        let Parts { inner, bos, mut eos, add_bos, add_eos, chat_template } = parts;
        let mut seen = BTreeSet::new();
        eos.retain(|&id| seen.insert(id));
        let text = |id: Option<u32>| id.and_then(|id| inner.id_to_token(id)).unwrap_or_default();
        let added = inner.get_added_tokens_decoder();
        Tokenizer {
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

    /// Reads a `tokenizer.json`. What begins a text is what the file's post-processor puts there; what ends one are the
    /// special tokens known for it (`<|im_end|>`, `<|eot_id|>`, `<|endoftext|>`, `</s>` and the like).
    /// [`from_dir`](Self::from_dir) knows better.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, [`Error::File`] if it is malformed.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Ok(Self::new(read(path)?))
    }

    /// Reads the tokenizer of a Hugging Face model: `tokenizer.json`, and where they are there `tokenizer_config.json`
    /// (begin and end tokens, chat template), `generation_config.json` (more end tokens) and `chat_template.jinja`, which
    /// goes before the template in the config.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::File`] for a file that cannot be read, is malformed, or names a token that is not in the
    /// vocabulary.
    pub fn from_dir(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let mut parts = read(&folder.join("tokenizer.json"))?;

        let optional = |name: &str| {
            let path = folder.join(name);
            path.is_file().then(|| JsonObject::read(&path)).transpose()
        };
        let mut stated = Vec::new();
        if let Some(config) = optional("tokenizer_config.json")? {
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
        if jinja.is_file() {
            let text = read_small_text(&jinja, MAX_SMALL)?;
            parts.chat_template = Some(text);
        }
        Ok(Self::new(parts))
    }

    /// The ids of a text. Special tokens written in it become their ids. `add_special` asks for what the model expects
    /// around a text (its begin token, most often), which is not put where the text has it already.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the tokenizer has no way to write the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(|e| failed("text", e))?;
        let ids = encoding.get_ids();
        let before = self.begin(ids.first().copied()).filter(|_| add_special);
        let after = self.eos().filter(|eos| add_special && self.add_eos && ids.last() != Some(eos));
        Ok(before.into_iter().chain(ids.iter().copied()).chain(after).collect())
    }

    /// The begin token, if the model expects one and the text's first token is another.
    pub(crate) fn begin(&self, first: Option<u32>) -> Option<u32> {
        self.bos.filter(|_| self.add_bos && first != self.bos)
    }

    /// The ids of a text without anything around it, each with the bytes of the text that it stands for.
    pub(crate) fn encode_spans(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = self.inner.encode(text, false).map_err(|e| failed("text", e))?;
        let spans = encoding.get_offsets().iter().map(|&(start, end)| start..end);
        Ok(encoding.get_ids().iter().copied().zip(spans).collect())
    }

    /// The text of ids, without special tokens if `skip_special`. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an id outside the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            return Err(Error::Invalid {
                op: OP,
                what: "a token id",
                got: id.to_string(),
                expected: format!("the vocabulary has {} tokens", self.vocab_size),
            });
        }
        self.inner.decode(ids, skip_special).map_err(|e| failed("a sequence of ids", e))
    }

    /// Decodes ids that come one by one.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, skip_special, ids: Vec::new(), settled: 0, shown: String::new() }
    }

    /// A hash of everything that decides which ids a text or a chat becomes.
    ///
    /// # Errors
    /// None that are known: [`Error::Invalid`] if the tokenizer cannot be written as JSON.
    pub fn fingerprint(&self) -> Result<String> {
        let json = self.inner.to_string(false).map_err(|e| failed("the tokenizer", e))?;
        let around = (self.bos, &self.eos, self.add_bos, self.add_eos, &self.chat_template);
        Ok(text_hash(&format!("{json}{around:?}")))
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Checks that a model whose embedding table has `model_vocab` rows has one for every id. The table may be longer.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is shorter.
    pub fn check_vocabulary(&self, model_vocab: usize) -> Result<()> {
        if self.vocab_size <= model_vocab {
            return Ok(());
        }
        Err(Error::Invalid {
            op: OP,
            what: "the vocabulary",
            got: format!("{} tokens", self.vocab_size),
            expected: format!("the model has {model_vocab}: this tokenizer is another model's"),
        })
    }

    pub(super) fn inner(&self) -> &Inner {
        &self.inner
    }

    /// Whether texts get a begin token, and an end token.
    pub(super) fn adds(&self) -> (bool, bool) {
        (self.add_bos, self.add_eos)
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Its text, empty if there is none.
    pub fn bos_text(&self) -> &str {
        &self.bos_text
    }

    /// The token that ends a text, the first of [`eos_ids`](Self::eos_ids).
    pub fn eos(&self) -> Option<u32> {
        self.eos.first().copied()
    }

    /// Its text, empty if there is none.
    pub fn eos_text(&self) -> &str {
        &self.eos_text
    }

    /// The tokens that end a text or a turn: after one of them, generation stops.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// The id of a token by its text in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The source of the model's chat template.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The model's chat template, compiled.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the model has none, [`Error::Template`] if it is malformed.
    pub fn chat(&self) -> Result<ChatTemplate> {
        let missing = || Error::Invalid {
            op: OP,
            what: "the chat template",
            got: "missing".into(),
            expected: "chats need a model that has one".into(),
        };
        ChatTemplate::new(self.chat_template().ok_or_else(missing)?)
    }
}

/// Text from ids that come one by one. It never ends inside a character: what may yet become one is held back.
#[derive(Clone, Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// The ids of the last piece of text, which tell how the next one joins it, and those that are not text yet.
    ids: Vec<u32>,
    /// How many are the former.
    settled: usize,
    /// The text of the former.
    shown: String,
}

impl DecodeStream<'_> {
    /// The text that `id` completes, often none.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an id outside the vocabulary.
    pub fn push(&mut self, id: u32) -> Result<String> {
        if self.skip_special && self.tokenizer.special.contains(&id) {
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

    /// What was held back, as far as it can be written: the ids ended inside a character.
    ///
    /// # Errors
    /// None but those of [`push`](Self::push).
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

fn failed(what: &'static str, error: tokenizers::Error) -> Error {
    Error::Invalid { op: OP, what, got: "refused".into(), expected: error.to_string() }
}

/// What a `tokenizer.json` tells by itself.
fn read(path: &Path) -> Result<Parts> {
    let bytes = read_small(path, MAX_SMALL)?;
    let malformed = |e: tokenizers::Error| Error::File { path: path.into(), message: format!("is malformed: {e}") };
    let mut inner = Inner::from_bytes(bytes).map_err(malformed)?;
    inner.with_padding(None).with_truncation(None).map_err(malformed)?;

    let special = inner.get_added_tokens_decoder();
    let known = EOS_TOKENS.iter().filter_map(|&name| inner.token_to_id(name));
    let eos: Vec<u32> = known.filter(|id| special.get(id).is_some_and(|token| token.special)).collect();

    // What the post-processor puts around a letter: the crate has no other way to ask it.
    let ids = |special| inner.encode_fast("a", special).map(|encoding| encoding.get_ids().to_vec());
    let (bare, whole) = (ids(false).map_err(malformed)?, ids(true).map_err(malformed)?);
    let start = whole.windows(bare.len().max(1)).position(|window| window == bare).unwrap_or(0);
    let bos = whole[..start].first().copied();
    let end = whole.get(start + bare.len()).copied();
    let eos = end.into_iter().chain(eos).collect();
    inner.with_post_processor(None::<PostProcessorWrapper>);
    Ok(Parts { inner, bos, eos, add_bos: bos.is_some(), add_eos: end.is_some(), chat_template: None })
}

/// The id of a token that a config states, as text or as an object with its `content`.
fn token(config: &JsonObject, key: &str, inner: &Inner) -> Result<Option<u32>> {
    let Some(value) = config.value(key) else { return Ok(None) };
    let text = value.as_str().or_else(|| value.get("content")?.as_str());
    let text = text.ok_or_else(|| config.error(key, format!("is {value}, not a token")))?;
    match inner.token_to_id(text) {
        Some(id) => Ok(Some(id)),
        None => Err(config.error(key, format!("{text:?} is not in the vocabulary"))),
    }
}

/// `chat_template`: one, or several with names, of which `default` is meant.
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
