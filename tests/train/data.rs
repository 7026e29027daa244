//! Files of training examples: token ids, and which of them carry loss.

use std::fs;
use std::path::{Path, PathBuf};

use qlora_wgpu::internal::gguf::GgufFile;
use qlora_wgpu::text::Tokenizer;
use qlora_wgpu::train::data::{DataOptions, Dataset, Example, Format};
use qlora_wgpu::{Error, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer").join(name)
}

/// SmolLM2's tokenizer: ChatML, where `<|im_end|>` (2) ends a turn.
fn chatml() -> Tokenizer {
    Tokenizer::from_gguf(&GgufFile::open(golden("smollm2.gguf")).unwrap()).unwrap()
}

/// A tokenizer with this chat template, `<s>` (2048) before every text, and `</s>` (2049) at its
/// end.
fn with_template(template: Option<&str>) -> Tokenizer {
    let folder = TempDir::new().unwrap();
    let mut tiny: Value = serde_json::from_slice(&fs::read(golden("tiny.json")).unwrap()).unwrap();
    for (id, name) in [(2048, "<s>"), (2049, "</s>")] {
        let mut token = tiny["added_tokens"][0].clone();
        token["id"] = json!(id);
        token["content"] = json!(name);
        tiny["added_tokens"].as_array_mut().unwrap().push(token);
    }
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true, "chat_template": template});
    fs::write(folder.path().join("tokenizer.json"), tiny.to_string()).unwrap();
    fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    Tokenizer::from_dir(folder.path()).unwrap()
}

fn read(tokenizer: &Tokenizer, name: &str, text: impl AsRef<[u8]>, skip_bad_lines: bool) -> Result<Dataset> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    Dataset::read(&path, Ok(tokenizer), &DataOptions { skip_bad_lines, ..DataOptions::default() })
}

fn one(tokenizer: &Tokenizer, line: &Value) -> Example {
    let dataset = read(tokenizer, "a.jsonl", line.to_string(), false).unwrap();
    assert_eq!(dataset.examples.len(), 1);
    dataset.examples.into_iter().next().unwrap()
}

/// Returns the whole text of an example, and its runs that carry loss.
fn shown(tokenizer: &Tokenizer, example: &Example) -> (String, Vec<String>) {
    let mut runs: Vec<Vec<u32>> = vec![Vec::new()];
    for (&id, label) in example.ids().iter().zip(example.labels()) {
        match label {
            -100 => runs.push(Vec::new()),
            label => {
                assert_eq!(label, i64::from(id));
                runs.last_mut().unwrap().push(id);
            }
        }
    }
    let text = |ids: &[u32]| tokenizer.decode(ids, false).unwrap();
    (text(example.ids()), runs.iter().filter(|run| !run.is_empty()).map(|run| text(run)).collect())
}

#[test]
fn every_form_and_what_of_it_carries_loss() {
    let (plain, chat) = (with_template(None), chatml());
    let check = |tokenizer: &Tokenizer, line: Value, text: &str, loss: &[&str]| {
        assert_eq!(
            shown(tokenizer, &one(tokenizer, &line)),
            (text.into(), loss.iter().map(|&run| run.into()).collect()),
            "{line}"
        );
    };
    check(&plain, json!({"prompt": "Define: a\n", "completion": "One."}), "<s>Define: a\nOne.</s>", &["One.</s>"]);
    check(&plain, json!({"prompt": "<s>A", "completion": " b</s>"}), "<s>A b</s>", &[" b</s>"]);
    check(&plain, json!({"prompt": "", "completion": "b"}), "<s>b</s>", &["b</s>"]);
    check(&plain, json!({"text": "To be"}), "<s>To be</s>", &["<s>To be</s>"]);
    check(&plain, json!({"text": "<s>To be</s>", "messages": null}), "<s>To be</s>", &["<s>To be</s>"]);
    check(
        &plain,
        json!({"instruction": "Add.", "input": "1 2", "output": "3"}),
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a \
         response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### \
         Response:\n3</s>",
        &["3</s>"],
    );
    check(
        &plain,
        json!({"instruction": "Sing.", "input": "", "output": "La"}),
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the \
         request.\n\n### Instruction:\nSing.\n\n### Response:\nLa</s>",
        &["La</s>"],
    );
    check(
        &chat,
        json!({"instruction": "Add.", "input": "1 2", "output": "3"}),
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging \
         Face<|im_end|>\n<|im_start|>user\nAdd.\n\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n",
        &["3<|im_end|>"],
    );
    let given = json!({"input_ids": [5, 6, 7], "labels": [-100, 6, -100]});
    assert_eq!(one(&plain, &given), Example::new(vec![5, 6, 7], vec![-100, 6, -100]).unwrap());
    assert!(one(&plain, &json!({"input_ids": [5, 6]})).labels().eq([5, 6]));
}

