//! Steps of a tokenizer, within limits: normalizers, pre-tokenizers, post-processors and decoders
//! of `tokenizers`. A file of a few lines could request forty steps that each double a text.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::de::{DeserializeOwned, Error as _};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use tokenizers::utils::SysRegex;
use tokenizers::{
    Decoder, DecoderWrapper, Encoding, NormalizedString, Normalizer, NormalizerWrapper, PostProcessor,
    PostProcessorWrapper, PreTokenizedString, PreTokenizer, PreTokenizerWrapper,
};

use super::panics::refuse;

/// Maximum bytes that a step may make of each byte of the original text.
const MOST_GROWTH: usize = 64;

/// Maximum bytes that a step may add to this, for every piece of text.
const MOST_ADDED: usize = 256;

/// Maximum nesting of sequences.
const MOST_DEPTH: usize = 16;

/// Maximum number of steps. The largest tokenizers in use have a few dozen.
const MOST_STEPS: usize = 512;

/// Maximum number of expressions. Each may take up to 10 MB when compiled.
const MOST_REGEXES: usize = 32;

/// Maximum size of an expression, or of a text to search for, in bytes.
const MOST_PATTERN: usize = 16 << 10;

/// Maximum number of pre-tokenizers that rewrite text: each may double it.
const MOST_REWRITES: usize = 3;

/// Maximum pieces in a post-processor's template, and ids in one of its special tokens.
const MOST_PIECES: usize = 64;

/// Maximum tokens that post-processors may make of a letter.
const MOST_AROUND: usize = 4096;

/// Maximum length of a text that replaces a character in a `precompiled_charsmap`, in bytes; NFKC
/// needs 33.
const MOST_MAPPED: usize = 64;

/// A kind of step.
pub(super) trait Step: DeserializeOwned + Serialize {
    /// Key of the list of steps in a sequence.
    const LIST: &'static str;
}

impl Step for NormalizerWrapper {
    const LIST: &'static str = "normalizers";
}

impl Step for PreTokenizerWrapper {
    const LIST: &'static str = "pretokenizers";
}

impl Step for PostProcessorWrapper {
    const LIST: &'static str = "processors";
}

impl Step for DecoderWrapper {
    const LIST: &'static str = "decoders";
}

/// Steps in order; sequences are flattened.
#[derive(Clone, Debug)]
pub(super) struct Chain<S>(Vec<(S, Growth)>);

/// How much a step adds to a text.
#[derive(Clone, Debug)]
enum Growth {
    /// At most this many times the bytes, plus this many.
    Times(usize, usize),
    /// This many bytes for each match of the expression.
    Replaced(Arc<SysRegex>, usize),
}

impl Growth {
    /// Whether the results for these texts have at most `most` bytes.
    fn is_within(&self, most: usize, texts: &[&str]) -> bool {
        let bytes: usize = texts.iter().map(|text| text.len()).sum();
        match self {
            Growth::Times(factor, more) => bytes.saturating_mul(*factor) + texts.len().saturating_mul(*more) <= most,
            Growth::Replaced(regex, by) => {
                // There may be a match at every position. Count matches only if that would be too
                // many.
                let all = |places: usize| bytes.saturating_add(places.saturating_mul(*by)) <= most;
                all(bytes + texts.len()) || all(texts.iter().map(|text| regex.find_iter(text).count()).sum())
            }
        }
    }
}

impl<S: Step> Chain<S> {
    /// Steps that need no limits.
    pub(super) fn of(steps: impl IntoIterator<Item = S>) -> Self {
        Chain(steps.into_iter().map(|step| (step, Growth::Times(1, 0))).collect())
    }

    fn read(value: Value) -> Result<Self, String> {
        let mut steps = Vec::new();
        flatten::<S>(value, 0, &mut steps)?;
        check_all(&steps)?;
        let read = |value: Value| {
            let growth = growth(&value)?;
            Ok((S::deserialize(value).map_err(|e| e.to_string())?, growth))
        };
        steps.into_iter().map(read).collect::<Result<_, String>>().map(Chain)
    }
}

