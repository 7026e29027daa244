//! Finds out which part of a rendered text belongs to which message, by the marks in it.

use std::ops::Range;
use std::sync::Arc;

use minijinja::value::{Enumerator, Object, ValueKind};
use minijinja::{Environment, Value};

use super::instrument::{MARK_ASSIGNED, MARK_ITEM, MARK_WRITTEN, mark};

/// A message as templates see it: a map that still knows its number when a loop takes it.
#[derive(Debug)]
pub(super) struct Turn {
    /// Number, from 0.
    pub number: usize,
    pub fields: Vec<(Value, Value)>,
    /// Size of its fields in bytes.
    pub bytes: usize,
}

impl Object for Turn {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.fields.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.fields.iter().map(|(name, _)| name.clone()).collect())
    }
}

/// Adds the filters that make marks.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.add_filter(MARK_ITEM, |item: Value, sentinel: char| format!("{sentinel}{}{sentinel}", of_item(&item)));
    environment.add_filter(MARK_ASSIGNED, |value: Value, sentinel: char| {
        let number = value.downcast_object_ref::<Turn>().map(|turn| turn.number);
        number.map_or_else(String::new, |number| format!("{sentinel}{ASSIGNED}{number}{sentinel}"))
    });
    environment.add_filter(MARK_WRITTEN, |value: Value, sentinel: char| {
        if value.is_none() { format!("{sentinel}{NULL}{sentinel}") } else { String::new() }
    });
}

const MESSAGE: &str = "message:";
const ASSIGNED: &str = "assigned:";
const MADE_UP: &str = "made-up:";
const INTEGER: &str = "integer";
const OTHER: &str = "other";
const NULL: &str = "null";

fn of_item(item: &Value) -> String {
    if let Some(turn) = item.downcast_object_ref::<Turn>() {
        return format!("{MESSAGE}{}", turn.number);
    }
    let role = || item.get_attr("role").ok().and_then(|role| role.as_str().map(str::to_owned));
    match item.kind() {
        ValueKind::Map => role().map_or_else(|| OTHER.to_owned(), |role| format!("{MADE_UP}{role}")),
        ValueKind::Number if item.is_integer() => INTEGER.to_owned(),
        _ => OTHER.to_owned(),
    }
}

/// The owner of a part of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Speaker {
    /// The message with this number, from 0.
    Message(usize),
    /// A message that the template created: its number among these, and its role.
    MadeUp { number: usize, role: String },
}

/// A rendered conversation.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Rendered {
    /// Its text, without marks.
    pub text: String,
    /// Parts that were written while the template handled a message, in order.
    pub parts: Vec<(Range<usize>, Speaker)>,
    /// Ranges of the `generation` blocks.
    pub generation: Vec<Range<usize>>,
    /// Positions where a null was written.
    pub nulls: Vec<usize>,
}

/// A loop around the current text.
#[derive(Default)]
struct Loop {
    /// Current speaker, if the loop determines one.
    speaker: Option<Speaker>,
    /// Whether the loop counts, so that an assignment determines the message.
    counts: bool,
}

impl Rendered {
    /// Removes the marks from a text; `None` if they aren't as they were written.
    pub(super) fn new(marked: &str, sentinel: char) -> Option<Self> {
        let mut rendered = Rendered::default();
        let mut loops: Vec<Loop> = Vec::new();
        let mut blocks: Vec<usize> = Vec::new();
        let mut made_up = 0;
        let mut pieces = marked.split(sentinel);
        rendered.write(pieces.next()?, &loops);
        while let Some(mark) = pieces.next() {
            let at = rendered.text.len();
            match (mark, loops.last_mut()) {
                (mark::LOOP, _) => loops.push(Loop::default()),
                (mark::END_LOOP, Some(_)) => drop(loops.pop()),
                (mark::GENERATION, _) => blocks.push(at),
                (mark::END_GENERATION, _) => rendered.generation.push(blocks.pop()?..at),
                (NULL, _) => rendered.nulls.push(at),
                (INTEGER, Some(inner)) => *inner = Loop { speaker: None, counts: true },
                (OTHER, Some(inner)) => *inner = Loop::default(),
                (other, Some(inner)) => {
                    if let Some(number) = other.strip_prefix(MESSAGE) {
                        inner.speaker = Some(Speaker::Message(number.parse().ok()?));
                    } else if let Some(role) = other.strip_prefix(MADE_UP) {
                        made_up += 1;
                        inner.speaker = Some(Speaker::MadeUp { number: made_up, role: role.to_owned() });
                    } else if inner.counts {
                        let assigned = Some(Speaker::Message(other.strip_prefix(ASSIGNED)?.parse().ok()?));
                        // With two messages at once, it is unclear which one is written.
                        if inner.speaker.is_some() && inner.speaker != assigned {
                            return None;
                        }
                        inner.speaker = assigned;
                    }
                }
                // A variable outside any loop.
                (other, None) => drop(other.strip_prefix(ASSIGNED)?),
            }
            rendered.write(pieces.next()?, &loops);
        }
        (loops.is_empty() && blocks.is_empty()).then_some(rendered)
    }

    fn write(&mut self, text: &str, loops: &[Loop]) {
        let range = self.text.len()..self.text.len() + text.len();
        self.text.push_str(text);
        let Some(speaker) = loops.iter().rev().find_map(|inner| inner.speaker.as_ref()) else { return };
        match self.parts.last_mut() {
            Some((part, last)) if last == speaker && part.end == range.start => part.end = range.end,
            // Even if nothing is written: a message may be empty.
            _ => self.parts.push((range, speaker.clone())),
        }
    }
}
