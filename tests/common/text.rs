//! Exercises tokenizers and training data with text.

use std::fs;
use std::sync::LazyLock;

use qlora_wgpu::internal::gguf::GgufFile;
use qlora_wgpu::text::Tokenizer;
use qlora_wgpu::train::batches::{BatchOptions, Batches};
use qlora_wgpu::train::data::{DataOptions, Dataset};
use qlora_wgpu::{Error, Result};

use super::{file, vocabulary};

/// One line for each kind that has text.
const LINES: &str = r#"
{"messages": [{"role": "system", "content": "You"}, {"role": "user", "content": " Hello  1\n"}, {"role": "assistant", "content": "wörlds</s>", "calls": [{"a": [1, null]}]}, {"role": "user", "content": "He"}, {"role": "assistant", "content": "llo"}]}
{"instruction": "Hello", "input": "He", "output": "llo"}
{"prompt": "Hel", "completion": "lo"}
{"text": "Hello"}
"#;

/// Reads `bytes` as a GGUF file with a tokenizer or, if they aren't one, as lines that describe
/// one: text to ids and back, chats through its template, training data.
///
/// # Errors
/// Errors of the file or the tokenizer.
///
/// # Panics
/// If the tokenizer does not know its own ids.
pub fn tokenizer(bytes: &[u8]) -> Result<()> {
    let made_up = (!bytes.starts_with(b"GGUF")).then(|| vocabulary::file(bytes));
    let (_folder, path) = file("x.gguf", made_up.as_deref().unwrap_or(bytes));
    let file = GgufFile::open(path)?;
    let tokenizer = Tokenizer::from_gguf(&file)?;

    let tokens: Vec<&str> = file.get("tokenizer.ggml.tokens")?.unwrap_or_default();
    let own = tokens.into_iter().take(64).collect::<String>();
    for text in ["", "Hello, 123 wörlds\n</s>", "  two  spaces\t'll I've 12345!? 你好 \0e\u{301}", &own] {
        for special in [true, false] {
            let Ok(ids) = tokenizer.encode(text, special) else { continue };
            assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
            tokenizer.decode(&ids, special).expect("ids of its own");
            let mut stream = tokenizer.decode_stream(special);
            ids.iter().for_each(|&id| drop(stream.push(id).expect("an id of its own")));
            stream.finish().expect("ids of its own");
        }
    }
    train_on(LINES.as_bytes(), "jsonl", Ok(&tokenizer));
    Ok(())
}

/// Reads `bytes` as training data: as lines and as one text, with a chat template, without one,
/// without a tokenizer.
///
/// # Errors
/// The error of the first bad line, with the template.
///
/// # Panics
/// If examples or batches differ from what was requested.
pub fn jsonl(bytes: &[u8]) -> Result<()> {
    static TOKENIZERS: LazyLock<[Tokenizer; 2]> = LazyLock::new(|| {
        let (folder, _) = file("tokenizer.json", include_bytes!("../../cli/assets/tiny-glossary/tokenizer.json"));
        let read = || Tokenizer::from_dir(folder.path()).expect("a tokenizer");
        let plain = read();
        let template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}\
                        {% if add_generation_prompt %}<|assistant|>{% endif %}";
        fs::write(folder.path().join("chat_template.jinja"), template).expect("a file in it");
        [plain, read()]
    });
    let [plain, chat] = &*TOKENIZERS;
    let none = Error::invalid("a test", "tokenizer", "none", "one");
    train_on(bytes, "txt", Ok(plain));
    for tokenizer in [Ok(plain), Ok(chat), Err(&none)] {
        train_on(bytes, "jsonl", tokenizer);
    }
    let (_folder, path) = file("x.jsonl", bytes);
    Dataset::read(path, Ok(chat), &DataOptions::default()).map(drop)
}

/// Reads training data and arranges it like `finetune`.
fn train_on(bytes: &[u8], extension: &str, tokenizer: Result<&Tokenizer, &Error>) {
    let (_folder, path) = file(&format!("x.{extension}"), bytes);
    let Ok(mut data) = Dataset::read(path, tokenizer, &DataOptions { skip_bad_lines: true, ..DataOptions::default() })
    else {
        return;
    };
    for example in &data.examples {
        assert_eq!(example.ids().len(), example.labels().count());
        assert_eq!(example.pieces(3).map(|(ids, _)| ids.len()).sum::<usize>(), example.ids().len());
        assert!(tokenizer.is_err() || example.ids().iter().all(|&id| (id as usize) < tokenizer.unwrap().vocab_size()));
    }
    let count = data.examples.len();
    if let Ok(eval) = data.split(0.3, 7) {
        assert!(!eval.is_empty() && !data.examples.is_empty() && eval.len() + data.examples.len() == count);
    }
    for (seq_len, packing) in [(2, false), (24, true)] {
        let options = BatchOptions { batch_size: 2, grad_accum: 2, seq_len, packing, ..BatchOptions::default() };
        let Ok(mut batches) = Batches::new(data.clone(), options) else { continue };
        let epoch =
            (0..batches.steps_per_epoch()).flat_map(|step| batches.step(step).expect("a step of the first epoch"));
        let tokens: usize = epoch.map(|batch| batch.token_count()).sum();
        assert_eq!(tokens, batches.tokens(), "an epoch has every token once");
    }
}
