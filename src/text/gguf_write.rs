//! Writes a tokenizer as GGUF metadata that [`Tokenizer::from_gguf`] reads.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::gguf_tokenizer::{MERGES, MODEL, PRE, SCORES, SPACE, TOKENS, TYPES, kind};
use super::pretokenizer;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::formats::gguf::{Metadata, OutValue};

/// Score of pieces that no merge makes; lower than that of every merge.
const NO_MERGE: f32 = -1e6;

/// Relevant parts of a `tokenizer.json`.
#[derive(Deserialize)]
struct Spec {
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: String,
    vocab: BTreeMap<String, u32>,
    merges: Vec<(String, String)>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    unk_token: Option<String>,
}

/// Steps of a normalizer or pre-tokenizer: those of a sequence, or the single one.
fn steps(value: &Option<Value>, list: &str) -> Vec<Value> {
    match value {
        None => vec![],
        Some(value) => match value.get(list).and_then(Value::as_array) {
            Some(steps) => steps.clone(),
            None => vec![value.clone()],
        },
    }
}

fn is_type(step: &Value, kind: &str) -> bool {
    step["type"] == kind
}

impl Tokenizer {
    /// Adds the tokenizer of the model in `folder` to GGUF metadata: `vocab_size` tokens (the
    /// number of rows in the model's embedding), merges or scores, special tokens, and the chat
    /// template. `stated` are the begin, end and padding tokens in the model's config, used if the
    /// tokenizer doesn't define them.
    ///
    /// # Errors
    /// [`Error::File`] unless the tokenizer is SentencePiece's BPE, or byte-level BPE with a
    /// pre-tokenizer that has a name in GGUF files.
    pub(crate) fn write_gguf(
        &self,
        folder: &Path,
        vocab_size: usize,
        stated: [Option<u32>; 3],
        metadata: &mut Metadata,
    ) -> Result<()> {
        let path = folder.join("tokenizer.json");
        let refuse = |message: String| Error::File { path: path.clone(), message };
        let value = serde_json::to_value(self.inner()).map_err(|e| refuse(e.to_string()))?;
        let spec: Spec = serde_json::from_value(value)
            .map_err(|e| refuse(format!("not a BPE tokenizer; GGUF output needs one ({e})")))?;
        if spec.model.kind != "BPE" {
            return Err(refuse(format!("is a {} tokenizer; a GGUF file is made with BPE only", spec.model.kind)));
        }
        self.check_vocabulary(vocab_size).map_err(|e| refuse(e.to_string()))?;

        let (tokens, mut types) = self.tokens(vocab_size);
        if spec.model.byte_fallback {
            for (id, token) in tokens.iter().enumerate() {
                if token.len() == 6 && token.starts_with("<0x") && types[id] == kind::NORMAL {
                    types[id] = kind::BYTE;
                }
                if spec.model.unk_token.as_ref() == Some(token) {
                    types[id] = kind::UNKNOWN;
                }
            }
            sentence_piece(&spec, &tokens, metadata).map_err(refuse)?;
        } else {
            byte_level(&spec, metadata).map_err(refuse)?;
        }
        metadata.set(TOKENS, OutValue::Strings(tokens));
        metadata.set(TYPES, OutValue::I32s(types));

        let mut id = |name: &str, id: Option<u32>| {
            if let Some(id) = id.filter(|&id| (id as usize) < vocab_size) {
                metadata.set(format!("tokenizer.ggml.{name}_token_id"), OutValue::U32(id));
            }
        };
        let [bos, eos, padding] = stated;
        id("bos", self.bos().or(bos));
        id("eos", self.eos().or(eos));
        id("unknown", spec.model.unk_token.and_then(|token| self.token_id(&token)));
        id("padding", padding);
        let (add_bos, add_eos) = self.adds();
        metadata.set("tokenizer.ggml.add_bos_token", OutValue::Bool(add_bos));
        metadata.set("tokenizer.ggml.add_eos_token", OutValue::Bool(add_eos));
        if let Some(template) = self.chat_template() {
            metadata.set("tokenizer.chat_template", OutValue::String(template.into()));
        }
        Ok(())
    }