/// Collects the steps of a sequence, including nested sequences.
fn flatten<S: Step>(value: Value, depth: usize, steps: &mut Vec<Value>) -> Result<(), String> {
    let is_sequence = value.get("type").is_none_or(|kind| kind == "Sequence");
    match value {
        Value::Object(mut map) if is_sequence && map.get(S::LIST).is_some_and(Value::is_array) => {
            if depth == MOST_DEPTH {
                return Err(format!("`{}` are nested deeper than {MOST_DEPTH}", S::LIST));
            }
            let Some(Value::Array(list)) = map.remove(S::LIST) else { return Ok(()) };
            list.into_iter().try_for_each(|step| flatten::<S>(step, depth + 1, steps))
        }
        _ if steps.len() == MOST_STEPS => Err(format!("has more than {MOST_STEPS} `{}`", S::LIST)),
        step => {
            steps.push(step);
            Ok(())
        }
    }
}

/// Checks what can't be seen from a single step, and what applies to all kinds.
fn check_all(steps: &[Value]) -> Result<(), String> {
    let pattern = |step: &Value, kind| step.get("pattern")?.get(kind)?.as_str().map(str::len);
    if let Some(bytes) = steps
        .iter()
        .filter_map(|step| pattern(step, "Regex").or_else(|| pattern(step, "String")))
        .find(|&bytes| bytes > MOST_PATTERN)
    {
        return Err(format!("has a `pattern` of {bytes} bytes; at most {MOST_PATTERN} are read"));
    }
    let regexes = steps.iter().filter(|step| pattern(step, "Regex").is_some()).count();
    if regexes > MOST_REGEXES {
        return Err(format!("has {regexes} regular expressions in a row; at most {MOST_REGEXES} are read"));
    }
    let rewrites = steps.iter().filter(|step| {
        let rewrites = |kind: &Value| kind == "ByteLevel" || kind == "Metaspace";
        // Without a type it could be any.
        step.get("type").is_none_or(rewrites)
    });
    if rewrites.count() > MOST_REWRITES {
        return Err(format!("has more than {MOST_REWRITES} steps of ByteLevel, Metaspace or without `type` in a row"));
    }
    let too_long = |list: &Value| list.as_array().is_some_and(|list| list.len() > MOST_PIECES);
    let ids = |step: &Value| step.get("special_tokens")?.as_object().map(|map| map.values().cloned().collect());
    let ids = |step: &Value| ids(step).unwrap_or_else(Vec::new);
    if steps.iter().any(|step| {
        ["single", "pair"].iter().filter_map(|key| step.get(key)).any(too_long)
            || ids(step).iter().filter_map(|token: &Value| token.get("ids")).any(too_long)
    }) {
        return Err(format!("has a template with more than {MOST_PIECES} pieces, or a piece with more ids than that"));
    }
    Ok(())
}

/// How much a normalizer or decoder adds, according to the file.
fn growth(step: &Value) -> Result<Growth, String> {
    let text = |key| step.get(key).and_then(Value::as_str);
    if let (Some(pattern), Some(content)) = (step.get("pattern"), text("content")) {
        let literal = pattern.get("String").and_then(Value::as_str).map(regex::escape);
        let expression = literal.or_else(|| pattern.get("Regex")?.as_str().map(str::to_owned));
        // The library reports what is wrong with other patterns.
        let Some(expression) = expression else { return Ok(Growth::Times(1, 0)) };
        let regex =
            SysRegex::new(&expression).map_err(|e| format!("{expression:?} isn't a valid regular expression: {e}"))?;
        return Ok(Growth::Replaced(Arc::new(regex), content.len()));
    }
    if let Some(map) = text("precompiled_charsmap") {
        return Ok(Growth::Times(longest_mapped(map)?, 0));
    }
    Ok(match (text("type"), text("prepend")) {
        (_, Some(text)) => Growth::Times(1, text.len()),
        // 33 bytes for a character of three bytes.
        (Some("NFKC" | "NFKD" | "BertNormalizer"), _) => Growth::Times(12, 0),
        _ => Growth::Times(4, 1),
    })
}

