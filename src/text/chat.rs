//! Conversations, and the chat templates that turn them into text.

use minijinja::value::Serde;
use minijinja::{Value as JinjaValue, context};
use serde_json::{Map, Value};

use super::bounds;
use super::jinja::Jinja;
use super::marks::{Rendered, Turn};
use crate::error::{Error, Result};

/// A turn of a conversation: `role`, usually `content`, and any other fields for the template
/// (`reasoning_content`, `tool_calls`). Templates see the fields as given, in their order.
#[derive(Clone, Debug, PartialEq)]
pub struct Message(Map<String, Value>);

impl Message {
    /// Makes a message from a role and a text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let fields = [("role", role.into()), ("content", content.into())];
        Message(fields.into_iter().map(|(key, text)| (key.to_owned(), Value::String(text))).collect())
    }

    /// Reads messages from a JSON list of objects, each with a `role`.
    ///
    /// # Errors
    /// What is wrong, with the message's number (from 1) and the field.
    pub fn list(messages: &Value) -> Result<Vec<Self>, String> {
        let Value::Array(messages) = messages else { return Err("`messages` is not a list".into()) };
        (1..)
            .zip(messages)
            .map(|(n, message)| Message::read(message).map_err(|e| format!("message {n}: {e}")))
            .collect()
    }

    fn read(message: &Value) -> Result<Self, String> {
        let Value::Object(fields) = message else { return Err("not an object".into()) };
        match fields.get("role") {
            Some(Value::String(_)) => Ok(Message(fields.clone())),
            Some(_) => Err("`role` is not text".into()),
            None => Err("`role` is missing".into()),
        }
    }

    /// Who speaks: `system`, `user`, `assistant`, or another role that the template knows.
    pub fn role(&self) -> &str {
        self.0.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// Returns a field, if it exists; it may be null.
    pub(crate) fn field(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }
}

/// Input of a chat template.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// Turns of the conversation.
    pub messages: Vec<Message>,
    /// Descriptions of the functions that the model may call. With `None`, templates see none.
    pub tools: Option<Value>,
    /// Documents to answer from. With `None`, templates see none.
    pub documents: Option<Value>,
    /// Further variables for the template (`enable_thinking`): `chat_template_kwargs` in
    /// transformers.
    pub variables: Map<String, Value>,
}

impl Conversation {
    /// Messages as templates see them.
    fn turns<'r>(&'r self, role: impl Fn(&'r str) -> &'r str) -> Vec<JinjaValue> {
        let turn = |(number, message): (usize, &'r Message)| {
            let field = |(key, value): (&'r String, &'r Value)| {
                let value = match value {
                    Value::String(name) if key == "role" => JinjaValue::from(role(name)),
                    value => JinjaValue::from(Serde(value)),
                };
                (JinjaValue::from(key), value)
            };
            let fields: Vec<_> = message.0.iter().map(field).collect();
            // If this is too large, it is noticed when the template uses it.
            let mut bytes = 0;
            let fits = fields.iter().try_for_each(|(_, value)| bounds::measure(value, 0, &mut bytes));
            JinjaValue::from_object(Turn { number, fields, bytes: if fits.is_ok() { bytes } else { usize::MAX / 2 } })
        };
        self.messages.iter().enumerate().map(turn).collect()
    }

    fn contains(&self, c: char) -> bool {
        fn any(value: &Value, c: char) -> bool {
            match value {
                Value::String(text) => text.contains(c),
                Value::Array(items) => items.iter().any(|item| any(item, c)),
                Value::Object(fields) => fields.iter().any(|(key, value)| key.contains(c) || any(value, c)),
                _ => false,
            }
        }
        let fields = self.messages.iter().map(|message| &message.0).chain([&self.variables]);
        fields.flatten().any(|(key, value)| key.contains(c) || any(value, c))
            || [&self.tools, &self.documents].into_iter().flatten().any(|value| any(value, c))
    }
}

impl From<Vec<Message>> for Conversation {
    fn from(messages: Vec<Message>) -> Self {
        Conversation { messages, ..Conversation::default() }
    }
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    jinja: Jinja,
    source: String,
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// [`Error::Template`] if it is malformed, [`Error::Invalid`] if it is longer than 64 KiB.
    pub fn new(source: &str) -> Result<Self> {
        Ok(ChatTemplate { jinja: Jinja::new(source)?, source: source.to_owned() })
    }

    /// Renders a conversation, followed by the header of the assistant's next turn if
    /// `add_generation_prompt`. `bos` and `eos` are the texts of these tokens, or empty.
    ///
    /// # Errors
    /// [`Error::Template`] if the template refuses the messages, or does something unsupported.
    pub fn render(&self, chat: &Conversation, add_generation_prompt: bool, bos: &str, eos: &str) -> Result<String> {
        self.jinja.render(self.variables(chat, add_generation_prompt, bos, eos), None)
    }

