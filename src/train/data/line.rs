//! Converts objects to tokens: the forms of examples, and their keys.

use std::collections::{BTreeSet, HashSet};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use regex::Regex;
use serde_json::{Map, Value};

use super::ids;
use super::object::{LineResult, field};
use crate::error::{Error, Result};
use crate::text::{ChatTemplate, Conversation, Message, Tokenizer};
use crate::train::chat_mask;
use crate::train::example::Example;

/// Keys that only describe where an example comes from. They are ignored and counted.
const MEANINGLESS: [&str; 22] = [
    "id",
    "_id",
    "idx",
    "index",
    "__index_level_0__",
    "uid",
    "uuid",
    "prompt_id",
    "conversation_id",
    "tool_call_id",
    "source",
    "dataset",
    "meta",
    "metadata",
    "url",
    "license",
    "author",
    "category",
    "language",
    "split",
    "date",
    "timestamp",
];

/// Forms of examples, in the order in which they are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Ids,
    Messages,
    Conversations,
    Pair,
    Instruction,
    Text,
}

impl Form {
    const ALL: [Form; 6] = [Form::Ids, Form::Messages, Form::Conversations, Form::Pair, Form::Instruction, Form::Text];

    /// Keys that an object of this form must have.
    fn required(self) -> &'static [&'static str] {
        match self {
            Form::Ids => &["input_ids"],
            Form::Messages => &["messages"],
            Form::Conversations => &["conversations"],
            Form::Pair => &["prompt", "completion"],
            Form::Instruction => &["instruction", "output"],
            Form::Text => &["text"],
        }
    }

    /// Other keys that it may have.
    fn optional(self, is_chat: bool) -> &'static [&'static str] {
        match self {
            Form::Ids => &ids::KEYS,
            Form::Messages | Form::Conversations => &["system", "tools", "documents", "chat_template_kwargs"],
            Form::Pair if is_chat => &["tools", "documents", "chat_template_kwargs"],
            Form::Instruction => &["input", "system", "history"],
            Form::Pair | Form::Text => &[],
        }
    }

    fn of(has: impl Fn(&str) -> bool) -> Option<Form> {
        Form::ALL.into_iter().find(|form| form.required().iter().all(|key| has(key)))
    }
}

/// Checks whether objects with these keys are examples.
///
/// # Errors
/// The forms that are known.
pub(super) fn check_columns(columns: &[String]) -> LineResult<()> {
    let form = Form::of(|key| columns.iter().any(|column| column == key));
    form.map(drop).ok_or_else(|| format!("known are {FORMS}"))
}

const FORMS: &str = "prompt and completion, messages, conversations, instruction and output, text, or input_ids";

/// Reads lines. Its errors say what is wrong with a line.
pub(super) struct Reader<'a> {
    /// The tokenizer, or why there is none.
    tokenizer: Result<&'a Tokenizer, String>,
    chat: Option<Result<ChatTemplate>>,
    /// Words in the template's source; every name that it uses is among them.
    words: HashSet<&'a str>,
    /// Rows of the model's embedding.
    vocabulary: Option<usize>,
    /// Number of lines with each of the ignored keys.
    passed_over: [AtomicUsize; MEANINGLESS.len()],
}

impl<'a> Reader<'a> {
    pub(super) fn new(tokenizer: Result<&'a Tokenizer, &Error>, vocabulary: Option<usize>) -> Self {
        static WORD: LazyLock<Regex> =
            LazyLock::new(|| Regex::new(r"\w+").unwrap_or_else(|error| unreachable!("{error}")));
        let source = tokenizer.ok().and_then(Tokenizer::chat_template);
        Reader {
            tokenizer: tokenizer.map_err(|error| format!("text requires the model's tokenizer: {error}")),
            chat: source.map(ChatTemplate::new),
            words: source.iter().flat_map(|source| WORD.find_iter(source)).map(|word| word.as_str()).collect(),
            vocabulary: vocabulary.or_else(|| tokenizer.ok().map(Tokenizer::vocab_size)),
            passed_over: [const { AtomicUsize::new(0) }; MEANINGLESS.len()],
        }
    }

    /// The keys that were ignored, and how often.
    pub(super) fn passed_over(&self) -> Vec<(&'static str, usize)> {
        let counts = self.passed_over.iter().map(|count| count.load(Ordering::Relaxed));
        MEANINGLESS.into_iter().zip(counts).filter(|&(_, count)| count > 0).collect()
    }

    /// Reads the example in an object.
    pub(super) fn example(&self, object: &Map<String, Value>) -> LineResult<Example> {
        let example = self.tokens(object)?;
        self.check(&example)?;
        if example.label_tokens() == 0 {
            return Err("no token carries loss".into());
        }
        Ok(example)
    }

