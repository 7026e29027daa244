//! Training text: files of examples to token ids and labels.
//!
//! A `.jsonl` file has an object a line, in any of these forms; lines may differ, and empty ones are passed over.
//!
//! | keys | becomes | loss on |
//! |---|---|---|
//! | `prompt`, `completion` | the prompt and right after it the completion | the completion |
//! | `messages`: a list of `role`, `content` | the model's chat template | the assistant's turns |
//! | `instruction`, `output`, perhaps `input` | two messages; without a chat template, the prompt of Stanford Alpaca | the output |
//! | `text` | itself | everything |
//! | `input_ids`, perhaps `labels` | themselves | the labels that are not -100 |
//!
//! A turn of the assistant ends with its end-of-turn token, and any other text with the tokenizer's end token, which is
//! added where it is not written: these carry loss, or a model would not learn to stop. A file with another extension is
//! one text.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use rayon::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::chat_mask;
pub use super::example::Example;
use crate::error::{Error, Result};
use crate::nn::IGNORE_LABEL;
use crate::seed::shuffled;
use crate::text::{ChatTemplate, Conversation, Message, Tokenizer};

/// How to read examples.
#[derive(Clone, Copy, Debug, Default)]
pub struct DataOptions {
    /// Leave out lines that are malformed, and count them, instead of failing at the first.
    pub skip_bad_lines: bool,
}

/// The examples of a file, in its order.
#[derive(Clone, Debug, Default)]
pub struct Dataset {
    /// At least one.
    pub examples: Vec<Example>,
    /// Whether the one example is a text without lines: of any length, to be cut into pieces.
    pub continuous: bool,
    /// Lines left out.
    pub bad_lines: usize,
    /// What was wrong with the first of them.
    pub first_bad_line: Option<Error>,
}

impl Dataset {
    /// Reads the file at `path` and tokenizes it on all cores. Only `input_ids` can do without a tokenizer: text
    /// is then an error that says why there is none.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, and [`Error::File`], with the number of the line, for a line that is malformed,
    /// of no known form, refused by the chat template, or without any token that carries loss, and for a file without
    /// examples.
    pub fn read(path: impl AsRef<Path>, tokenizer: Result<&Tokenizer, &Error>, options: &DataOptions) -> Result<Self> {
        Dataset::read_with(path, tokenizer, options, |_| ())
    }

