//! The one door to the library of tokenizers. What a file makes it do is bounded, and where it panics, which it does for some
//! files, that is an error with the name of the file.

use std::any::Any;
use std::cell::Cell;
use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::Once;

use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use tokenizers::models::ModelWrapper;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerImpl,
};

use super::steps::Chain;
use crate::error::{Error, Result};
use crate::formats::input::read_small_text;

/// A tokenizer of the library whose steps have limits.
pub(super) type Inner = TokenizerImpl<
    ModelWrapper,
    Chain<NormalizerWrapper>,
    Chain<PreTokenizerWrapper>,
    Chain<PostProcessorWrapper>,
    Chain<DecoderWrapper>,
>;

/// Bytes of a `tokenizer.json`; the largest in use have 35 MB.
const MOST_BYTES: u64 = 128 << 20;

/// Bytes of all added tokens: every one is a state of an automaton.
const MOST_ADDED: usize = 4 << 20;

/// Bytes of all pieces of a vocabulary that becomes a trie, which costs a hundred times as many.
const MOST_PIECES: usize = 16 << 20;

/// Bytes of what is put before or after the parts of a word.
const MOST_AFFIX: usize = 256;

thread_local! {
    /// Whether the library is at work on this thread: its panics are told by the error that they become.
    static AT_WORK: Cell<bool> = const { Cell::new(false) };
}

/// What is thrown where the library reads no errors.
struct Refusal(String);

/// Ends a call into the library, of which [`guarded`] makes an error.
pub(super) fn refuse(message: String) -> ! {
    panic::resume_unwind(Box::new(Refusal(message)))
}

/// Calls into the library for the tokenizer in the file at `path`.
///
/// # Errors
/// [`Error::File`] that says `what` did not go, and why: the library's error, a refusal, or its panic.
pub(super) fn guarded<T>(path: &Path, what: &str, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let reason = match caught(call) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error.to_string(),
        Err(payload) => reason(payload),
    };
    Err(Error::File { path: path.into(), message: format!("{what}: {reason}") })
}

/// Calls into a library that panics for some input, without its words on the terminal. What it leaves behind is dropped or
/// still whole.
///
/// # Errors
/// What the panic says.
pub(super) fn caught<T>(call: impl FnOnce() -> T) -> Result<T, Box<dyn Any + Send>> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !AT_WORK.get() {
                before(info);
            }
        }));
    });
    let before = AT_WORK.replace(true);
    // What a panic leaves behind is a cache of words at most, and a tokenizer that was not made.
    let done = panic::catch_unwind(AssertUnwindSafe(call));
    AT_WORK.set(before);
    done
}

fn reason(payload: Box<dyn Any + Send>) -> String {
    let payload = match payload.downcast::<Refusal>() {
        Ok(refusal) => return refusal.0,
        Err(payload) => payload,
    };
    let text = payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied());
    format!("the library of tokenizers cannot use it ({})", text.unwrap_or("it panicked"))
}

/// Reads a `tokenizer.json`, without its truncation and padding.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::File`] if it is malformed or asks for too much.
pub(super) fn read(path: &Path) -> Result<Inner> {
    let text = read_small_text(path, MOST_BYTES)?;
    guarded(path, "is malformed", || {
        serde_json::from_str::<Outline>(&text)?.check()?;
        let mut inner = Inner::from_bytes(text)?;
        inner.with_padding(None).with_truncation(None)?;
        Ok(inner)
    })
}

/// Adds tokens to the tokenizer in the file at `path`, ids in their order after those that are there.
///
/// # Errors
/// [`Error::File`] if they are too many, or cannot be told apart.
pub(super) fn add(path: &Path, inner: &mut Inner, tokens: Vec<AddedToken>) -> Result<()> {
    guarded(path, "cannot have the added tokens", || {
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

/// What costs memory, before the library makes anything of it.
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

/// Bytes of the pieces in a list of pieces and scores. A vocabulary of another kind counts as none.
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