#[test]
fn a_token_across_the_boundary_carries_loss() {
    let tokenizer = chatml();
    let example = one(&tokenizer, &json!({"prompt": "The capi", "completion": "tal"}));
    assert_eq!(shown(&tokenizer, &example).1, [" capital<|im_end|>"]);
}

#[test]
fn chats_carry_loss_on_all_turns_of_the_assistant() {
    let turns = json!({"messages": [
        {"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"},
        {"role": "user", "content": "d"}, {"role": "assistant", "content": "é"},
    ]});
    let chat = chatml();
    let (text, loss) = shown(&chat, &one(&chat, &turns));
    assert!(text.starts_with("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n"), "{text}");
    assert_eq!(loss, ["b c<|im_end|>", "é<|im_end|>"]);

    // Without end tokens: the turns as they are, and the end of the text.
    let bare = with_template(Some(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    ));
    let (text, loss) = shown(&bare, &one(&bare, &turns));
    assert!(text.ends_with("assistant: é\n</s>"), "{text}");
    assert_eq!(loss, [" b c\n", " é\n</s>"]);

    // The last turn has an empty block of thoughts, which disappears once another turn follows; a
    // prompt opens another block.
    let thinking = with_template(Some(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}\
         {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]<thoughts>{% endif %}",
    ));
    let (text, loss) = shown(&thinking, &one(&thinking, &turns));
    assert_eq!(text, "<s>[system]S</s>[user]a</s>[assistant]b c</s>[user]d</s>[assistant]<think></think>é</s>");
    assert_eq!(loss[0], "b c</s>");
    assert!(loss[1].ends_with("</think>é</s>"), "{loss:?}");
}

#[test]
fn plain_text_is_one_example() {
    let tokenizer = with_template(None);
    let dataset = read(&tokenizer, "book.txt", "{one}\n\ntwo\n", false).unwrap();
    assert_eq!(dataset.examples.len(), 1);
    assert_eq!(shown(&tokenizer, &dataset.examples[0]).0, "<s>{one}\n\ntwo\n</s>");
    assert!(matches!(read(&tokenizer, "book.txt", b"\xFF", false), Err(Error::File { .. })));
}

