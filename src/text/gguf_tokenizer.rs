//! Reads the tokenizer in a GGUF file: a vocabulary with merges (`gpt2`: byte-level BPE) or with
//! scores (`llama`: SentencePiece's BPE).
//!
//! SentencePiece has no list of merges. In each step it joins the two neighbours whose union has
//! the best score. This equals BPE with all pairs (a, b) of pieces for which ab is a piece, ranked
//! by the score of ab.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, BpeBuilder, Merges, Vocab};
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::guard::Inner;
use super::panics::guarded;
use super::pretokenizer;
use super::steps::Chain;
use super::tokenizer::{EOS_TOKENS, Parts, Tokenizer};
use crate::error::Result;
use crate::formats::gguf::GgufFile;

pub(super) const MODEL: &str = "tokenizer.ggml.model";
pub(super) const PRE: &str = "tokenizer.ggml.pre";
pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
pub(super) const SCORES: &str = "tokenizer.ggml.scores";
pub(super) const TYPES: &str = "tokenizer.ggml.token_type";
pub(super) const MERGES: &str = "tokenizer.ggml.merges";

/// SentencePiece's symbol for a space.
pub(super) const SPACE: &str = "▁";

/// Maximum length of a piece in SentencePiece's trainer, in characters. All cuts of a piece are
/// tried.
const MAX_PIECE: usize = 512;

/// Token types, numbered like in `tokenizer.ggml.token_type`.
pub(super) mod kind {
    pub const NORMAL: i32 = 1;
    pub const UNKNOWN: i32 = 2;
    pub const CONTROL: i32 = 3;
    pub const USER_DEFINED: i32 = 4;
    pub const UNUSED: i32 = 5;
    pub const BYTE: i32 = 6;
}

/// Tokens by id.
struct Vocabulary<'a> {
    file: &'a GgufFile,
    tokens: Vec<&'a str>,
    types: Vec<i32>,
    ids: HashMap<&'a str, u32>,
}

impl Tokenizer {
    /// Reads the tokenizer in a GGUF file. Its ids are those of llama.cpp, which doesn't normalize
    /// Unicode.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File) for an unknown kind of tokenizer or pre-tokenizer, or
    /// for keys that are missing or contradict each other.
    #[doc(hidden)]
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        let vocabulary = Vocabulary::read(file)?;
        let model: &str = file.require(MODEL)?;
        let (inner, add_bos) = match model {
            "gpt2" => vocabulary.byte_level()?,
            "llama" => (vocabulary.sentence_piece()?, true),
            other => {
                let message = format!("is {other:?}; supported are gpt2 (byte-level BPE) and llama (SentencePiece)");
                return Err(file.metadata_error(MODEL, message));
            }
        };
        vocabulary.finish(inner, add_bos)
    }
}

impl<'a> Vocabulary<'a> {
    fn read(file: &'a GgufFile) -> Result<Self> {
        let tokens: Vec<&str> = file.require(TOKENS)?;
        if tokens.is_empty() || u32::try_from(tokens.len()).is_err() {
            return Err(file.metadata_error(TOKENS, format!("has {} tokens", tokens.len())));
        }
        let types = file.get(TYPES)?.unwrap_or_else(|| vec![kind::NORMAL; tokens.len()]);
        let vocabulary = Vocabulary { file, ids: HashMap::with_capacity(tokens.len()), types, tokens };
        vocabulary.check_len(TYPES, vocabulary.types.len())?;
        vocabulary.index()
    }

    fn index(mut self) -> Result<Self> {
        for (id, &token) in (0..).zip(&self.tokens) {
            match self.ids.entry(token) {
                Entry::Vacant(entry) => drop(entry.insert(id)),
                Entry::Occupied(entry) => {
                    let message = format!("{token:?} is both token {} and token {id}", entry.get());
                    return Err(self.file.metadata_error(TOKENS, message));
                }
            }
        }
        Ok(self)
    }

    fn check_len(&self, key: &str, len: usize) -> Result<()> {
        if len == self.tokens.len() {
            return Ok(());
        }
        Err(self.file.metadata_error(key, format!("has {len} values for {} tokens", self.tokens.len())))
    }

    /// Builds a model from the vocabulary and merges.
    fn bpe(&self, merges: Merges) -> BpeBuilder {
        let vocabulary: Vocab = self.ids.iter().map(|(&token, &id)| (token.to_owned(), id)).collect();
        BPE::builder().vocab_and_merges(vocabulary, merges)
    }

    fn tokenizer(&self, model: BpeBuilder) -> Result<Inner> {
        let made = || model.build().map(|model| Inner::new(model.into()));
        guarded(self.file.path(), &format!("`{TOKENS}`"), made)
    }

