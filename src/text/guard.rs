//! Tokenizers of the tokenizers library, with limits on what a file can make it do.

use std::fmt;
use std::path::Path;

use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use tokenizers::models::ModelWrapper;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerImpl,
};

use super::panics::guarded;
use super::steps::Chain;
use crate::error::Result;
use crate::formats::input::read_small_text;

/// A tokenizer of the library, with limits on its steps.
pub(super) type Inner = TokenizerImpl<
    ModelWrapper,
    Chain<NormalizerWrapper>,
    Chain<PreTokenizerWrapper>,
    Chain<PostProcessorWrapper>,
    Chain<DecoderWrapper>,
>;

/// Maximum size of a `tokenizer.json` in bytes; the largest in use have 35 MB.
const MOST_BYTES: u64 = 128 << 20;

/// Maximum total size of added tokens in bytes: each byte is a state of an automaton.
const MOST_ADDED: usize = 4 << 20;

/// Maximum total size of the pieces of a vocabulary that becomes a trie, in bytes. A trie takes a
/// hundred times as much.
const MOST_PIECES: usize = 16 << 20;

/// Maximum size of a prefix or suffix of words, in bytes.
const MOST_AFFIX: usize = 256;

/// Reads a `tokenizer.json`, ignoring truncation and padding.
///
/// # Errors
/// [`Error::Io`] if it can't be read, [`Error::File`] if it is malformed or exceeds a limit.
pub(super) fn read(path: &Path) -> Result<Inner> {
    let text = read_small_text(path, MOST_BYTES)?;
    guarded(path, "is malformed", || {
        serde_json::from_str::<Outline>(&text)?.check()?;
        let mut inner = Inner::from_bytes(text)?;
        inner.with_padding(None).with_truncation(None)?;
        Ok(inner)
    })
}

/// Adds tokens to the tokenizer in the file at `path`; ids continue after the existing ones, in
/// order.
///
/// # Errors
/// [`Error::File`] if they are too many or indistinguishable.
pub(super) fn add(path: &Path, inner: &mut Inner, tokens: Vec<AddedToken>) -> Result<()> {
    guarded(path, "can't have the added tokens", || {
        check_added(tokens.iter().map(|token| token.content.len()).sum())?;
        inner.add_tokens(tokens).map(drop)
    })
}

fn check_added(bytes: usize) -> tokenizers::Result<()> {
    if bytes > MOST_ADDED {
        return Err(format!("its added tokens have {bytes} bytes; at most {MOST_ADDED} are read").into());
    }
    Ok(())
}

/// The parts that cost memory, checked before the library builds anything.
#[derive(Deserialize)]
struct Outline {
    #[serde(default)]
    added_tokens: Vec<Added>,
    model: Option<Model>,
}

#[derive(Deserialize)]
struct Added {
    content: String,
}

#[derive(Deserialize)]
struct Model {
    #[serde(default)]
    vocab: Pieces,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

impl Outline {
    fn check(&self) -> tokenizers::Result<()> {
        check_added(self.added_tokens.iter().map(|token| token.content.len()).sum())?;
        let Some(model) = &self.model else { return Ok(()) };
        if model.vocab.0 > MOST_PIECES {
            let bytes = model.vocab.0;
            return Err(format!("its vocabulary has pieces of {bytes} bytes; at most {MOST_PIECES} are read").into());
        }
        let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
        if affixes.into_iter().flatten().any(|affix| affix.len() > MOST_AFFIX) {
            return Err(format!("its words have a prefix or suffix of more than {MOST_AFFIX} bytes").into());
        }
        Ok(())
    }
}

/// Total bytes of the pieces in a list of pieces and scores; 0 for vocabularies of other kinds.
#[derive(Default)]
struct Pieces(usize);

impl<'de> Deserialize<'de> for Pieces {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Count;
        impl<'de> Visitor<'de> for Count {
            type Value = Pieces;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a vocabulary")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pieces, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Pieces(0))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Pieces, A::Error> {
                let mut bytes = 0;
                while let Some((piece, _)) = list.next_element::<(String, IgnoredAny)>()? {
                    bytes += piece.len();
                }
                Ok(Pieces(bytes))
            }
        }
        deserializer.deserialize_any(Count)
    }
}
