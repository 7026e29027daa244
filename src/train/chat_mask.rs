//! Tokenizes conversations so that only the answers carry loss.
//!
//! An answer is the text that the template writes while it handles an assistant message: from the
//! end of the header that a prompt would end with, to the token that ends the turn. So the loss
//! covers what the template really wrote, whatever it does to the messages. A template with
//! `generation` blocks marks the loss itself, and these marks are used.

use std::ops::Range;

use serde_json::Value;

use super::example::Example;
use crate::text::{ChatTemplate, Conversation, Message, Rendered, Speaker, Tokenizer, usual_role, written_out};

const ASSISTANT: &str = "assistant";

/// Tokenizes a conversation with the model's chat template. Each answer carries loss, including
/// the token that ends it.
///
/// # Errors
/// Says what is wrong with the conversation (and its message's number) or with the template.
pub(super) fn tokenize(tokenizer: &Tokenizer, template: &ChatTemplate, chat: &Conversation) -> Result<Example, String> {
    let weights = weights(chat)?;
    let render = |chat: &Conversation, prompt| {
        let (bos, eos) = (tokenizer.bos_text(), tokenizer.eos_text());
        template.render_parts(chat, prompt, bos, eos).map_err(|e| format!("{e}{}", no_text(chat)))
    };
    let rendered = render(chat, false)?;
    check(template, chat, &rendered)?;
    let spans = tokenizer.encode_spans(&rendered.text).map_err(|e| e.to_string())?;
    let tokens = Tokens { tokenizer, text: &rendered.text, spans: &spans };

    let mut loss = vec![false; tokens.spans.len()];
    let mut open = false;
    if template.has_generation_blocks() {
        for block in rendered.generation.iter().filter(|block| !block.is_empty()) {
            let inside = |(part, _): &&(Range<usize>, Speaker)| part.contains(&block.start);
            let speaker = rendered.parts.iter().find(inside).map(|(_, speaker)| speaker);
            if speaker.is_none() && chat.messages.iter().any(is_weighted) {
                return Err(
                    "`weight` can't be applied: a `generation` block is outside of all loops over the messages".into(),
                );
            }
            if speaker.is_none_or(|speaker| weights.of(speaker)) {
                loss[tokens.touching(block)].fill(true);
            }
        }
    } else {
        let answers = answers(chat, &rendered)?;
        let header = answers.first().map_or(Ok(String::new()), |first| header(chat, &rendered, first, render))?;
        for answer in &answers {
            let Some((first, others)) = answer.parts.split_first() else { continue };
            if !weights.of(&answer.speaker) {
                continue;
            }
            let text = &rendered.text[first.clone()];
            // An answer may quote a header, so only search before the message's content.
            let before = &text[..content(chat, answer).and_then(|content| text.rfind(content)).unwrap_or(text.len())];
            let start = first.start + header_len(text, before, &header);
            no_other(chat, &rendered, answer, first.start..first.start + before.len(), start)?;
            let last = others.last().unwrap_or(first);
            let end = tokens.end(start.max(last.start)..last.end);
            for part in answer.parts.iter().filter(|part| part.start != last.start) {
                loss[tokens.within(start.max(part.start)..part.end)].fill(true);
            }
            loss[tokens.within(start.max(last.start)..end.unwrap_or(last.end))].fill(true);
            open = end.is_none() && answer.last;
        }
    }

    let mut example = Example::default();
    for (&(id, _), loss) in tokens.spans.iter().zip(loss) {
        example.push(id, loss);
    }
    // A template without end tokens: the last turn ends the text.
    if open {
        example.end(tokenizer);
    }
    Ok(example)
}

/// Whether each message may carry loss.
struct Weights(Vec<bool>);

impl Weights {
    fn of(&self, speaker: &Speaker) -> bool {
        match speaker {
            Speaker::Message(at) => self.0.get(*at).copied().unwrap_or_default(),
            Speaker::MadeUp { role, .. } => usual_role(role) == ASSISTANT,
        }
    }
}

