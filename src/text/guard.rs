//! All calls into the tokenizers library. Limits what a file can make it do, and turns its panics,
//! which some files cause, into errors that name the file.

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

thread_local! {
    /// Whether the library is running on this thread. Its panics aren't printed, because they
    /// become errors.
    static AT_WORK: Cell<bool> = const { Cell::new(false) };
}

/// Panic payload for places where the library ignores errors.
struct Refusal(String);

/// Ends a call into the library; [`guarded`] turns this into an error.
pub(super) fn refuse(message: String) -> ! {
    panic::resume_unwind(Box::new(Refusal(message)))
}

/// Calls the library for the tokenizer in the file at `path`.
///
/// # Errors
/// [`Error::File`] that says `what` failed and why: the library's error, a refusal, or its panic.
pub(super) fn guarded<T>(path: &Path, what: &str, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let reason = match caught(call) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error.to_string(),
        Err(payload) => reason(payload),
    };
    Err(Error::File { path: path.into(), message: format!("{what}: {reason}") })
}

/// Calls a library that panics for some input, without printing the panic. What the panic leaves
/// behind is dropped or still intact.
///
/// # Errors
/// The panic's payload.
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
    // A panic leaves at most a cache of words, and a tokenizer that wasn't built.
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
    format!("the tokenizers library can't use it ({})", text.unwrap_or("it panicked"))
}

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