    /// As [`Dataset::read`]; `progress` is called after every line, with how many there are.
    ///
    /// # Errors
    /// The same.
    pub fn read_with(
        path: impl AsRef<Path>,
        tokenizer: Result<&Tokenizer, &Error>,
        options: &DataOptions,
        progress: impl Fn(usize) + Sync,
    ) -> Result<Self> {
        let path = path.as_ref();
        let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
        let file_error = |message: String| Error::File { path: path.into(), message };
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        if !["jsonl", "json", "ndjson"].contains(&extension.as_str()) {
            let text = str::from_utf8(&bytes).map_err(|e| file_error(format!("is not UTF-8: {e}")))?;
            let reader = tokenizer.map(|tokenizer| Reader { tokenizer, chat: None }).map_err(needs_tokenizer);
            let example = reader.and_then(|reader| reader.text(text)).map_err(file_error)?;
            return Ok(Dataset { examples: vec![example], continuous: true, ..Dataset::default() });
        }

        let chat = |tokenizer: &Tokenizer| tokenizer.chat_template().map(ChatTemplate::new);
        let reader = tokenizer.map(|tokenizer| Reader { tokenizer, chat: chat(tokenizer) }).map_err(needs_tokenizer);
        let lines: Vec<(usize, &[u8])> = (1..).zip(bytes.split(|&byte| byte == b'\n')).collect();
        let count = lines.len();
        let read: Vec<_> = lines
            .into_par_iter()
            .inspect(|_| progress(count))
            .filter(|(_, line)| !line.trim_ascii().is_empty())
            .map(|(number, line)| {
                let object = || serde_json::from_slice(line).map_err(|e| format!("is no JSON object: {e}"));
                let example = object().and_then(|object| example(object, reader.as_ref()));
                example.map_err(|message| file_error(format!("line {number}: {message}")))
            })
            .collect();

        let mut dataset = Dataset::default();
        for example in read {
            match example {
                Ok(example) => dataset.examples.push(example),
                Err(error) if options.skip_bad_lines => {
                    dataset.bad_lines += 1;
                    dataset.first_bad_line.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        if dataset.examples.is_empty() {
            let first =
                dataset.first_bad_line.map(|error| format!("; the first bad line: {error}")).unwrap_or_default();
            return Err(file_error(format!("has no examples{first}")));
        }
        Ok(dataset)
    }
}

impl Dataset {
    /// Takes this share of the examples out, at least one and not all, which ones the seed decides.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is only one example, or the share is not between 0 and 1.
    pub fn split(&mut self, share: f64, seed: u64) -> Result<Vec<Example>> {
        let count = self.examples.len();
        let invalid = |what, got: String, expected: &str| Error::Invalid {
            op: "data split",
            what,
            got,
            expected: expected.into(),
        };
        if !(share > 0.0 && share < 1.0) {
            return Err(invalid("the share", share.to_string(), "it must be between 0 and 1"));
        }
        if count < 2 {
            let expected = "a part to train on and a part to evaluate on take two; name a file to evaluate on instead";
            return Err(invalid("the number of examples", count.to_string(), expected));
        }
        let taken = ((share * count as f64).round() as usize).clamp(1, count - 1);
        let out: BTreeSet<usize> = shuffled(seed, count).into_iter().take(taken).collect();
        let (mut kept, mut split) = (Vec::new(), Vec::new());
        for (index, example) in std::mem::take(&mut self.examples).into_iter().enumerate() {
            if out.contains(&index) { split.push(example) } else { kept.push(example) }
        }
        self.examples = kept;
        Ok(split)
    }
}

/// What lines are read with. Its errors say what is wrong with a line.
struct Reader<'a> {
    tokenizer: &'a Tokenizer,
    chat: Option<Result<ChatTemplate>>,
}

type LineResult<T> = Result<T, String>;

fn needs_tokenizer(error: &Error) -> String {
    format!("text needs the model's tokenizer: {error}")
}

/// The example of a line; without a reader, the reason.
fn example(object: Map<String, Value>, reader: Result<&Reader<'_>, &String>) -> LineResult<Example> {
    let has = |key: &str| object.get(key).is_some_and(|value| !value.is_null());
    let example = if has("input_ids") {
        let labels = has("labels").then(|| field(&object, "labels")).transpose()?;
        let size = reader.ok().map(|reader| reader.tokenizer.vocab_size());
        from_ids(field(&object, "input_ids")?, labels, size)?
    } else {
        reader.map_err(String::clone)?.example(&object)?
    };
    if example.labels.iter().skip(1).all(|&label| label == IGNORE_LABEL) {
        return Err("no token carries loss".into());
    }
    Ok(example)
}

/// Ids as they are; checked against a vocabulary of `size` if it is known.
fn from_ids(ids: Vec<u32>, labels: Option<Vec<i64>>, size: Option<usize>) -> LineResult<Example> {
    let labels = labels.unwrap_or_else(|| ids.iter().copied().map(i64::from).collect());
    if labels.len() != ids.len() {
        return Err(format!("has {} labels for {} input_ids", labels.len(), ids.len()));
    }
    let Some(size) = size else { return Ok(Example { ids, labels }) };
    if let Some(id) = ids.iter().find(|&&id| id as usize >= size) {
        return Err(format!("`input_ids`: {id} is outside the vocabulary of {size}"));
    }
    let known = |label: i64| label == IGNORE_LABEL || (0..size as i64).contains(&label);
    if let Some(label) = labels.iter().find(|&&label| !known(label)) {
        return Err(format!("`labels`: {label} is neither {IGNORE_LABEL} nor in the vocabulary of {size}"));
    }
    Ok(Example { ids, labels })
}

impl Reader<'_> {
    fn example(&self, object: &Map<String, Value>) -> LineResult<Example> {
        let has = |key: &str| object.get(key).is_some_and(|value| !value.is_null());
        let text = |key: &str| field::<String>(object, key);
        if has("messages") {
            self.chat(&Message::list(&object["messages"])?.into())
        } else if has("prompt") && has("completion") {
            self.pair(&text("prompt")?, &text("completion")?)
        } else if has("instruction") && has("output") {
            let input = has("input").then(|| text("input")).transpose()?.unwrap_or_default();
            self.instruction(&text("instruction")?, &input, &text("output")?)
        } else if has("text") {
            self.text(&text("text")?)
        } else {
            let keys: Vec<_> = object.keys().map(String::as_str).collect();
            let known = "prompt and completion, messages, instruction and output, text, or input_ids";
            Err(format!("has the keys [{}]; known are {known}", keys.join(", ")))
        }
    }

    fn chat(&self, chat: &Conversation) -> LineResult<Example> {
        let template = self.chat.as_ref().ok_or("has messages, but the model has no chat template")?;
        chat_mask::tokenize(self.tokenizer, template.as_ref().map_err(Error::to_string)?, chat)
    }

    fn text(&self, text: &str) -> LineResult<Example> {
        let mut example = Example::default();
        for id in self.tokenizer.encode(text, true).map_err(|e| e.to_string())? {
            example.push(id, true);
        }
        example.end(self.tokenizer);
        Ok(example)
    }

    fn pair(&self, prompt: &str, completion: &str) -> LineResult<Example> {
        let tokens = self.tokenizer.encode_spans(&format!("{prompt}{completion}")).map_err(|e| e.to_string())?;
        let mut example = Example::default();
        if let Some(bos) = self.tokenizer.begin(tokens.first().map(|&(first, _)| first)) {
            example.push(bos, false);
        }
        // A token that joins the end of the prompt and the start of the completion counts: else nothing teaches it.
        for (id, span) in tokens {
            example.push(id, span.end > prompt.len());
        }
        example.end(self.tokenizer);
        Ok(example)
    }

    fn instruction(&self, instruction: &str, input: &str, output: &str) -> LineResult<Example> {
        if self.chat.is_some() {
            let separator = if input.is_empty() { "" } else { "\n\n" };
            let user = Message::new("user", format!("{instruction}{separator}{input}"));
            return self.chat(&vec![user, Message::new("assistant", output)].into());
        }
        let (paired, input) = match input {
            "" => ("", String::new()),
            input => (", paired with an input that provides further context", format!("### Input:\n{input}\n\n")),
        };
        let prompt = format!(
            "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the \
             request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
        );
        self.pair(&prompt, output)
    }
}

fn field<T: DeserializeOwned>(object: &Map<String, Value>, key: &str) -> LineResult<T> {
    let value = object.get(key).ok_or_else(|| format!("`{key}` is missing"))?;
    T::deserialize(value).map_err(|e| format!("`{key}`: {e}"))
}