fn weights(chat: &Conversation) -> Result<Weights, String> {
    let weight = |message: &Message| {
        let answer = usual_role(message.role()) == ASSISTANT;
        match message.field("weight") {
            None | Some(Value::Null) => Ok(answer),
            Some(weight) if weight.as_f64() == Some(0.0) => Ok(false),
            Some(weight) if weight.as_f64() == Some(1.0) && answer => Ok(true),
            Some(weight) if weight.as_f64() == Some(1.0) => {
                Err(format!("`weight` is {weight}, but only the assistant's messages carry loss"))
            }
            Some(weight) => Err(format!("`weight` is {weight}; it must be 0 or 1")),
        }
    };
    let weights =
        (1..).zip(&chat.messages).map(|(n, message)| weight(message).map_err(|e| format!("message {n}: {e}")));
    weights.collect::<Result<_, _>>().map(Weights)
}

/// Returns why a message has no text, if it has none.
fn without(message: &Message) -> Option<&'static str> {
    match message.field("content") {
        None => Some("`content` is missing"),
        Some(Value::Null) => Some("`content` is null"),
        Some(Value::Array(_)) => Some("`content` is a list of parts"),
        _ => None,
    }
}

/// Names the first message without text: a likely reason for a template to fail.
fn no_text(chat: &Conversation) -> String {
    let mut found = (1..).zip(&chat.messages).filter_map(|(n, message)| Some((n, without(message)?)));
    found.next().map_or_else(String::new, |(n, reason)| format!(" (message {n}: {reason})"))
}

/// Finds message content that the template didn't write as intended.
fn check(template: &ChatTemplate, chat: &Conversation, rendered: &Rendered) -> Result<(), String> {
    for (at, message) in chat.messages.iter().enumerate() {
        let n = at + 1;
        let parts = || rendered.parts.iter().filter(|(_, speaker)| *speaker == Speaker::Message(at));
        match message.field("content") {
            Some(content @ Value::Array(given)) => {
                let own: String = parts().map(|(part, _)| &rendered.text[part.clone()]).collect();
                // A system message may be written before the first turn.
                let own = if own.is_empty() { &rendered.text } else { &own };
                let mut texts = given.iter().filter_map(|part| part.as_str().or(part.get("text")?.as_str()));
                if own.contains(&written_out(content)) || texts.any(|text| !own.contains(text.trim())) {
                    return Err(format!("message {n}: the chat template takes `content` as a text only, not in parts"));
                }
            }
            Some(Value::Null) if parts().any(|(part, _)| rendered.nulls.iter().any(|null| part.contains(null))) => {
                return Err(format!("message {n}: the chat template writes `content`, which is null, as \"None\""));
            }
            Some(Value::Null | Value::String(_)) | None => {}
            Some(_) => return Err(format!("message {n}: `content` is neither text nor a list of parts")),
        }
        let said = message.field("content").and_then(Value::as_str).map(str::trim).unwrap_or_default();
        let is_written = || {
            let escaped = Value::from(said).to_string();
            [said, &escaped[1..escaped.len() - 1]].iter().any(|said| rendered.text.contains(said))
        };
        if usual_role(message.role()) != ASSISTANT && parts().all(|(part, _)| part.is_empty()) && !is_written() {
            // transformers renders it the same way. The same words for all conversations, so that
            // the warning is shown once.
            let role = message.role();
            tracing::warn!(
                "the chat template leaves out messages of the role {role} in some conversations; nothing is learned from them"
            );
        }
        let known = ["system", "developer", "user", ASSISTANT, "tool", "function"];
        let silent = parts().all(|(part, _)| part.is_empty());
        if silent && !known.contains(&usual_role(message.role())) && !template.mentions(message.role()) {
            return Err(format!("message {n}: the chat template doesn't support the role {:?}", message.role()));
        }
    }
    Ok(())
}

/// An answer as it was written: usually one part.
struct Answer {
    speaker: Speaker,
    parts: Vec<Range<usize>>,
    /// Whether no part of another message follows.
    last: bool,
}

