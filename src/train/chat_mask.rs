//! Conversations to tokens: the answers carry loss, nothing else does.

use std::ops::Range;

use super::example::Example;
use crate::text::{ChatTemplate, Conversation, Message, Tokenizer};

const ASSISTANT: &str = "assistant";

/// A conversation in the model's chat template. The answers carry loss, each with the token that ends it.
///
/// # Errors
/// What is wrong with the conversation, or with the template.
pub(super) fn tokenize(tokenizer: &Tokenizer, template: &ChatTemplate, chat: &Conversation) -> Result<Example, String> {
    let messages = &chat.messages;
    let render = |messages: &[Message], prompt: bool| {
        let (bos, eos) = (tokenizer.bos_text(), tokenizer.eos_text());
        template.render(&messages.to_vec().into(), prompt, bos, eos).map_err(|e| e.to_string())
    };
    let text = render(messages, false)?;
    let tokens = tokenizer.encode_spans(&text).map_err(|e| e.to_string())?;

    let mut loss = vec![false; tokens.len()];
    for turn in (0..messages.len()).filter(|&turn| messages[turn].role() == ASSISTANT) {
        if turn == 0 {
            return Err("starts with the assistant".into());
        }
        let changed = || format!("the chat template renders message {} otherwise once others follow", turn + 1);
        let before = render(&messages[..turn], false)?;
        let prompt = render(&messages[..turn], true)?;
        let through = render(&messages[..=turn], false)?;
        // Some templates open a block in a prompt (for reasoning) that a finished turn does not have.
        let start = common_prefix(&prompt, &text);
        if start < before.trim_end().len() {
            return Err(changed());
        }
        // And in some the last turn looks different: then only its end token tells where it ends.
        let end = text.starts_with(&through).then_some(through.len());

        let first = tokens.partition_point(|(_, bytes)| bytes.end <= start);
        let last = end.map_or(tokens.len(), |end| tokens.partition_point(|(_, bytes)| bytes.start < end));
        let span = first..last.max(first);
        // What a template writes after the end token (a line feed) is nothing that the model says.
        let ends = |(id, _): &(u32, Range<usize>)| tokenizer.eos_ids().contains(id);
        match tokens[span.clone()].iter().position(ends) {
            Some(at) => loss[first..=first + at].fill(true),
            None if end.is_some() => loss[span].fill(true),
            None => return Err(changed()),
        }
    }

    let mut example = Example::default();
    for ((id, _), loss) in tokens.into_iter().zip(loss) {
        example.push(id, loss);
    }
    // A template without end tokens: the last turn ends the text.
    if example.ends_with_loss() {
        example.end(tokenizer);
    }
    Ok(example)
}

/// Bytes that two texts have in common at their start, in whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}