    /// Every token by id, and its type. Ids without a token get a name that doesn't occur in text.
    fn tokens(&self, count: usize) -> (Vec<String>, Vec<i32>) {
        let mut tokens: Vec<String> = (0..count).map(|id| format!("[PAD{id}]")).collect();
        let mut types = vec![kind::UNUSED; count];
        for (token, id) in self.inner().get_vocab(false) {
            (tokens[id as usize], types[id as usize]) = (token, kind::NORMAL);
        }
        // Added tokens may lie past the model's rows; the model can't distinguish them.
        for (id, token) in self.inner().get_added_tokens_decoder().into_iter().filter(|(id, _)| (*id as usize) < count)
        {
            tokens[id as usize] = token.content;
            types[id as usize] = if token.special { kind::CONTROL } else { kind::USER_DEFINED };
        }
        (tokens, types)
    }
}

/// Adds metadata for byte-level BPE. The error says what a GGUF file can't represent.
fn byte_level(spec: &Spec, metadata: &mut Metadata) -> Result<(), String> {
    // Readers of GGUF files, including llama.cpp, don't normalize Unicode. NFC changes almost no
    // text.
    if let Some(step) = steps(&spec.normalizer, "normalizers").iter().find(|step| !is_type(step, "NFC")) {
        return Err(format!("has a normalizer {}, which a GGUF file can't represent for byte-level BPE", step["type"]));
    }
    let mut patterns: Vec<String> = Vec::new();
    let mut bytes = false;
    for step in steps(&spec.pre_tokenizer, "pretokenizers") {
        let cannot = || format!("has a pre-tokenizer that a GGUF file can't represent: {step}");
        if is_type(&step, "ByteLevel") {
            if step["add_prefix_space"] == true {
                return Err(cannot());
            }
            bytes = true;
            patterns.extend((step["use_regex"] != false).then(|| pretokenizer::GPT2.to_owned()));
        } else if is_type(&step, "Digits") {
            patterns.push(if step["individual_digits"] == true { r"\p{N}" } else { r"\p{N}+" }.into());
        } else if is_type(&step, "Split") && step["behavior"] == "Isolated" && step["invert"] != true {
            patterns.push(step["pattern"]["Regex"].as_str().ok_or_else(cannot)?.to_owned());
        } else {
            return Err(cannot());
        }
    }
    let name = pretokenizer::name_of(&patterns, spec.model.ignore_merges).filter(|_| bytes);
    let name = name.ok_or_else(|| format!("splits words by {patterns:?}, which has no name in GGUF files"))?;
    let merges = spec.model.merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
    metadata.set(MODEL, OutValue::String("gpt2".into()));
    metadata.set(PRE, OutValue::String(name.into()));
    metadata.set("tokenizer.ggml.add_space_prefix", OutValue::Bool(false));
    metadata.set(MERGES, OutValue::Strings(merges));
    Ok(())
}