    /// Reads a file that is a single text.
    pub(super) fn whole(&self, text: &str) -> LineResult<Example> {
        let example = self.text(text)?;
        self.check(&example)?;
        Ok(example)
    }

    fn check(&self, example: &Example) -> LineResult<()> {
        self.vocabulary.map_or(Ok(()), |rows| ids::check(example, rows))
    }

    fn tokenizer(&self) -> LineResult<&'a Tokenizer> {
        self.tokenizer.clone()
    }

    fn tokens(&self, object: &Map<String, Value>) -> LineResult<Example> {
        let Some(form) = Form::of(|key| object.get(key).is_some_and(|value| !value.is_null())) else {
            let keys: Vec<_> = object.keys().map(String::as_str).collect();
            return Err(format!("has the keys [{}]; supported are {FORMS}", keys.join(", ")));
        };
        let is_chat = object.get("prompt").is_some_and(Value::is_array);
        self.check_keys(object, form, is_chat)?;
        let text = |key: &str| field::<String>(object, key);
        match form {
            Form::Ids => ids::example(object),
            Form::Messages => self.conversation(object, self.messages(object, "messages")?),
            Form::Conversations => self.conversation(object, self.messages(object, "conversations")?),
            Form::Pair if is_chat => {
                // Nothing is learned from a prompt, including answers in it.
                let mut prompt = self.given_messages(object, "prompt")?;
                for message in prompt.iter_mut().filter_map(Value::as_object_mut) {
                    message.insert("weight".into(), 0.into());
                }
                let all = [prompt, self.given_messages(object, "completion")?].concat();
                self.conversation(object, Message::list(&Value::Array(all))?)
            }
            Form::Pair => self.pair(&text("prompt")?, &text("completion")?),
            Form::Instruction => self.instruction(object),
            Form::Text => self.text(&text("text")?),
        }
    }

    /// Checks that every key of an object is used, or is known to be ignorable.
    fn check_keys(&self, object: &Map<String, Value>, form: Form, is_chat: bool) -> LineResult<()> {
        let used = || form.required().iter().chain(form.optional(is_chat));
        for (key, value) in object {
            if is_blank(value) || used().any(|known| known == key) || self.is_meaningless(key) {
                continue;
            }
            let texts = || form.required().iter().chain(&["input"]).filter_map(|key| object.get(*key));
            if !value.as_str().is_some_and(|text| repeats(key, text, texts())) {
                let form = form.required().join("` and `");
                return Err(format!(
                    "the key `{key}` isn't used together with `{form}` and would be lost; remove it, or rename it to a known key"
                ));
            }
        }
        Ok(())
    }

    /// Whether a key can be ignored; if so, counts it.
    fn is_meaningless(&self, key: &str) -> bool {
        let at = MEANINGLESS.iter().position(|known| *known == key);
        at.map(|at| self.passed_over[at].fetch_add(1, Ordering::Relaxed)).is_some()
    }

    fn text(&self, text: &str) -> LineResult<Example> {
        let tokenizer = self.tokenizer()?;
        let mut example = Example::all(tokenizer.encode(text, true).map_err(|e| e.to_string())?);
        example.end(tokenizer);
        Ok(example)
    }

    fn pair(&self, prompt: &str, completion: &str) -> LineResult<Example> {
        let tokenizer = self.tokenizer()?;
        let tokens = tokenizer.encode_spans(&format!("{prompt}{completion}")).map_err(|e| e.to_string())?;
        let mut example = Example::default();
        if let Some(bos) = tokenizer.begin(tokens.first().map(|&(first, _)| first)) {
            example.push(bos, false);
        }
        // A token that spans the end of the prompt and the start of the completion carries loss,
        // because no other token would teach it.
        for (id, span) in tokens {
            example.push(id, span.end > prompt.len());
        }
        example.end(tokenizer);
        Ok(example)
    }

    fn instruction(&self, object: &Map<String, Value>) -> LineResult<Example> {
        self.tokenizer()?;
        let text = |key: &str| is_given(object, key).then(|| field::<String>(object, key)).transpose();
        let (instruction, input) = (text("instruction")?.unwrap_or_default(), text("input")?.unwrap_or_default());
        let (system, output) = (text("system")?, text("output")?.unwrap_or_default());
        let history =
            if is_given(object, "history") { field::<Vec<(String, String)>>(object, "history")? } else { vec![] };
        if self.chat.is_some() {
            let separator = if input.is_empty() { "" } else { "\n\n" };
            let pairs = history.into_iter().chain([(format!("{instruction}{separator}{input}"), output)]);
            let turns =
                pairs.flat_map(|(user, answer)| [Message::new("user", user), Message::new("assistant", answer)]);
            let system = system.map(|system| Message::new("system", system));
            return self.chat(&system.into_iter().chain(turns).collect::<Vec<_>>().into());
        }
        if let Some(key) = ["system", "history"].into_iter().find(|key| is_given(object, key)) {
            return Err(format!("`{key}` needs a chat template, but the model has none"));
        }
        let (paired, input) = match input.as_str() {
            "" => ("", String::new()),
            input => (", paired with an input that provides further context", format!("### Input:\n{input}\n\n")),
        };
        let prompt = format!(
            "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the \
             request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
        );
        self.pair(&prompt, &output)
    }

    fn chat(&self, chat: &Conversation) -> LineResult<Example> {
        let tokenizer = self.tokenizer()?;
        let template = self.chat.as_ref().ok_or("has messages, but the model has no chat template")?;
        chat_mask::tokenize(tokenizer, template.as_ref().map_err(Error::to_string)?, chat)
    }

    /// Reads a conversation, including what the object has besides its messages.
    fn conversation(&self, object: &Map<String, Value>, mut messages: Vec<Message>) -> LineResult<Example> {
        if is_given(object, "system") {
            if messages.first().is_some_and(|first| first.role() == "system") {
                return Err("has both `system` and a system message; keep only one".into());
            }
            messages.insert(0, Message::new("system", field::<String>(object, "system")?));
        }
        let mut chat = Conversation::from(messages);
        chat.tools = self.list(object, "tools")?;
        chat.documents = self.list(object, "documents")?;
        if is_given(object, "chat_template_kwargs") {
            chat.variables = field(object, "chat_template_kwargs")?;
            chat.variables.keys().try_for_each(|key| self.uses(key, " of `chat_template_kwargs`"))?;
        }
        self.chat(&chat)
    }

    /// Reads a list that the template must use. Tables and some data sets store it as JSON text.
    fn list(&self, object: &Map<String, Value>, key: &str) -> LineResult<Option<Value>> {
        if !is_given(object, key) {
            return Ok(None);
        }
        let list = match &object[key] {
            Value::String(text) => serde_json::from_str(text).map_err(|e| format!("`{key}`: {e}"))?,
            value => value.clone(),
        };
        if !list.is_array() {
            return Err(format!("`{key}` is not a list"));
        }
        self.uses(key, "")?;
        Ok(Some(list))
    }

    /// Checks that the model's chat template, if it has one, mentions a name.
    fn uses(&self, name: &str, place: &str) -> LineResult<()> {
        if self.chat.is_none() || self.words.contains(name) {
            return Ok(());
        }
        Err(format!("`{name}`{place} would be lost: the model's chat template doesn't use it"))
    }

    fn messages(&self, object: &Map<String, Value>, key: &str) -> LineResult<Vec<Message>> {
        Message::list(&Value::Array(self.given_messages(object, key)?))
    }

    /// Reads the messages of a line as objects with `role` and `content`; ShareGPT calls these
    /// `from` and `value`.
    fn given_messages(&self, object: &Map<String, Value>, key: &str) -> LineResult<Vec<Value>> {
        let mut messages: Vec<Value> = match &object[key] {
            Value::Array(messages) => messages.clone(),
            _ => return Err(format!("`{key}` is not a list")),
        };
        for (number, message) in (1..).zip(&mut messages) {
            let Value::Object(fields) = message else { continue };
            for (old, new) in [("from", "role"), ("value", "content")] {
                if !fields.contains_key(new)
                    && let Some(value) = fields.remove(old)
                {
                    fields.insert(new.into(), value);
                }
            }
            // In a tool's answer, `name` says which tool it was. The call says so too.
            let is_tool = fields.get("role").is_some_and(|role| role == "tool" || role == "function");
            for (field, value) in &*fields {
                let known = ["role", "content", "weight"].contains(&field.as_str()) || is_tool && field == "name";
                if !known && !is_blank(value) {
                    let uses = self.uses(field, &format!(" of message {number}"));
                    uses.or_else(|error| if self.is_meaningless(field) { Ok(()) } else { Err(error) })?;
                }
            }
        }
        Ok(messages)
    }
}

/// Whether a text only repeats others: it equals one of them, or it is the `text` that some data
/// sets build from all of them.
fn repeats<'a>(key: &str, text: &str, parts: impl Iterator<Item = &'a Value>) -> bool {
    let mut texts = BTreeSet::new();
    for part in parts {
        match part {
            Value::String(text) => drop(texts.insert(text.as_str())),
            Value::Array(messages) => {
                texts.extend(messages.iter().filter_map(|message| message.get("content")?.as_str()))
            }
            _ => {}
        }
    }
    texts.contains(text) || key == "text" && !texts.is_empty() && texts.iter().all(|part| text.contains(part))
}

/// Whether an object has a meaningful value for a key.
pub(super) fn is_given(object: &Map<String, Value>, key: &str) -> bool {
    object.get(key).is_some_and(|value| !is_blank(value))
}

fn is_blank(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}
