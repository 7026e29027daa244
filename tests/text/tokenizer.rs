//! Tokenizers of model folders and of GGUF files, and chats.
//!
//! `golden/tokenizer/smollm2.gguf` has the metadata of SmolLM2-135M-Instruct (Apache-2.0) without
//! its tensors; the `.json` has the results of transformers for some texts and a chat.

use std::fs;
use std::path::{Path, PathBuf};

use qlora_wgpu::internal::gguf::GgufFile;
use qlora_wgpu::text::{Conversation, Message, Tokenizer};
use qlora_wgpu::{Error, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer").join(name)
}

fn smollm2() -> Tokenizer {
    Tokenizer::from_gguf(&GgufFile::open(golden("smollm2.gguf")).unwrap()).unwrap()
}

fn smollm2_golden() -> Value {
    serde_json::from_slice(&fs::read(golden("smollm2.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// A GGUF file with metadata only.
#[derive(Default)]
struct Metadata {
    entries: u64,
    bytes: Vec<u8>,
}

impl Metadata {
    fn entry(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.entries += 1;
        self.bytes.extend(text(key));
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend(value);
        self
    }

    fn string(self, key: &str, value: &str) -> Self {
        self.entry(key, 8, &text(value))
    }

    fn array(self, key: &str, kind: u32, values: Vec<Vec<u8>>) -> Self {
        let head = [&kind.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        self.entry(key, 9, &[head, values.concat()].concat())
    }

    fn strings<T: AsRef<str>>(self, key: &str, values: &[T]) -> Self {
        self.array(key, 8, values.iter().map(|value| text(value.as_ref())).collect())
    }

    fn tokenizer(self) -> Result<Tokenizer> {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("model.gguf");
        let head = [&b"GGUF"[..], &3u32.to_le_bytes(), &0u64.to_le_bytes(), &self.entries.to_le_bytes()].concat();
        fs::write(&path, [head, self.bytes].concat()).unwrap();
        Tokenizer::from_gguf(&GgufFile::open(&path)?)
    }
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// A SentencePiece vocabulary: the special tokens, all bytes (from id 4), and pieces (from id
/// 260).
fn sentence_piece() -> Metadata {
    const PIECES: [(&str, f32); 18] = [
        ("▁", -30.0),
        ("h", -31.0),
        ("e", -32.0),
        ("l", -33.0),
        ("o", -34.0),
        ("w", -35.0),
        ("r", -36.0),
        ("d", -37.0),
        ("he", -1.0),
        ("ll", -2.0),
        ("lo", -3.0),
        ("hell", -4.0),
        ("hello", -5.0),
        ("▁hello", -6.0),
        ("or", -7.0),
        ("ld", -8.0),
        ("orld", -9.0),
        ("▁world", -11.0),
    ];
    let bytes: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    let mut tokens = vec!["<unk>", "<s>", "</s>", "<tool>"];
    tokens.extend(bytes.iter().map(String::as_str));
    tokens.extend(PIECES.iter().map(|(piece, _)| piece));
    tokens.push("▁w");
    let mut scores = vec![0.0f32; 260];
    scores.extend(PIECES.iter().map(|(_, score)| score));
    scores.push(-10.0);
    let mut types = vec![2i32, 3, 3, 4];
    types.extend([6; 256]);
    types.extend([1; 19]);
    Metadata::default()
        .string("tokenizer.ggml.model", "llama")
        .strings("tokenizer.ggml.tokens", &tokens)
        .array("tokenizer.ggml.scores", 6, scores.iter().map(|score| score.to_le_bytes().to_vec()).collect())
        .array("tokenizer.ggml.token_type", 5, types.iter().map(|kind| kind.to_le_bytes().to_vec()).collect())
        .entry("tokenizer.ggml.bos_token_id", 4, &1u32.to_le_bytes())
        .entry("tokenizer.ggml.eos_token_id", 4, &2u32.to_le_bytes())
}

#[test]
fn smollm2_as_transformers_has_it() {
    let (tokenizer, golden) = (smollm2(), smollm2_golden());
    for case in golden["tokenize"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let wanted = ids(&case["ids"]);
        for add_special in [false, true] {
            assert_eq!(tokenizer.encode(text, add_special).unwrap(), wanted, "{text:?}");
        }
        assert_eq!(tokenizer.decode(&wanted, false).unwrap(), text);
    }
    assert_eq!(tokenizer.vocab_size(), 49152);
    assert_eq!((tokenizer.bos(), tokenizer.bos_text()), (Some(1), "<|im_start|>"));
    assert_eq!((tokenizer.eos(), tokenizer.eos_text()), (Some(2), "<|im_end|>"));
    assert_eq!(tokenizer.eos_ids(), [2, 0]);

    let chat = &golden["chat"];
    let messages = Conversation::from(Message::list(&chat["messages"]).unwrap());
    let text = tokenizer.chat().unwrap().render(&messages, true, tokenizer.bos_text(), tokenizer.eos_text()).unwrap();
    assert_eq!(text, chat["text"].as_str().unwrap());
    assert_eq!(tokenizer.encode(&text, true).unwrap(), ids(&chat["ids"]));
}

#[test]
fn round_trips() {
    let texts = [
        "",
        " ",
        "a",
        "  two  spaces\n\n\n",
        "don't WON'T",
        "1234567 ½ ²",
        "日本語 ça va 😀👩‍👩‍👧",
        "\u{0}\u{7f}\u{FFFD}x",
        "<|endoftext|>x",
    ];
    let tokenizers =
        [smollm2(), Tokenizer::from_file(golden("tiny.json")).unwrap(), sentence_piece().tokenizer().unwrap()];
    for tokenizer in &tokenizers {
        for text in texts {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
            let mut stream = tokenizer.decode_stream(false);
            let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
            pieces.push(stream.finish().unwrap());
            assert_eq!(pieces.concat(), text, "{pieces:?}");
        }
    }
}

#[test]
fn a_stream_holds_back_parts_of_characters() {
    for tokenizer in [smollm2(), sentence_piece().tokenizer().unwrap()] {
        let ids = tokenizer.encode("𓂀", false).unwrap();
        let (last, first) = ids.split_last().unwrap();
        assert!(!first.is_empty());
        let mut stream = tokenizer.decode_stream(false);
        assert!(first.iter().all(|&id| stream.push(id).unwrap().trim().is_empty()));
        let unfinished = stream.clone();
        assert_eq!(stream.push(*last).unwrap().trim(), "𓂀");
        assert_eq!(stream.finish().unwrap(), "");
        assert!(unfinished.finish().unwrap().ends_with('\u{FFFD}'));
    }

    let tokenizer = smollm2();
    let mut stream = tokenizer.decode_stream(true);
    let pieces: Vec<_> =
        tokenizer.encode("Hi<|im_end|> you", false).unwrap().into_iter().map(|id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces, ["Hi", "", " you"]);
    // An embedding row without a token.
    assert_eq!(stream.push(49152).unwrap(), "");
    assert_eq!(stream.push(28).unwrap(), ",", "an id without a token leaves the stream as it was");
}

#[test]
fn sentence_piece_joins_by_score() {
    let tokenizer = sentence_piece().tokenizer().unwrap();
    let id = |token: &str| tokenizer.token_id(token).unwrap();
    let encode = |text: &str| tokenizer.encode(text, false).unwrap();
    assert_eq!(encode("hello world"), [id("▁hello"), id("▁world")]);
    // `ll` (-2) comes before `lo` (-3), wherever they are.
    assert_eq!(encode("ello"), [id("▁"), id("e"), id("ll"), id("o")]);
    assert_eq!(encode("lol"), [id("▁"), id("lo"), id("l")]);
    assert_eq!(encode("  held"), [id("▁"), id("▁"), id("▁"), id("he"), id("ld")]);
    assert_eq!(encode("é\n"), [id("▁"), 4 + 0xC3, 4 + 0xA9, 4 + 0x0A]);
    assert_eq!(encode("hello<tool>hello</s>"), [id("▁hello"), 3, id("▁hello"), 2]);
    assert_eq!(tokenizer.decode(&encode("hello é world"), false).unwrap(), "hello é world");
    assert_eq!(tokenizer.decode(&[1, id("▁hello"), 2], true).unwrap(), "hello");

    let plain = sentence_piece().entry("tokenizer.ggml.add_space_prefix", 7, &[0]).tokenizer().unwrap();
    assert_eq!(plain.encode("hello world", false).unwrap(), [id("hello"), id("▁world")]);
    assert_eq!(plain.decode(&[id("▁hello")], false).unwrap(), " hello");
}

#[test]
fn a_begin_token_is_never_doubled() {
    let tokenizer = sentence_piece().tokenizer().unwrap();
    let hello = tokenizer.token_id("▁hello").unwrap();
    assert_eq!(tokenizer.encode("hello", true).unwrap(), [1, hello]);
    assert_eq!(tokenizer.encode("<s>hello", true).unwrap(), [1, hello]);
    assert_eq!(tokenizer.encode("", true).unwrap(), [1]);

    let flags = |bos, eos| {
        sentence_piece().entry("tokenizer.ggml.add_bos_token", 7, &[bos]).entry(
            "tokenizer.ggml.add_eos_token",
            7,
            &[eos],
        )
    };
    let bare = flags(0, 0).tokenizer().unwrap();
    assert_eq!(bare.encode("hello", true).unwrap(), [hello]);
    let both = flags(1, 1).tokenizer().unwrap();
    assert_eq!(both.encode("hello", true).unwrap(), [1, hello, 2]);
    assert_eq!(both.encode("<s>hello</s>", true).unwrap(), [1, hello, 2]);
}

/// Tests where pre-tokenizers cut, with a vocabulary in which every uncut text is a single token.
#[test]
fn pre_tokenizers_cut_where_their_models_do() {
    let cases = [
        ("gpt-2", "x1234", vec!["x", "1234"]),
        ("smollm", "x123", vec!["x", "1", "2", "3"]),
        ("llama-bpe", "x12345", vec!["x", "123", "45"]),
        ("llama-bpe", "I'LL", vec!["I", "'LL"]),
        ("gpt-2", "I'LL", vec!["I", "'", "LL"]),
        ("qwen2", "x12", vec!["x", "1", "2"]),
        ("qwen2", "(a)", vec!["(a", ")"]),
        ("gpt-4o", "aB'sC", vec!["a", "B's", "C"]),
        ("tekken", "aBc1", vec!["a", "Bc", "1"]),
        ("deepseek-v3", "a.b", vec!["a", ".b"]),
        ("deepseek-coder", "a1.", vec!["a", "1", "."]),
        ("falcon", "a1234", vec!["a", "123", "4"]),
        ("default", "a1234", vec!["a", "123", "4"]),
        ("qwen35", "e\u{301}x", vec!["e\u{301}x"]),
    ];
    for (pre, text, wanted) in cases {
        // All substrings, byte by byte in the alphabet of byte-level BPE, and every way to merge
        // them.
        let spelled = |text: &str| -> String {
            let letter = |byte: u8| match byte {
                0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
                0x00..=0x20 => char::from_u32(0x100 + u32::from(byte)).unwrap(),
                _ => char::from_u32(0x100 + 33 + u32::from(byte) - 0x7F).unwrap(),
            };
            text.bytes().map(letter).collect()
        };
        let letters: Vec<char> = spelled(text).chars().collect();
        let mut tokens: Vec<String> = Vec::new();
        let mut merges: Vec<String> = Vec::new();
        for len in 1..=letters.len() {
            for at in 0..=letters.len() - len {
                let token: String = letters[at..at + len].iter().collect();
                if !tokens.contains(&token) {
                    let cuts = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
                    merges.extend(cuts.map(|(a, b)| format!("{a} {b}")));
                    tokens.push(token);
                }
            }
        }
        let tokenizer = Metadata::default()
            .string("tokenizer.ggml.model", "gpt2")
            .string("tokenizer.ggml.pre", pre)
            .strings("tokenizer.ggml.tokens", &tokens)
            .strings("tokenizer.ggml.merges", &merges)
            .tokenizer()
            .unwrap();
        let ids = tokenizer.encode(text, false).unwrap();
        let pieces: Vec<String> = ids.iter().map(|&id| tokenizer.decode(&[id], false).unwrap()).collect();
        assert_eq!(pieces, wanted, "{pre}");
    }
}

#[test]
fn gguf_files_that_cannot_be_read() {
    let message = |metadata: Metadata| match metadata.tokenizer() {
        Err(Error::File { path, message }) if path.ends_with("model.gguf") => message,
        other => panic!("{other:?}"),
    };
    let bpe =
        || Metadata::default().string("tokenizer.ggml.model", "gpt2").strings("tokenizer.ggml.tokens", &["a", "b"]);
    let unknown = message(bpe().string("tokenizer.ggml.pre", "sonnet"));
    assert!(unknown.contains("\"sonnet\" is not a known pre-tokenizer"), "{unknown}");
    assert!(message(bpe()).contains("`tokenizer.ggml.merges`: is missing"));
    assert!(message(bpe().strings("tokenizer.ggml.merges", &["ab"])).contains("\"ab\" is not two tokens"));
    assert_eq!(
        message(bpe().strings("tokenizer.ggml.merges", &["a c"])),
        "`tokenizer.ggml.tokens`: Token `c` out of vocabulary"
    );
    assert!(
        message(bpe().strings::<&str>("tokenizer.ggml.merges", &[]).entry(
            "tokenizer.ggml.eos_token_id",
            4,
            &2u32.to_le_bytes()
        ))
        .contains("is 2, but there are only 2 tokens")
    );
    assert!(message(Metadata::default()).contains("is missing"));
    let other = Metadata::default().string("tokenizer.ggml.model", "bert").strings("tokenizer.ggml.tokens", &["a"]);
    assert_eq!(
        message(other),
        "`tokenizer.ggml.model`: is \"bert\"; supported are gpt2 (byte-level BPE) and llama (SentencePiece)"
    );
    let double =
        Metadata::default().string("tokenizer.ggml.model", "gpt2").strings("tokenizer.ggml.tokens", &["a", "a"]);
    assert!(message(double).contains("both token 0 and token 1"));
    let short = Metadata::default()
        .string("tokenizer.ggml.model", "llama")
        .strings("tokenizer.ggml.tokens", &["a", "b"])
        .array("tokenizer.ggml.scores", 6, vec![vec![0; 4]]);
    assert!(message(short).contains("1 values for 2 tokens"));
    let of_length = |length: usize| {
        Metadata::default()
            .string("tokenizer.ggml.model", "llama")
            .strings("tokenizer.ggml.tokens", &["é", &"é".repeat(length)])
            .array("tokenizer.ggml.scores", 6, vec![vec![0; 4]; 2])
    };
    of_length(512).tokenizer().unwrap();
    assert!(message(of_length(513)).contains("`tokenizer.ggml.tokens`: token 1 has more than 512 characters"));
}

#[test]
fn a_vocabulary_larger_than_the_models_is_refused() {
    let tokenizer = Tokenizer::from_file(golden("tiny.json")).unwrap();
    assert_eq!(tokenizer.vocab_size(), 2048);
    tokenizer.check_vocabulary(2048).unwrap();
    tokenizer.check_vocabulary(2304).unwrap();
    let error = tokenizer.check_vocabulary(2047).unwrap_err().to_string();
    assert_eq!(
        error,
        "tokenizer: the vocabulary is 2048 tokens; the model has 2047; this tokenizer belongs to another model"
    );
    let ids = tokenizer.encode("a cat", false).unwrap();
    let padded: Vec<u32> = [&[2048], &ids[..], &[u32::MAX]].concat();
    assert_eq!(tokenizer.decode(&padded, false).unwrap(), "a cat", "ids without a token give no text");
    assert_eq!(tokenizer.eos_ids(), [0]);
    assert!(matches!(tokenizer.chat(), Err(Error::Invalid { .. })));
}

/// A folder with the tiny tokenizer and these further files.
fn folder(files: &[(&str, Value)]) -> TempDir {
    let folder = TempDir::new().unwrap();
    fs::copy(golden("tiny.json"), folder.path().join("tokenizer.json")).unwrap();
    files.iter().for_each(|(name, value)| fs::write(folder.path().join(name), value.to_string()).unwrap());
    folder
}

#[test]
fn tokens_beside_tokenizer_json_are_added() {
    let token = |content: &str, special: bool| json!({"content": content, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": special});
    let decoder = json!({
        "0": token("<|endoftext|>", true), "2048": token("<|user|>", true), "2049": token("<|bot|>", true),
        "2050": token("<tool>", false),
    });
    let list = json!({"<|user|>": 2048, "<|bot|>": 2049});
    let config = |decoder: &Value| json!({"eos_token": "<|endoftext|>", "added_tokens_decoder": decoder});
    let read = |files: &[(&str, Value)]| Tokenizer::from_dir(folder(files).path()).unwrap();

    let whole = read(&[("tokenizer_config.json", config(&decoder)), ("added_tokens.json", list.clone())]);
    let (hi, yo) = (whole.encode("hi", false).unwrap(), whole.encode("yo", false).unwrap());
    let wanted = [&[2048][..], &hi, &[2049], &yo, &[2050]].concat();
    assert_eq!(whole.encode("<|user|>hi<|bot|>yo<tool>", false).unwrap(), wanted);
    assert_eq!(whole.decode(&wanted, true).unwrap(), "hiyo<tool>", "two of them are special");
    assert_eq!(whole.vocab_size(), 2051);
    // Either file alone is enough.
    for files in [&[("tokenizer_config.json", config(&decoder))][..], &[("added_tokens.json", list)]] {
        assert_eq!(read(files).encode("<|user|>hi<|bot|>yo", false).unwrap(), wanted[..wanted.len() - 1]);
    }
    // A token that ends a turn does so here too.
    let ends = json!({"2048": token("<|im_end|>", true)});
    assert_eq!(read(&[("tokenizer_config.json", config(&ends))]).eos_ids(), [0, 2048]);

    // An id that the library would not assign belongs to another row, so the token is left out.
    let gap = json!({"2060": token("<|far|>", true)});
    assert_eq!(read(&[("tokenizer_config.json", config(&gap))]).token_id("<|far|>"), None);
    for (bad, wanted) in [
        (json!({"x": token("<a>", true)}), "x`: isn't a token id"),
        (json!({"2048": {"special": true}}), "2048`: missing field `content`"),
        (json!({"2048": 5}), "2048`: invalid type: integer `5`, expected "),
    ] {
        let folder = folder(&[("tokenizer_config.json", config(&bad))]);
        let error = Tokenizer::from_dir(folder.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("tokenizer_config.json: `added_tokens_decoder.{wanted}")), "{error}");
    }
}

#[test]
fn a_padding_token_may_have_no_row() {
    let padded =
        folder(&[("tokenizer_config.json", json!({"pad_token": "<pad>", "additional_special_tokens": ["<x>"]}))]);
    let tokenizer = Tokenizer::from_dir(padded.path()).unwrap();
    assert_eq!((tokenizer.token_id("<pad>"), tokenizer.token_id("<x>")), (Some(2048), Some(2049)));
    tokenizer.check_vocabulary(2048).unwrap();
    assert_eq!(
        tokenizer.check_vocabulary(2047).unwrap_err().to_string(),
        "tokenizer: the vocabulary is 2050 tokens; the model has 2047; this tokenizer belongs to another model"
    );
}

#[test]
fn malformed_json_names_the_file() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("tokenizer.json");
    assert!(matches!(Tokenizer::from_file(&path), Err(Error::Io { .. })));
    for text in ["{", "{}", "\u{0}", "[1]"] {
        fs::write(&path, text).unwrap();
        let error = Tokenizer::from_dir(folder.path()).unwrap_err();
        assert!(matches!(&error, Error::File { path: named, .. } if *named == path), "{error}");
    }
}

#[test]
fn the_files_of_a_model_folder() {
    let folder = TempDir::new().unwrap();
    let write = |name: &str, value: &Value| fs::write(folder.path().join(name), value.to_string()).unwrap();
    let mut tiny: Value = serde_json::from_slice(&fs::read(golden("tiny.json")).unwrap()).unwrap();
    let added = tiny["added_tokens"].as_array_mut().unwrap();
    for (id, name) in [(2048, "<s>"), (2049, "<|im_end|>")] {
        let mut token = added[0].clone();
        token["id"] = json!(id);
        token["content"] = json!(name);
        added.push(token);
    }
    // Training must not silently cut or pad.
    tiny["truncation"] = json!({"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"});
    tiny["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"});
    write("tokenizer.json", &tiny);
    let bare = Tokenizer::from_dir(folder.path()).unwrap();
    assert_eq!((bare.bos(), bare.eos_ids(), bare.vocab_size()), (None, &[2049, 0][..], 2050));
    let ids = bare.encode("one two three", true).unwrap();
    assert_eq!(bare.decode(&ids, false).unwrap(), "one two three");

    // The post-processor decides.
    tiny["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [2048], "tokens": ["<s>"]}},
    });
    write("tokenizer.json", &tiny);
    let begun = Tokenizer::from_dir(folder.path()).unwrap();
    assert_eq!(begun.encode("one two three", true).unwrap(), [&[2048], &ids[..]].concat());
    assert_eq!(begun.encode("<s>one two three", true).unwrap(), [&[2048], &ids[..]].concat());

    // Configs override it.
    let mut config = json!({
        "bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "<|endoftext|>", "add_bos_token": false,
        "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}yes"}],
    });
    write("tokenizer_config.json", &config);
    write("generation_config.json", &json!({"eos_token_id": [0, 17]}));
    let configured = Tokenizer::from_dir(folder.path()).unwrap();
    assert_eq!(configured.encode("one two three", true).unwrap(), ids);
    assert_eq!((configured.bos_text(), configured.eos_text()), ("<s>", "<|endoftext|>"));
    assert_eq!(configured.eos_ids(), [0, 17, 2049]);
    assert_eq!(configured.chat().unwrap().render(&Conversation::default(), false, "<s>", "").unwrap(), "<s>yes");
    fs::write(folder.path().join("chat_template.jinja"), "from the file").unwrap();
    assert_eq!(Tokenizer::from_dir(folder.path()).unwrap().chat_template(), Some("from the file"));

    config["eos_token"] = json!("<nothing>");
    write("tokenizer_config.json", &config);
    let error = Tokenizer::from_dir(folder.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json") && error.contains("`eos_token`: \"<nothing>\""), "{error}");
}