/// Length in bytes of the longest text in a `precompiled_charsmap`. Its layout: the length of a
/// trie in bytes, the trie, and texts that each end with a zero.
fn longest_mapped(map: &str) -> Result<usize, String> {
    const KEY: &str = "`precompiled_charsmap`";
    let bytes = BASE64.decode(map).map_err(|e| format!("{KEY} is not base64: {e}"))?;
    let (trie, rest) = bytes.split_first_chunk::<4>().ok_or_else(|| format!("{KEY} is truncated"))?;
    let trie = u32::from_le_bytes(*trie) as usize;
    let texts = rest.get(trie..).ok_or_else(|| format!("{KEY} is truncated: its trie has {trie} bytes"))?;
    let longest = texts.split(|&byte| byte == 0).map(<[u8]>::len).max().unwrap_or(0);
    if longest > MOST_MAPPED {
        return Err(format!("{KEY} makes {longest} bytes of a character; at most {MOST_MAPPED} are read"));
    }
    Ok(longest.max(1))
}

impl<S: Step> Serialize for Chain<S> {
    fn serialize<T: Serializer>(&self, serializer: T) -> Result<T::Ok, T::Error> {
        if let [(step, _)] = &self.0[..] {
            return step.serialize(serializer);
        }
        let mut map = serializer.serialize_map(Some(2))?;
        map.serialize_entry("type", "Sequence")?;
        map.serialize_entry(S::LIST, &self.0.iter().map(|(step, _)| step).collect::<Vec<_>>())?;
        map.end()
    }
}

impl<'de, S: Step> Deserialize<'de> for Chain<S> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Chain::read(Value::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

impl Normalizer for Chain<NormalizerWrapper> {
    /// Calls [`refuse`] instead of returning errors, which the library would ignore.
    fn normalize(&self, text: &mut NormalizedString) -> tokenizers::Result<()> {
        let most = text.get_original().len().saturating_mul(MOST_GROWTH) + MOST_ADDED;
        for (step, growth) in &self.0 {
            if !growth.is_within(most, &[text.get()]) {
                refuse(format!("its normalizers make more than {most} bytes of {}", text.get_original().len()));
            }
            step.normalize(text).unwrap_or_else(|e| refuse(e.to_string()));
        }
        Ok(())
    }
}

impl PreTokenizer for Chain<PreTokenizerWrapper> {
    fn pre_tokenize(&self, text: &mut PreTokenizedString) -> tokenizers::Result<()> {
        self.0.iter().try_for_each(|(step, _)| step.pre_tokenize(text))
    }
}

impl PostProcessor for Chain<PostProcessorWrapper> {
    fn added_tokens(&self, is_pair: bool) -> usize {
        self.0.iter().map(|(step, _)| step.added_tokens(is_pair)).sum()
    }

    fn process_encodings(
        &self,
        encodings: Vec<Encoding>,
        add_special_tokens: bool,
    ) -> tokenizers::Result<Vec<Encoding>> {
        self.0.iter().try_fold(encodings, |encodings, (step, _)| {
            let encodings = step.process_encodings(encodings, add_special_tokens)?;
            let tokens: usize = encodings.iter().map(Encoding::len).sum();
            if tokens > MOST_AROUND {
                return Err(format!("its post-processors make more than {MOST_AROUND} tokens of a letter").into());
            }
            Ok(encodings)
        })
    }
}

impl Decoder for Chain<DecoderWrapper> {
    fn decode_chain(&self, tokens: Vec<String>) -> tokenizers::Result<Vec<String>> {
        let bytes: usize = tokens.iter().map(String::len).sum();
        let most = bytes.saturating_mul(MOST_GROWTH) + (tokens.len() + 1) * MOST_ADDED;
        self.0.iter().try_fold(tokens, |tokens, (step, growth)| {
            // Some decoders assume that there is a last one.
            if tokens.is_empty() {
                return Ok(tokens);
            }
            if !growth.is_within(most, &tokens.iter().map(String::as_str).collect::<Vec<_>>()) {
                return Err(format!("its decoders make more than {most} bytes of {bytes}").into());
            }
            step.decode_chain(tokens)
        })
    }
}