/// Returns the answers, each as the template wrote it.
fn answers(chat: &Conversation, rendered: &Rendered) -> Result<Vec<Answer>, String> {
    let mut answers: Vec<Answer> = Vec::new();
    let mut made_up = false;
    for (part, speaker) in rendered.parts.iter().filter(|(part, _)| !part.is_empty()) {
        answers.iter_mut().for_each(|answer| answer.last = answer.speaker == *speaker);
        let role = match speaker {
            Speaker::Message(at) => chat.messages.get(*at).map_or("", Message::role),
            Speaker::MadeUp { role, .. } => role,
        };
        made_up |= matches!(speaker, Speaker::MadeUp { .. });
        if usual_role(role) != ASSISTANT {
            continue;
        }
        match answers.iter_mut().find(|answer| answer.last) {
            Some(answer) => answer.parts.push(part.clone()),
            None => answers.push(Answer { speaker: speaker.clone(), parts: vec![part.clone()], last: true }),
        }
    }
    for (at, message) in chat.messages.iter().enumerate().filter(|(_, message)| usual_role(message.role()) == ASSISTANT)
    {
        let n = at + 1;
        // A template may skip an answer, but it must not write the answer outside its turn.
        if !made_up && !rendered.parts.iter().any(|(_, speaker)| *speaker == Speaker::Message(at)) {
            return Err(format!(
                "message {n}: can't be found in the chat template's output; no loop of the template visits it"
            ));
        }
        if made_up && is_weighted(message) {
            return Err(format!("message {n}: `weight` can't be applied: the chat template creates messages itself"));
        }
    }
    let has_role =
        |list: &Option<Value>| list.iter().filter_map(Value::as_array).flatten().any(|item| item.get("role").is_some());
    if made_up && (has_role(&chat.tools) || has_role(&chat.documents)) {
        return Err("a tool or a document has the key `role` and would be mistaken for a message".into());
    }
    Ok(answers)
}

fn is_weighted(message: &Message) -> bool {
    message.field("weight").is_some_and(|weight| !weight.is_null())
}

/// Content of an answer's message, if it is a text.
fn content<'c>(chat: &'c Conversation, answer: &Answer) -> Option<&'c str> {
    let Speaker::Message(at) = answer.speaker else { return None };
    Some(chat.messages.get(at)?.field("content")?.as_str()?.trim()).filter(|content| !content.is_empty())
}

/// Checks that `before`, the text written for an answer before its content, holds no text of
/// another message beyond `start`, the end of the header.
fn no_other(
    chat: &Conversation,
    rendered: &Rendered,
    answer: &Answer,
    before: Range<usize>,
    start: usize,
) -> Result<(), String> {
    for (at, message) in chat.messages.iter().enumerate().filter(|(_, message)| usual_role(message.role()) != ASSISTANT)
    {
        let Some(said) = message.field("content").and_then(Value::as_str).map(str::trim) else { continue };
        let own = |(part, speaker): &(Range<usize>, Speaker)| {
            *speaker == Speaker::Message(at) && rendered.text[part.clone()].contains(said)
        };
        if said.is_empty() || rendered.parts.iter().any(own) {
            continue;
        }
        let found = rendered.text[before.clone()].rfind(said);
        if found.is_some_and(|found| before.start + found + said.len() > start) {
            let n = if let Speaker::Message(n) = answer.speaker {
                format!("message {}", n + 1)
            } else {
                "an answer".into()
            };
            return Err(format!(
                "{n}: the chat template writes message {} together with it, so the answer can't be told apart",
                at + 1
            ));
        }
    }
    Ok(())
}

