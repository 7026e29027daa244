//! Tokenizers that ask for too much, or that the underlying library can't use: each gives an error
//! with the name of its file.

use std::fs;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use qlora_wgpu::text::Tokenizer;
use qlora_wgpu::{Error, Result};
use serde_json::{Value, json};

/// A tokenizer of bytes and a few merges.
fn plain() -> Value {
    let tokens =
        ["<s>", "</s>", "[UNK]", "h", "e", "l", "o", "Ġ", "1", "2", "a", "he", "ll", "hell", "hello", "é", "##a"];
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().zip(0..).map(|(token, id)| (token.to_string(), json!(id))).collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [added(0, "<s>"), added(1, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab,
            "merges": [["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"]],
        },
    })
}

fn added(id: u32, content: &str) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true,
    })
}

fn repeated(list: &str, step: Value, times: usize) -> Value {
    json!({"type": "Sequence", list: vec![step; times]})
}

fn nested(list: &str, step: Value, depth: usize) -> Value {
    (0..depth).fold(step, |inner, _| json!({"type": "Sequence", list: [inner]}))
}

/// Reads a tokenizer and uses it in every way. Errors must name its file, and nothing may take
/// long.
fn try_out(json: &Value) -> Result<()> {
    let start = Instant::now();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    fs::write(&path, json.to_string()).unwrap();
    let tried = (|| {
        let tokenizer = Tokenizer::from_dir(folder.path())?;
        for text in ["", "hello 12  cat", "aaaa é\u{301}ﷺ\u{FDFA} <s>hello</s>", &"a".repeat(400)] {
            for special in [true, false] {
                let ids = tokenizer.encode(text, special)?;
                let whole = tokenizer.decode(&ids, special)?;
                assert!(whole.len() < 1 << 20, "{} bytes", whole.len());
                let mut stream = tokenizer.decode_stream(special);
                ids.iter().try_for_each(|&id| stream.push(id).map(drop))?;
                stream.finish()?;
            }
        }
        tokenizer.decode(&[0, u32::MAX, 99], false).map(drop)
    })();
    if let Err(error) = &tried {
        assert!(matches!(error, Error::File { path: named, .. } if *named == path), "{error}");
    }
    assert!(start.elapsed() < Duration::from_secs(20), "{:?} for {json}", start.elapsed());
    tried
}

#[test]
fn what_is_common_is_read() {
    try_out(&plain()).unwrap();
    for (key, value) in [
        ("normalizer", json!(null)),
        ("normalizer", json!({"type": "Prepend", "prepend": "▁"})),
        ("normalizer", json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})),
        ("normalizer", nested("normalizers", json!({"type": "NFKC"}), 5)),
        ("pre_tokenizer", nested("pretokenizers", json!({"type": "Digits", "individual_digits": true}), 3)),
        (
            "decoder",
            json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "Ġ"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}),
        ),
        ("decoder", json!({"type": "BPEDecoder", "suffix": "</w>"})),
        ("truncation", json!({"max_length": 0, "strategy": "LongestFirst", "stride": 9, "direction": "Right"})),
        (
            "padding",
            json!({"strategy": {"Fixed": 1_000_000_000_000_u64}, "direction": "Right", "pad_to_multiple_of": 0,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}),
        ),
    ] {
        let mut json = plain();
        json[key] = value;
        try_out(&json).unwrap_or_else(|error| panic!("{key}: {error}"));
    }
}

#[test]
fn what_asks_for_too_much_is_an_error() {
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": false});
    let template = |pieces: usize| {
        json!({
            "type": "TemplateProcessing", "single": vec![json!({"Sequence": {"id": "A", "type_id": 0}}); pieces],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}], "special_tokens": {},
        })
    };
    // A trie that claims 4 GB; a text of 70 bytes for one character.
    let long = format!("BAAAAAAAAABh{}", "YWFh".repeat(23));
    let map = |text: &str| json!({"type": "Precompiled", "precompiled_charsmap": text});
    for (key, value, wanted) in [
        ("normalizer", repeated("normalizers", replace("a", "aa"), 40), "normalizers make more than"),
        ("normalizer", replace("a", &"a".repeat(1 << 20)), "normalizers make more than"),
        (
            "normalizer",
            json!({"type": "Replace", "pattern": {"Regex": ""}, "content": "b".repeat(999)}),
            "normalizers make",
        ),
        (
            "normalizer",
            repeated("normalizers", json!({"type": "Prepend", "prepend": "▁".repeat(99)}), 400),
            "normalizers make",
        ),
        ("normalizer", repeated("normalizers", json!({"type": "ByteLevel"}), 40), "more than 3 steps of ByteLevel"),
        ("normalizer", repeated("normalizers", json!({"type": "NFC"}), 600), "has more than 512 `normalizers`"),
        ("normalizer", nested("normalizers", json!({"type": "NFC"}), 40), "nested deeper than 16"),
        ("normalizer", nested("normalizers", json!({"type": "NFC"}), 200), "recursion limit"),
        ("normalizer", map("/////w=="), "is truncated"),
        ("normalizer", map(&long), "bytes of a character"),
        ("normalizer", map("%"), "not base64"),
        (
            "normalizer",
            json!({"type": "Replace", "pattern": {"Regex": "(a"}, "content": ""}),
            "isn't a valid regular expression",
        ),
        (
            "normalizer",
            json!({"type": "Replace", "pattern": {"Regex": "a".repeat(1 << 15)}, "content": ""}),
            "`pattern` of 32768",
        ),
        ("pre_tokenizer", repeated("pretokenizers", byte_level, 40), "more than 3 steps of ByteLevel"),
        ("pre_tokenizer", json!({"type": "FixedLength", "length": 0}), "tokenizers library can't use it"),
        (
            "pre_tokenizer",
            repeated(
                "pretokenizers",
                json!({"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": false}),
                40,
            ),
            "40 regular expressions",
        ),
        ("post_processor", template(1000), "template with more than 64"),
        ("post_processor", repeated("processors", template(8), 12), "can't encode a letter"),
        ("decoder", nested("decoders", json!({"type": "Fuse"}), 120), "recursion limit"),
        ("decoder", nested("decoders", json!({"type": "Fuse"}), 60), "nested deeper than 16"),
        ("decoder", repeated("decoders", replace("a", "aa"), 40), "decoders make more than"),
        ("decoder", repeated("decoders", json!({"type": "BPEDecoder", "suffix": ""}), 40), "decoders make more than"),
        ("added_tokens", json!([added(0, &"x".repeat(5 << 20))]), "added tokens have 5242880 bytes"),
    ] {
        let mut json = plain();
        json[key] = value;
        let error = try_out(&json).expect_err(wanted).to_string();
        assert!(error.contains(wanted), "{key}: {error}, expected {wanted:?}");
    }
    let mut json = plain();
    json["model"]["end_of_word_suffix"] = json!("x".repeat(300));
    assert!(try_out(&json).unwrap_err().to_string().contains("prefix or suffix of more than 256 bytes"));
    json["model"] = json!({"type": "Unigram", "unk_id": 0, "vocab": [["a".repeat(17 << 20), -1.0]]});
    assert!(try_out(&json).unwrap_err().to_string().contains("pieces of 17825792 bytes"));
}