#[test]
fn bad_lines_are_named_or_counted() {
    let tokenizer = with_template(None);
    let good = json!({"prompt": "a", "completion": "b"}).to_string();
    let cases = [
        ("{", "is not a JSON object: EOF while parsing an object at column 2"),
        ("[1]", "is not a JSON object"),
        ("{\"question\": \"a\", \"answer\": \"b\"}", "has the keys [question, answer]"),
        ("{\"prompt\": 1, \"completion\": \"b\"}", "`prompt`: invalid type"),
        ("{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}", "no chat template"),
        ("{\"input_ids\": [1, 2], \"labels\": [1]}", "has 1 labels, but 2 input_ids"),
        ("{\"input_ids\": [1, 5000]}", "5000 is outside the model's vocabulary of 2050"),
        ("{\"input_ids\": [1, 2], \"labels\": [1, -7]}", "-7 is neither -100"),
        ("{\"input_ids\": [1, 2], \"labels\": [1, 2050]}", "2050 is neither -100"),
        ("{\"input_ids\": [1, 2], \"labels\": []}", "has 0 labels, but 2 input_ids"),
        ("{\"input_ids\": [1, 2], \"labels\": [1, -100]}", "no token carries loss"),
        ("{\"input_ids\": [1]}", "no token carries loss"),
    ];
    for (line, wanted) in cases {
        let text = format!("{good}\n\n{line}\r\n{good}\n");
        match read(&tokenizer, "a.jsonl", &text, false).unwrap_err() {
            Error::File { path, message } => {
                assert!(path.ends_with("a.jsonl"));
                assert!(message.starts_with("line 3: ") && message.contains(wanted), "{message}");
            }
            other => panic!("{other}"),
        }
        let dataset = read(&tokenizer, "a.jsonl", &text, true).unwrap();
        assert_eq!((dataset.examples.len(), dataset.bad_lines), (2, 1), "{line}");
        assert!(dataset.first_bad_line.unwrap().to_string().contains(wanted));
    }
    let invalid = [good.as_bytes(), b"\n{\"text\": \"\xFF\"}"].concat();
    assert!(
        read(&tokenizer, "a.jsonl", invalid, false)
            .unwrap_err()
            .to_string()
            .contains("a.jsonl: line 2: is not a JSON object: ")
    );
    assert!(read(&tokenizer, "a.jsonl", "\n", false).unwrap_err().to_string().contains("has no examples"));
    assert!(read(&tokenizer, "a.jsonl", "{\n", true).unwrap_err().to_string().contains("the first bad line"));

    let broken = with_template(Some("x\n{% if %}"));
    let chat = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
    let error = read(&broken, "a.jsonl", chat.to_string(), false).unwrap_err().to_string();
    assert!(error.contains("line 1: line 2 of the chat template"), "{error}");
    assert_eq!(read(&broken, "a.jsonl", &good, false).unwrap().examples.len(), 1);
}

#[test]
fn a_split_takes_every_example_once_and_depends_on_the_seed_alone() {
    let example = |id: u32| Example::new(vec![id, id], vec![id.into(); 2]).unwrap();
    let whole = Dataset { examples: (0..40).map(example).collect(), ..Dataset::default() };
    let split = |share, seed| {
        let mut kept = whole.clone();
        let taken = kept.split(share, seed).unwrap();
        (kept.examples, taken)
    };
    let (kept, taken) = split(0.25, 1);
    assert_eq!((kept.len(), taken.len()), (30, 10));
    let mut all = [kept, taken.clone()].concat();
    all.sort_by_key(|example| example.ids()[0]);
    assert_eq!(all, whole.examples);
    assert_eq!(split(0.25, 1).1, taken);
    assert_ne!(split(0.25, 2).1, taken);
    // Neither part is ever empty.
    assert_eq!((split(0.001, 1).1.len(), split(0.999, 1).0.len()), (1, 1));
    assert_eq!(
        whole.clone().split(0.0, 1).unwrap_err().to_string(),
        "data split: the share is 0; it must be between 0 and 1"
    );
    let mut one = Dataset { examples: vec![example(1)], ..Dataset::default() };
    assert_eq!(
        one.split(0.5, 1).unwrap_err().to_string(),
        "data split: the number of examples is 1; splitting needs at least two; give a separate file for evaluation \
         instead"
    );
}

/// A llama-like tokenizer, made from the byte-level one: it doesn't cut before merges and puts a
/// mark before the text.
fn whole_text() -> Tokenizer {
    let folder = TempDir::new().unwrap();
    let text = fs::read_to_string(golden("tiny.json")).unwrap();
    let text = serde_json::from_str::<Value>(&text).unwrap().to_string().replace('Ġ', "▁").replace('Ċ', "\\n");
    let mut tiny: Value = serde_json::from_str(&text).unwrap();
    tiny["pre_tokenizer"] = Value::Null;
    tiny["normalizer"] = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]});
    fs::write(folder.path().join("tokenizer.json"), tiny.to_string()).unwrap();
    Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap()
}

