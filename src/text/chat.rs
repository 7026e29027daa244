//! Conversations, and the chat templates that make text of them.

use minijinja::{Value as JinjaValue, context, value::Serde};
use serde::Serialize;
use serde_json::{Map, Value};

use super::jinja::Jinja;
use crate::error::Result;

/// One turn of a conversation: `role`, mostly `content`, and whatever else a template may ask for (`reasoning_content`,
/// `tool_calls`). Templates see the fields as they were given, in their order.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Message(Map<String, Value>);

impl Message {
    /// A message of text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let fields = [("role", role.into()), ("content", content.into())];
        Message(fields.into_iter().map(|(key, text)| (key.to_owned(), Value::String(text))).collect())
    }

    /// The messages of a JSON list of objects, each with a `role`.
    ///
    /// # Errors
    /// What is wrong, with the message's number, from 1, and the field.
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
            Some(_) => Err("`role` is not a text".into()),
            None => Err("`role` is missing".into()),
        }
    }

    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub fn role(&self) -> &str {
        self.0.get("role").and_then(Value::as_str).unwrap_or_default()
    }
}

/// What a chat template is given.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// The turns.
    pub messages: Vec<Message>,
    /// Descriptions of the functions that the model may call; templates see none where there are none.
    pub tools: Option<Value>,
    /// Documents to answer from, likewise.
    pub documents: Option<Value>,
    /// Further variables that the template may use (`enable_thinking`): transformers' `chat_template_kwargs`.
    pub variables: Map<String, Value>,
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
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// [`Error::Template`](crate::Error::Template) if it is malformed, [`Error::Invalid`](crate::Error::Invalid) if it is
    /// longer than 64 KiB.
    pub fn new(source: &str) -> Result<Self> {
        Ok(ChatTemplate { jinja: Jinja::new(source)? })
    }

    /// The text of a conversation, followed by the header of the assistant's next turn where `add_generation_prompt` asks
    /// for it. `bos` and `eos` are the texts of these tokens, empty for none.
    ///
    /// # Errors
    /// [`Error::Template`](crate::Error::Template) if the template refuses the messages, or does what is not supported.
    pub fn render(&self, chat: &Conversation, add_generation_prompt: bool, bos: &str, eos: &str) -> Result<String> {
        let given = context! {
            messages => Serde(&chat.messages),
            tools => Serde(&chat.tools),
            documents => Serde(&chat.documents),
            add_generation_prompt,
            bos_token => bos,
            eos_token => eos,
        };
        self.jinja.render(context! { ..given, ..JinjaValue::from(Serde(&chat.variables)) })
    }
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
            (json!([{"role": null}]), "message 1: `role` is not a text"),
        ] {
            assert_eq!(Message::list(&messages).unwrap_err(), wanted);
        }
    }
}