#[test]
fn what_the_library_panics_at_is_an_error() {
    // A trie of two units that point outside it, and "abc".
    let precompiled = json!({"type": "Precompiled", "precompiled_charsmap": "CAAAAP//////////YWJjAA=="});
    let missing = json!({
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "ZZ", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {},
    });
    let unusable = "can't encode a letter: the tokenizers library can't use it (";
    for (key, value, wanted) in [
        ("normalizer", precompiled, unusable),
        ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "is malformed: "),
        ("post_processor", missing, unusable),
        ("decoder", json!({"type": "Nothing"}), "is malformed: "),
        ("decoder", json!(7), "is malformed: "),
        ("pre_tokenizer", json!({"type": "FixedLength", "length": 0}), unusable),
    ] {
        let mut json = plain();
        json[key] = value;
        let error = try_out(&json).unwrap_err().to_string();
        assert!(error.contains(&format!("tokenizer.json: {wanted}")), "{key}: {error}");
    }
}

/// Values to insert anywhere.
fn pool() -> Vec<Value> {
    let regex = json!({"Regex": "(a*)*b|(?=a)"});
    vec![
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(4_294_967_295_u32),
        json!(1e300),
        json!(""),
        json!("é"),
        json!("a\u{0}\u{FFFD}"),
        json!([]),
        json!({}),
        json!([[]]),
        json!({"type": "Sequence"}),
        json!({"type": "Strip", "content": "a", "start": 9, "stop": 9}),
        json!({"type": "Strip", "strip_left": true, "strip_right": true}),
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}),
        json!({"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": true}),
        json!({"type": "WordPiece", "prefix": "", "cleanup": true}),
        json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": true, "lowercase": true}),
        json!({"type": "BertProcessing", "sep": ["x", 99], "cls": ["y", 98]}),
        json!({"type": "RobertaProcessing", "sep": ["x", 99], "cls": ["y", 98], "trim_offsets": true, "add_prefix_space": true}),
        json!({"type": "Replace", "pattern": regex, "content": "aa"}),
        json!({"type": "Split", "pattern": regex, "behavior": "MergedWithNext", "invert": true}),
        json!({"type": "Punctuation", "behavior": "Contiguous"}),
        json!({"type": "UnicodeScripts"}),
        json!({"type": "FixedLength", "length": 3}),
        json!({"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 3,
            "vocab": {"[UNK]": 0, "a": 1, "##a": 2}}),
        json!({"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"a": 1}}),
        json!({"type": "Unigram", "unk_id": 3, "byte_fallback": true, "vocab": [["<s>", 0.0], ["a", -1.0], ["aa", -9.0]]}),
        json!({"type": "Unigram", "unk_id": null, "vocab": []}),
    ]
}

/// Finds the values inside `value`, including those of the vocabulary.
fn places(value: &Value, path: &str, found: &mut Vec<String>) {
    found.push(path.to_owned());
    match value {
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(i, value)| places(value, &format!("{path}/{i}"), found));
        }
        Value::Object(map) => map.iter().for_each(|(key, value)| {
            places(value, &format!("{path}/{}", key.replace('~', "~0").replace('/', "~1")), found);
        }),
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn changed_tokenizers_are_errors_or_other_tokenizers(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 1..4),
    ) {
        let (mut json, pool) = (plain(), pool());
        for (place, value) in changes {
            let mut found = Vec::new();
            places(&json, "", &mut found);
            let place: &String = place.get(&found);
            if let Some(target) = json.pointer_mut(place) {
                *target = value.get(&pool).clone();
            }
        }
        let _ = try_out(&json);
    }
}