#[test]
fn a_long_text_has_the_ids_of_the_whole() {
    let words = ["To", "be", "or", "not", "über", "don't", "12345", "你好", "</s>", "a\u{301}", "e=mc^2;", "The"];
    let blanks = [" ", " ", " ", "  ", "\n", "\r\n", "\n\n    ", "\t", ", ", "."];
    let mut random = 7_u64;
    let mut pick = |from: &[&'static str]| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        from[(random >> 33) as usize % from.len()]
    };
    let mut prose: String = (0..20_000).flat_map(|_| [pick(&words), pick(&blanks)]).collect();
    prose += &"=".repeat(20_000);
    prose += &" ".repeat(20_000);
    let dense: String = (0..40_000).map(|_| pick(&["a", "c", "g", "t"])).collect();
    for tokenizer in [chatml(), with_template(None), whole_text()] {
        for text in [&prose, &dense] {
            // A pair is always encoded as one text.
            let whole = one(&tokenizer, &json!({"prompt": "", "completion": text}));
            let pieces = one(&tokenizer, &json!({"text": text}));
            assert!(whole.ids() == pieces.ids(), "{} and {} tokens", whole.ids().len(), pieces.ids().len());
        }
    }
}

#[test]
fn the_content_decides_how_a_file_is_read() {
    let tokenizer = with_template(None);
    let lines = "{\"prompt\": \"a\", \"completion\": \" b\"}\r\n\r\n{\"prompt\": \"c\", \"completion\": \"d\"}\r\n";
    let wanted = read(&tokenizer, "a.jsonl", lines, false).unwrap().examples;
    assert_eq!(shown(&tokenizer, &wanted[0]), ("<s>a b</s>".into(), vec![" b</s>".into()]));
    let same = [
        (lines.to_owned(), Format::JsonLines),
        (format!("\u{feff}{lines}"), Format::JsonLines),
        (
            "[{\"prompt\": \"a\", \"completion\": \" b\"},\n {\"prompt\": \"c\", \"completion\": \"d\"}]".into(),
            Format::JsonList,
        ),
        (
            "{\n \"prompt\": \"a\",\n \"completion\": \" b\"\n}\n{\"prompt\": \"c\",\n\"completion\": \"d\"}".into(),
            Format::JsonObjects,
        ),
        ("prompt,completion\na, b\nc,\"d\"\n".into(), Format::Table(',')),
        ("completion\tprompt\r\n b\ta\r\nd\tc".into(), Format::Table('\t')),
    ];
    for (text, format) in same {
        for name in ["a.jsonl", "train", "a.txt", "a.csv"] {
            let data = read(&tokenizer, name, &text, false).unwrap();
            assert_eq!((data.format, data.continuous), (format, false), "{name}: {text}");
            assert_eq!(data.examples, wanted, "{name}: {text}");
        }
    }
    let marked = read(&tokenizer, "a.txt", "\u{feff}To be", false).unwrap();
    assert_eq!(shown(&tokenizer, &marked.examples[0]).0, "<s>To be</s>");

    let refused: [(&str, &[u8], &str); 9] = [
        ("a.jsonl", b"\x1f\x8b\x08\0", "compressed with gzip"),
        ("a.txt", b"PAR1\x15\0", "Parquet"),
        ("a.txt", b"a\0b", "binary data"),
        ("a.txt", b"\xff\xfea\0", "UTF-16"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        ("a.csv", b"question,answer\na,b\n", "comma-separated values with the columns [question, answer]"),
        ("a.txt", b"question\tanswer\na\tb\n", "tab-separated values"),
        ("a.json", b"[{\"text\": \"a\"},\n{\"text\": }]", "begins as a JSON list, but is malformed"),
        ("a.txt", b"", "is empty"),
    ];
    for (name, bytes, wanted) in refused {
        let error = read(&tokenizer, name, bytes, false).unwrap_err().to_string();
        assert!(error.contains(wanted), "{name}: {error}");
    }
    let error = read(&tokenizer, "a.json", "[{\"text\": \"a\"},\n\n{\"no\": 1}]", false).unwrap_err().to_string();
    assert!(error.contains("element 2, line 3: has the keys [no]"), "{error}");
    let error = read(&tokenizer, "a.csv", "text,id\na,1\n\nb\n", false).unwrap_err().to_string();
    assert!(error.contains("line 4: has 1 fields, but there are 2 columns"), "{error}");
}

#[cfg(unix)]
#[test]
fn a_pipe_is_read_once_and_a_device_never() {
    let tokenizer = with_template(None);
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    std::thread::scope(|scope| {
        scope.spawn(|| fs::write(&path, "{\"text\": \"To be\"}\n").unwrap());
        let data = Dataset::read(&path, Ok(&tokenizer), &DataOptions::default()).unwrap();
        assert_eq!((data.examples.len(), data.format), (1, Format::JsonLines));
    });
    let error = Dataset::read("/dev/zero", Ok(&tokenizer), &DataOptions::default()).unwrap_err().to_string();
    assert!(error.contains("is a device"), "{error}");
}

#[test]
fn masks_of_token_ids_count() {
    let tokenizer = with_template(None);
    let labels = |line: Value| one(&tokenizer, &line).labels().collect::<Vec<_>>();
    let ids = json!([5, 6, 7, 8]);
    assert_eq!(labels(json!({"input_ids": ids, "assistant_masks": [0, 1, 0, 1]})), [-100, 6, -100, 8]);
    assert_eq!(labels(json!({"input_ids": ids, "completion_mask": [0, 0, 1, 1]})), [-100, -100, 7, 8]);
    let both = json!({"input_ids": ids, "labels": [5, 6, 7, -100], "completion_mask": [0, 1, 1, 1]});
    assert_eq!(labels(both), [-100, 6, 7, -100]);
    let padded = json!({"input_ids": [0, 5, 6, 0], "attention_mask": [0, 1, 1, 0], "token_type_ids": [0, 0, 0, 0]});
    assert_eq!(one(&tokenizer, &padded), Example::new(vec![5, 6], vec![5, 6]).unwrap());
    for (line, wanted) in [
        (json!({"input_ids": ids, "attention_mask": [1, 0, 1, 1]}), "between two 1"),
        (json!({"input_ids": ids, "completion_mask": [1, 1]}), "has 2 completion_mask, but 4 input_ids"),
        (json!({"input_ids": ids, "completion_mask": [1, 1, 1, 2]}), "2 is neither 0 nor 1"),
        (json!({"input_ids": ids, "token_type_ids": [0, 0, 1, 1]}), "only 0 is supported"),
        (json!({"input_ids": ids, "position_ids": [0, 1, 2, 3]}), "the key `position_ids`"),
        (json!({"input_ids": ids, "completion_mask": [0, 0, 0, 0]}), "no token carries loss"),
        (json!({"input_ids": ids, "attention_mask": [0, 0, 0, 0]}), "no token carries loss"),
    ] {
        let error = read(&tokenizer, "a.jsonl", line.to_string(), false).unwrap_err().to_string();
        assert!(error.contains(wanted), "{line}: {error}");
    }
}

#[test]
fn ids_are_bounded_by_the_model_and_not_by_the_tokenizer() {
    let tokenizer = with_template(None);
    let none = Error::invalid("a test", "tokenizer", "none", "one");
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.jsonl");
    fs::write(&path, "{\"input_ids\": [1, 2]}\n{\"input_ids\": [1, 2060]}\n").unwrap();
    for tokenizer in [Ok(&tokenizer), Err(&none)] {
        // More rows than tokens, like padded embeddings.
        let read =
            |rows| Dataset::read(&path, tokenizer, &DataOptions { vocabulary: Some(rows), ..DataOptions::default() });
        assert_eq!(read(2061).unwrap().examples.len(), 2);
        let error = read(2060).unwrap_err().to_string();
        assert!(error.contains("line 2: token 2060 is outside the model's vocabulary of 2060"), "{error}");
    }
    // Fewer rows than tokens.
    fs::write(&path, "{\"text\": \"a\"}\n").unwrap();
    let options = DataOptions { vocabulary: Some(2048), ..DataOptions::default() };
    let error = Dataset::read(&path, Ok(&tokenizer), &options).unwrap_err().to_string();
    assert!(error.contains("line 1: token 2048 is outside the model's vocabulary of 2048"), "{error}");
}

/// A template that shows whatever it is given.
const SHOWS_ALL: &str = "{% if tools %}{{ tools | tojson }}{% endif %}{% if documents %}{{ documents | tojson }}{% endif %}\
    {% if mood %}({{ mood }}){% endif %}{% for m in messages %}[{{ m.role }}]{{ m.thought }}{{ m.content }}</s>{% endfor %}\
    {% if add_generation_prompt %}[assistant]{% endif %}";
const SHOWS_LITTLE: &str = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}\
    {% if add_generation_prompt %}[assistant]{% endif %}";