/// Returns the header of the first answer, which all answers share: the text that both ends a
/// prompt and starts an answer.
fn header(
    chat: &Conversation,
    rendered: &Rendered,
    first: &Answer,
    render: impl Fn(&Conversation, bool) -> Result<Rendered, String>,
) -> Result<String, String> {
    let before = match first.speaker {
        Speaker::Message(at) if at > 0 => at,
        _ => chat.messages.len(),
    };
    let asked = Conversation { messages: chat.messages[..before].to_vec(), ..chat.clone() };
    // A template may refuse to stop there; then take the header after the whole conversation.
    let (asked, prompt) = match render(&asked, true) {
        Ok(prompt) => (asked, prompt),
        Err(_) if before < chat.messages.len() => (chat.clone(), render(chat, true)?),
        Err(error) => return Err(error),
    };
    let start = first.parts[0].start;
    if prompt.parts.len() < rendered.parts.len() && prompt.text.get(..start) == rendered.text.get(..start) {
        return Ok(prompt.text[start..].to_owned());
    }
    // The prompt also differs before the answer. Take what it has beyond the same text without a
    // prompt.
    let plain = render(&asked, false)?;
    let end = |rendered: &Rendered| rendered.parts.last().map_or(0, |(part, _)| part.end);
    let (prompt_end, plain_end) = (end(&prompt), end(&plain));
    if prompt.text[..prompt_end] == plain.text[..plain_end] {
        let (header, rest) = (&prompt.text[prompt_end..], &plain.text[plain_end..]);
        return Ok(header.strip_prefix(rest).unwrap_or(header).to_owned());
    }
    Ok(prompt.text[common_prefix(&prompt.text, &plain.text)..].to_owned())
}

/// Length in bytes of the header at the start of an answer; `before` is the answer's text before
/// its content. A prompt may open something that a finished answer lacks (a block of thoughts),
/// and an answer may start with the end of the turn before.
fn header_len(answer: &str, before: &str, header: &str) -> usize {
    let common = common_prefix(answer, header);
    if common < header.len() {
        if let Some(at) = before.find(header) {
            return at + header.len();
        }
        // Don't stop inside a word or a tag.
        let inside = |c: char| c.is_alphanumeric() || "<[({|/_".contains(c);
        return header[..common].trim_end_matches(inside).len();
    }
    common
}

/// A tokenized text.
struct Tokens<'a> {
    tokenizer: &'a Tokenizer,
    text: &'a str,
    spans: &'a [(u32, Range<usize>)],
}

impl Tokens<'_> {
    /// Tokens that overlap these bytes.
    fn touching(&self, bytes: &Range<usize>) -> Range<usize> {
        let first = self.spans.partition_point(|(_, span)| span.end <= bytes.start);
        first..self.spans.partition_point(|(_, span)| span.start < bytes.end).max(first)
    }

    /// Tokens that overlap these bytes and contain no text after them. A token that starts before
    /// the bytes is included, because no other token would teach it.
    fn within(&self, bytes: Range<usize>) -> Range<usize> {
        let tokens = self.touching(&bytes);
        let ends_outside = |span: &Range<usize>| span.end > bytes.end && !self.is_blank(bytes.end..span.end);
        let outside = self.spans[tokens.clone()].last().is_some_and(|(_, span)| ends_outside(span));
        tokens.start..tokens.end - usize::from(outside)
    }

    /// Returns the end of the turn written in these bytes: just after its last end token, which
    /// may follow the bytes; `None` if there is no end token. What a template writes after it (a
    /// line feed) isn't said by the model.
    fn end(&self, bytes: Range<usize>) -> Option<usize> {
        let eos = |id: u32| self.tokenizer.eos_ids().contains(&id);
        let tokens = &self.spans[self.touching(&bytes)];
        let ends = |(id, span): &&(u32, Range<usize>)| {
            eos(*id) || (self.is_special(*id) && self.is_blank(span.end.min(bytes.end)..bytes.end))
        };
        if let Some((_, span)) = tokens.iter().rev().find(ends) {
            return Some(span.end);
        }
        let after = self.spans[self.touching(&bytes).end..].iter().find(|(_, span)| !self.is_blank(span.clone()));
        after
            .filter(|(id, span)| eos(*id) && self.is_blank(bytes.end..span.start.max(bytes.end)))
            .map(|(_, span)| span.end)
    }

    fn is_blank(&self, bytes: Range<usize>) -> bool {
        self.text.get(bytes).is_some_and(|text| text.trim().is_empty())
    }

    /// Whether it is a special token rather than text.
    fn is_special(&self, id: u32) -> bool {
        let is_empty = |skip| self.tokenizer.decode(&[id], skip).is_ok_and(|text| text.is_empty());
        is_empty(true) && !is_empty(false)
    }
}

/// Length in bytes of the common prefix of two texts, in whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}