    /// Builds byte-level BPE; also returns whether text starts with the begin token by default.
    fn byte_level(&self) -> Result<(Inner, bool)> {
        let name = self.file.get(PRE)?.unwrap_or_else(|| {
            tracing::warn!(
                "{}: has no `{PRE}`, so words are cut as GPT-2's first converters did; text may become other tokens than \
                 the model was trained on. Convert the model again",
                self.file.path().display()
            );
            "default"
        });
        let pre = pretokenizer::by_name(name).ok_or_else(|| {
            self.file
                .metadata_error(PRE, format!("{name:?} is not a known pre-tokenizer; use a tokenizer.json instead"))
        })?;

        let lines: Vec<&str> = self.file.require(MERGES)?;
        // Search from the second character on, because a merge may start with a space that stands
        // for itself.
        let cut = |line: &&str| {
            let first = line.chars().next()?.len_utf8();
            let at = first + line[first..].find(' ')?;
            Some((line[..at].to_owned(), line[at + 1..].to_owned()))
        };
        let merges = lines.iter().map(|line| {
            cut(line).ok_or_else(|| self.file.metadata_error(MERGES, format!("{line:?} is not two tokens and a space")))
        });
        let merges = merges.collect::<Result<Merges>>()?;
        let mut inner = self.tokenizer(self.bpe(merges).ignore_merges(pre.whole_words))?;

        let failed = |e: tokenizers::Error| self.file.metadata_error(PRE, e);
        let splits = pre.splits.iter().map(|&pattern| {
            let pattern = SplitPattern::Regex(pattern.to_owned());
            Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map(PreTokenizerWrapper::from).map_err(failed)
        });
        let bytes = ByteLevel::new(false, false, false);
        let steps = splits.chain([Ok(bytes.into())]).collect::<Result<Vec<_>>>()?;
        inner.with_pre_tokenizer(Some(Chain::of(steps)));
        inner.with_decoder(Some(Chain::of([bytes.into()])));
        Ok((inner, pre.add_bos))
    }

    fn sentence_piece(&self) -> Result<Inner> {
        let scores: Vec<f32> = self.file.require(SCORES)?;
        self.check_len(SCORES, scores.len())?;
        if let Some(id) = self.tokens.iter().position(|token| token.chars().nth(MAX_PIECE).is_some()) {
            let message = format!("token {id} has more than {MAX_PIECE} characters; SentencePiece has no such pieces");
            return Err(self.file.metadata_error(TOKENS, message));
        }
        let mut model = self.bpe(self.merges_by_score(&scores)).byte_fallback(true).fuse_unk(true);
        if let Some(unknown) = self.types.iter().position(|&kind| kind == kind::UNKNOWN) {
            model = model.unk_token(self.tokens[unknown].to_owned());
        }
        let mut inner = self.tokenizer(model)?;

        let failed = |e: tokenizers::Error| self.file.metadata_error(MODEL, e);
        let prefix = self.file.get("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let mut normalizers: Vec<NormalizerWrapper> = vec![Replace::new(" ", SPACE).map_err(failed)?.into()];
        let mut decoders: Vec<DecoderWrapper> =
            vec![Replace::new(SPACE, " ").map_err(failed)?.into(), ByteFallback::new().into(), Fuse::new().into()];
        if prefix {
            normalizers.insert(0, Prepend::new(SPACE.to_owned()).into());
            decoders.push(Strip::new(' ', 1, 0).into());
        }
        inner.with_normalizer(Some(Chain::of(normalizers))).map_err(failed)?;
        inner.with_decoder(Some(Chain::of(decoders)));
        Ok(inner)
    }

    /// All pairs of pieces whose union is a piece, best score first; ties in the order of the
    /// vocabulary.
    fn merges_by_score(&self, scores: &[f32]) -> Merges {
        let is_piece = |id: usize| matches!(self.types[id], kind::NORMAL | kind::USER_DEFINED | kind::UNUSED);
        let piece = |text: &str| self.ids.get(text).is_some_and(|&id| is_piece(id as usize));
        let mut pairs: Vec<(f32, &str, &str)> = Vec::new();
        for (id, token) in self.tokens.iter().enumerate().filter(|&(id, _)| is_piece(id)) {
            let cuts = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
            pairs.extend(cuts.filter(|(a, b)| piece(a) && piece(b)).map(|(a, b)| (scores[id], a, b)));
        }
        pairs.sort_by(|a, b| b.0.total_cmp(&a.0));
        pairs.into_iter().map(|(_, a, b)| (a.to_owned(), b.to_owned())).collect()
    }

    /// Adds what both kinds have: special tokens, begin and end tokens, and the chat template.
    fn finish(&self, mut inner: Inner, add_bos: bool) -> Result<Tokenizer> {
        let of_kind = |wanted: &[i32], special| -> Vec<AddedToken> {
            let tokens =
                self.tokens.iter().zip(&self.types).filter(|(token, kind)| wanted.contains(kind) && !token.is_empty());
            tokens.map(|(&token, _)| AddedToken::from(token, special).normalized(false)).collect()
        };
        guarded(self.file.path(), &format!("`{TOKENS}`"), || {
            inner.add_special_tokens(of_kind(&[kind::CONTROL, kind::UNKNOWN], true))?;
            inner.add_tokens(of_kind(&[kind::USER_DEFINED], false))
        })?;

        let bos = self.special("bos")?;
        let stated = [self.special("eos")?, self.special("eot")?, self.special("eom")?];
        let known = EOS_TOKENS.iter().filter_map(|&name| self.ids.get(name).copied());
        let known = known.filter(|&id| matches!(self.types[id as usize], kind::CONTROL | kind::USER_DEFINED));
        let flag = |name: &str| self.file.get::<bool>(&format!("tokenizer.ggml.{name}"));
        let parts = Parts {
            path: self.file.path().into(),
            inner,
            bos,
            eos: stated.into_iter().flatten().chain(known).collect(),
            add_bos: flag("add_bos_token")?.unwrap_or(add_bos),
            add_eos: flag("add_eos_token")?.unwrap_or(false),
            chat_template: self.file.get("tokenizer.chat_template")?.map(str::to_owned),
        };
        Ok(Tokenizer::new(parts))
    }

    /// Id given by `tokenizer.ggml.NAME_token_id`.
    fn special(&self, name: &str) -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let id: Option<u32> = self.file.get(&key)?;
        match id {
            Some(id) if id as usize >= self.tokens.len() => {
                Err(self.file.metadata_error(&key, format!("is {id}, but there are only {} tokens", self.tokens.len())))
            }
            id => Ok(id),
        }
    }
}