    /// Like [`ChatTemplate::render`], and returns which parts belong to which messages.
    ///
    /// # Errors
    /// Same as [`ChatTemplate::render`].
    pub(crate) fn render_parts(
        &self,
        chat: &Conversation,
        add_generation_prompt: bool,
        bos: &str,
        eos: &str,
    ) -> Result<Rendered> {
        let failed = |message: &str| Error::Template { line: 0, message: message.to_owned() };
        let used = |c: &char| [&self.source, bos, eos].iter().any(|text| text.contains(*c)) || chat.contains(*c);
        // Noncharacters, which have no meaning in any text.
        let sentinel = ('\u{FDD0}'..='\u{FDEF}').find(|c| !used(c));
        let sentinel = sentinel.ok_or_else(|| failed("the conversation contains every noncharacter of Unicode"))?;
        let marked = self.jinja.render(self.variables(chat, add_generation_prompt, bos, eos), Some(sentinel))?;
        Rendered::new(&marked, sentinel).ok_or_else(|| failed("the parts of its text can't be told apart"))
    }

    fn variables(&self, chat: &Conversation, add_generation_prompt: bool, bos: &str, eos: &str) -> JinjaValue {
        let given = context! {
            messages => chat.turns(|role| self.role(role)),
            tools => Serde(&chat.tools),
            documents => Serde(&chat.documents),
            add_generation_prompt,
            bos_token => bos,
            eos_token => eos,
        };
        context! { ..given, ..JinjaValue::from(Serde(&chat.variables)) }
    }

    /// Whether the template itself marks the assistant's text, with `generation` blocks.
    pub(crate) fn has_generation_blocks(&self) -> bool {
        self.jinja.generation
    }

    /// Whether the template mentions this field or variable.
    pub(crate) fn mentions(&self, name: &str) -> bool {
        self.source.contains(name)
    }

    /// Translates a role for the template: `human`, `gpt`, `model` and `bot` are common names for
    /// its `user` and `assistant`.
    fn role<'r>(&self, role: &'r str) -> &'r str {
        let quoted =
            |role: &str| ['\'', '"'].iter().any(|quote| self.source.contains(&format!("{quote}{role}{quote}")));
        let usual = usual_role(role);
        if quoted(role) && !quoted(usual) { role } else { usual }
    }
}

/// A value as written by a template that doesn't look into it.
pub(crate) fn written_out(value: &Value) -> String {
    JinjaValue::from(Serde(value)).to_string()
}

/// The usual name of a role.
pub(crate) fn usual_role(role: &str) -> &str {
    const NAMES: [(&str, &[&str]); 4] = [
        ("system", &["system"]),
        ("user", &["user", "human", "prompter"]),
        ("assistant", &["assistant", "gpt", "model", "bot", "chatbot", "ai", "chatgpt"]),
        ("tool", &["tool"]),
    ];
    let known = NAMES.iter().find(|(_, names)| names.iter().any(|name| role.trim().eq_ignore_ascii_case(name)));
    known.map_or(role, |(usual, _)| usual)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(source: &str, chat: &Conversation) -> String {
        ChatTemplate::new(source).unwrap().render(chat, false, "<s>", "</s>").unwrap()
    }

    #[test]
    fn templates_see_all_that_is_given() {
        let messages = Message::list(&json!([{"content": "a", "role": "assistant", "thought": "b"}])).unwrap();
        let tools = json!([{"b": 1, "a": 2}]);
        let variables = json!({"mode": "x"}).as_object().unwrap().clone();
        let chat = Conversation { tools: Some(tools), variables, ..Conversation::from(messages) };
        let source = "{{ messages[0] | tojson }}{{ messages[0].thought }}{{ tools | tojson }}{{ mode }}{{ documents }}";
        let wanted = r#"{"content": "a", "role": "assistant", "thought": "b"}b[{"b": 1, "a": 2}]xNone"#;
        assert_eq!(render(source, &chat), wanted);
    }

    #[test]
    fn malformed_messages_are_named() {
        for (messages, wanted) in [
            (json!({}), "`messages` is not a list"),
            (json!([{"role": "user"}, 1]), "message 2: not an object"),
            (json!([{"content": "a"}]), "message 1: `role` is missing"),
            (json!([{"role": null}]), "message 1: `role` is not text"),
        ] {
            assert_eq!(Message::list(&messages).unwrap_err(), wanted);
        }
    }
}