#[test]
fn every_key_is_used_or_named() {
    let (all, little, plain) = (with_template(Some(SHOWS_ALL)), with_template(Some(SHOWS_LITTLE)), with_template(None));
    let chat = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    let error = |tokenizer: &Tokenizer, line: Value| {
        read(tokenizer, "a.jsonl", line.to_string(), false).map(|_| ()).unwrap_err().to_string()
    };
    for line in [
        json!({"messages": chat, "tools": [{"name": "f"}]}),
        json!({"messages": chat, "tools": "[{\"name\": \"f\"}]"}),
        json!({"messages": chat, "documents": [{"name": "f"}]}),
        json!({"messages": chat, "chat_template_kwargs": {"mood": "f"}}),
        json!({"messages": [chat[0], {"role": "assistant", "content": "b", "thought": "f"}]}),
    ] {
        assert!(read(&all, "a.jsonl", line.to_string(), false).is_ok(), "{line}");
        let error = error(&little, line);
        assert!(error.contains("would be lost: the model's chat template doesn't use it"), "{error}");
    }
    for (line, wanted) in [
        (json!({"messages": chat, "score": 1}), "the key `score`"),
        (json!({"messages": chat, "tools": {}, "functions": [1]}), "the key `functions`"),
        (json!({"messages": chat, "tools": "{"}), "`tools`: "),
        (json!({"messages": chat, "tools": 1}), "`tools` is not a list"),
        (json!({"messages": chat, "prompt": "other"}), "the key `prompt`"),
        (json!({"messages": chat, "input_ids": [1, 2]}), "the key `messages`"),
        (json!({"messages": [{"role": "system", "content": "s"}], "system": "t"}), "`system` and a system message"),
        (json!({"prompt": "a", "completion": "b", "system": "s"}), "the key `system`"),
        (json!({"prompt": "a", "completion": "b", "reward": 1}), "the key `reward`"),
        (json!({"text": "a", "label": 1}), "the key `label`"),
        (json!({"messages": [{"role": "user", "content": "a", "name": "x"}]}), "`name` of message 1 would be lost"),
    ] {
        let error = error(&all, line.clone());
        assert!(error.contains(wanted), "{line}: {error}");
    }
    for key in ["system", "history"] {
        let error = error(&plain, json!({"instruction": "a", "output": "b", key: [["c", "d"]]}));
        assert!(error.contains(&format!("`{key}`")), "{error}");
    }

    // Nothing is lost if a value is empty, repeated elsewhere, or only names the source of an
    // example.
    let same = [
        json!({"messages": chat}),
        json!({"messages": chat, "tools": [], "system": null, "x": "", "prompt": "a", "text": "[user]a[assistant]b"}),
        json!({"messages": chat, "id": 7, "source": "web"}),
        json!({"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}], "id": "8"}),
    ];
    let text: String = same.iter().map(|line| format!("{line}\n")).collect();
    let data = read(&little, "a.jsonl", text, false).unwrap();
    assert_eq!(data.examples.len(), same.len());
    assert!(data.examples.iter().all(|example| *example == data.examples[0]));
    assert_eq!(data.passed_over, [("id", 2), ("source", 1)]);
}

#[test]
fn what_stands_beside_messages_and_instructions_is_used() {
    let tokenizer = with_template(Some(SHOWS_LITTLE));
    let check = |line: Value, text: &str, loss: &[&str]| {
        let (found, runs) = shown(&tokenizer, &one(&tokenizer, &line));
        assert_eq!(
            (found.as_str(), runs.iter().map(String::as_str).collect::<Vec<_>>()),
            (text, loss.to_vec()),
            "{line}"
        );
    };
    let chat = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    check(json!({"messages": chat, "system": "S"}), "[system]S</s>[user]a</s>[assistant]b</s>", &["b</s>"]);
    check(
        json!({"instruction": "c", "input": "d", "output": "e", "system": "S", "history": [["a", "b"]]}),
        "[system]S</s>[user]a</s>[assistant]b</s>[user]c\n\nd</s>[assistant]e</s>",
        &["b</s>", "e</s>"],
    );
    check(
        json!({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}),
        "[user]a</s>[assistant]b</s>",
        &["b</s>"],
    );
}
