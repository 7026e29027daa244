//! Files of training examples: token ids, and which of them carry loss.

use std::fs;
use std::path::{Path, PathBuf};

use qlora_wgpu::formats::gguf::GgufFile;
use qlora_wgpu::text::Tokenizer;
use qlora_wgpu::train::data::{DataOptions, Dataset, Example};
use qlora_wgpu::{Error, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer").join(name)
}

/// SmolLM2's: ChatML, `<|im_end|>` (2) ends a turn.
fn chatml() -> Tokenizer {
    Tokenizer::from_gguf(&GgufFile::open(golden("smollm2.gguf")).unwrap()).unwrap()
}

/// A tokenizer with this chat template, `<s>` (2048) before every text, and `</s>` (2049) at its end.
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
    Dataset::read(&path, Ok(tokenizer), &DataOptions { skip_bad_lines })
}

fn one(tokenizer: &Tokenizer, line: &Value) -> Example {
    let dataset = read(tokenizer, "a.jsonl", line.to_string(), false).unwrap();
    assert_eq!(dataset.examples.len(), 1);
    dataset.examples.into_iter().next().unwrap()
}

/// The whole text of an example, and the runs of it that carry loss.
fn shown(tokenizer: &Tokenizer, example: &Example) -> (String, Vec<String>) {
    assert_eq!(example.ids.len(), example.labels.len());
    let mut runs: Vec<Vec<u32>> = vec![Vec::new()];
    for (&id, &label) in example.ids.iter().zip(&example.labels) {
        match label {
            -100 => runs.push(Vec::new()),
            label => {
                assert_eq!(label, i64::from(id));
                runs.last_mut().unwrap().push(id);
            }
        }
    }
    let text = |ids: &[u32]| tokenizer.decode(ids, false).unwrap();
    (text(&example.ids), runs.iter().filter(|run| !run.is_empty()).map(|run| text(run)).collect())
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
    assert_eq!(one(&plain, &given), Example { ids: vec![5, 6, 7], labels: vec![-100, 6, -100] });
    assert_eq!(one(&plain, &json!({"input_ids": [5, 6]})).labels, [5, 6]);
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

    // No end tokens: the turns as they are, and the text's end.
    let bare = with_template(Some(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    ));
    let (text, loss) = shown(&bare, &one(&bare, &turns));
    assert!(text.ends_with("assistant: é\n</s>"), "{text}");
    assert_eq!(loss, [" b c\n", " é\n</s>"]);

    // The last turn has an empty block of thoughts, which is gone once another follows; a prompt opens another one.
    let thinking = with_template(Some(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}\
         {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]<thoughts>{% endif %}",
    ));
    let (text, loss) = shown(&thinking, &one(&thinking, &turns));
    assert_eq!(text, "<s>[system]S</s>[user]a</s>[assistant]b c</s>[user]d</s>[assistant]<think></think>é</s>");
    assert_eq!(loss[0], "b c</s>");
    assert!(loss[1].ends_with("</think>é</s>"), "{loss:?}");

    // What comes before a turn must not depend on what follows.
    let counting = with_template(Some("{{ messages | length }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"));
    let error = read(&counting, "a.jsonl", turns.to_string(), false).unwrap_err().to_string();
    assert!(error.contains("line 1: the chat template renders message 3 otherwise"), "{error}");
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
        ("{", "is no JSON object"),
        ("[1]", "is no JSON object"),
        ("{\"question\": \"a\", \"answer\": \"b\"}", "has the keys [question, answer]"),
        ("{\"prompt\": 1, \"completion\": \"b\"}", "`prompt`: invalid type"),
        ("{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}", "no chat template"),
        ("{\"input_ids\": [1, 2], \"labels\": [1]}", "1 labels for 2 input_ids"),
        ("{\"input_ids\": [1, 5000]}", "5000 is outside the vocabulary of 2050"),
        ("{\"input_ids\": [1, 2], \"labels\": [1, -7]}", "-7 is neither -100"),
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
    assert!(read(&tokenizer, "a.jsonl", invalid, false).unwrap_err().to_string().contains("line 2: "));
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
    let example = |id: u32| Example { ids: vec![id, id], labels: vec![id.into(); 2] };
    let whole = Dataset { examples: (0..40).map(example).collect(), ..Dataset::default() };
    let split = |share, seed| {
        let mut kept = whole.clone();
        let taken = kept.split(share, seed).unwrap();
        (kept.examples, taken)
    };
    let (kept, taken) = split(0.25, 1);
    assert_eq!((kept.len(), taken.len()), (30, 10));
    let mut all = [kept, taken.clone()].concat();
    all.sort_by_key(|example| example.ids[0]);
    assert_eq!(all, whole.examples);
    assert_eq!(split(0.25, 1).1, taken);
    assert_ne!(split(0.25, 2).1, taken);
    // Never none, never all.
    assert_eq!((split(0.001, 1).1.len(), split(0.999, 1).0.len()), (1, 1));
    assert!(whole.clone().split(0.0, 1).is_err());
    let mut one = Dataset { examples: vec![example(1)], ..Dataset::default() };
    assert!(one.split(0.5, 1).unwrap_err().to_string().contains("two"));
}