/// Adds metadata for SentencePiece's BPE. A piece's score is minus the rank of the first merge
/// that makes it, so that scores order merges like ranks did.
fn sentence_piece(spec: &Spec, tokens: &[String], metadata: &mut Metadata) -> Result<(), String> {
    let normalizers = steps(&spec.normalizer, "normalizers");
    let pre_tokenizers = steps(&spec.pre_tokenizer, "pretokenizers");
    let known = |step: &Value| {
        is_type(step, "Prepend") && step["prepend"] == SPACE
            || is_type(step, "Replace") && step["pattern"]["String"] == " " && step["content"] == SPACE
    };
    let is_metaspace = |step: &&Value| is_type(step, "Metaspace") && step["replacement"] == SPACE;
    if let Some(step) = normalizers.iter().find(|step| !known(step)) {
        return Err(format!("has a normalizer {step}, which a GGUF file can't represent for SentencePiece"));
    }
    if let Some(step) = pre_tokenizers.iter().find(|step| !is_metaspace(step)) {
        return Err(format!("has a pre-tokenizer {step}, which a GGUF file can't represent for SentencePiece"));
    }
    let prefix = normalizers.iter().any(|step| is_type(step, "Prepend"))
        || pre_tokenizers.iter().any(|step| step["prepend_scheme"] != "never");
    let mut ranks: BTreeMap<String, usize> = BTreeMap::new();
    for (rank, (a, b)) in spec.model.merges.iter().enumerate() {
        ranks.entry(format!("{a}{b}")).or_insert(rank);
    }
    let score = |token: &String| match ranks.get(token) {
        Some(&rank) => -(rank as f32),
        None if spec.model.vocab.contains_key(token) && token.chars().nth(1).is_some() => NO_MERGE,
        None => 0.0,
    };
    metadata.set(MODEL, OutValue::String("llama".into()));
    metadata.set(PRE, OutValue::String("default".into()));
    metadata.set("tokenizer.ggml.add_space_prefix", OutValue::Bool(prefix));
    metadata.set(SCORES, OutValue::F32s(tokens.iter().map(score).collect()));
    Ok(())
}
#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::gguf::{self, GgufFile, OutTensor};

    /// Converts the tokenizer of a GGUF file to Hugging Face files, and those to a GGUF file
    /// again.
    fn there_and_back(file: &GgufFile, vocab_size: usize) -> (Tokenizer, GgufFile, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let original = Tokenizer::from_gguf(file).unwrap();
        for (name, bytes) in original.files(file.path()).unwrap() {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
        let mut metadata = Metadata::default();
        tokenizer.write_gguf(folder.path(), vocab_size, [None; 3], &mut metadata).unwrap();
        let path = folder.path().join("again.gguf");
        gguf::write(&path, &metadata, &[] as &[OutTensor<'_>]).unwrap();
        (tokenizer, GgufFile::open(path).unwrap(), folder)
    }

    #[test]
    fn a_byte_level_tokenizer_is_the_same_afterwards() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer/smollm2.gguf");
        let file = GgufFile::open(golden).unwrap();
        let (_, again, _folder) = there_and_back(&file, 49152);
        let names = ["tokens", "token_type", "merges", "model", "pre", "bos_token_id", "eos_token_id", "add_bos_token"];
        let keys =
            names.map(|name| format!("tokenizer.ggml.{name}")).into_iter().chain(["tokenizer.chat_template".into()]);
        for key in keys {
            assert_eq!(again.metadata(&key), file.metadata(&key), "{key}");
        }
    }

    #[test]
    fn a_sentence_piece_tokenizer_encodes_the_same_afterwards() {
        let pieces = ["▁", "t", "h", "e", "n", "▁t", "he", "▁the", "en", "▁then", "hen"];
        let scores = [-20.0, -21.0, -22.0, -23.0, -24.0, -1.0, -2.0, -5.0, -3.0, -7.0, -4.0];
        let mut tokens = vec!["<unk>".to_owned(), "<s>".into(), "</s>".into()];
        tokens.extend((0..=255_u8).map(|byte| format!("<0x{byte:02X}>")));
        let mut all_scores = vec![0.0; tokens.len()];
        let mut types = vec![kind::UNKNOWN, kind::CONTROL, kind::CONTROL];
        types.resize(tokens.len(), kind::BYTE);
        tokens.extend(pieces.map(String::from));
        all_scores.extend(scores);
        types.resize(tokens.len(), kind::NORMAL);

        let (folder, vocab_size) = (tempfile::tempdir().unwrap(), tokens.len());
        let mut metadata = Metadata::default();
        metadata.set(MODEL, OutValue::String("llama".into()));
        metadata.set(TOKENS, OutValue::Strings(tokens));
        metadata.set(SCORES, OutValue::F32s(all_scores));
        metadata.set(TYPES, OutValue::I32s(types));
        metadata.set("tokenizer.ggml.bos_token_id", OutValue::U32(1));
        metadata.set("tokenizer.ggml.eos_token_id", OutValue::U32(2));
        let path = folder.path().join("first.gguf");
        gguf::write(&path, &metadata, &[] as &[OutTensor<'_>]).unwrap();
        let file = GgufFile::open(path).unwrap();
        let (between, again, _folder) = there_and_back(&file, vocab_size);
        for key in [TOKENS, TYPES, MODEL, "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"] {
            assert_eq!(again.metadata(key), file.metadata(key), "{key}");
        }
        let [first, last] = [&file, &again].map(|file| Tokenizer::from_gguf(file).unwrap());
        for text in ["then the hen", "the then", "é ten", "  net", ""] {
            let ids = first.encode(text, true).unwrap();
            assert_eq!(between.encode(text, true).unwrap(), ids, "{text}");
            assert_eq!(last.encode(text, true).unwrap(), ids, "{text}");
        }
    }
}
