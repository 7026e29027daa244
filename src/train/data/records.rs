//! Finds out how a file stores training text, by its content: as objects in one of several forms,
//! or as one text. The name only matters if the content is ambiguous.

use std::fmt::{self, Display, Formatter};
use std::path::Path;
use std::sync::LazyLock;

use regex::bytes::Regex;
use serde::de::IgnoredAny;
use serde_json::{Deserializer, Map, Value};

use super::table::{Rows, columns};
use super::{foreign, object};

/// Formats of files with examples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// One JSON object per line.
    #[default]
    JsonLines,
    /// JSON objects over several lines, one after another.
    JsonObjects,
    /// A JSON list of objects.
    JsonList,
    /// A table with column names in the first row, separated by this character.
    Table(char),
    /// One text.
    Text,
}

impl Display for Format {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::JsonLines => "JSON Lines",
            Format::JsonObjects => "JSON objects",
            Format::JsonList => "a JSON list",
            Format::Table('\t') => "tab-separated values",
            Format::Table(_) => "comma-separated values",
            Format::Text => "plain text",
        })
    }
}

/// Content of a file.
pub(super) enum Content<'a> {
    Records(Format, Vec<Record<'a>>),
    Text(&'a str),
}

/// An object that hasn't been parsed yet.
pub(super) struct Record<'a> {
    /// Line where it begins, from 1.
    pub line: usize,
    pub source: Source<'a>,
}

pub(super) enum Source<'a> {
    Json(&'a [u8]),
    Row(Vec<String>),
}

impl Record<'_> {
    /// Parses the object; in a table, with these columns.
    pub(super) fn object(&self, columns: &[String]) -> Result<Map<String, Value>, String> {
        match &self.source {
            Source::Json(text) => object::read(text).map_err(|e| {
                // The line number refers to the file.
                format!("is not a JSON object: {} at column {}", without_place(&e.to_string()), e.column())
            }),
            Source::Row(row) => {
                if row.len() != columns.len() {
                    return Err(format!("has {} fields, but there are {} columns", row.len(), columns.len()));
                }
                Ok(columns.iter().cloned().zip(row.iter().cloned().map(Value::String)).collect())
            }
        }
    }
}

/// Splits `bytes` into records, and returns the columns if it is a table. `is_form` tells whether
/// columns of these names make up an example.
///
/// # Errors
/// Says what they are instead, or what is wrong with them.
pub(super) fn read<'a>(
    bytes: &'a [u8],
    path: &Path,
    is_form: impl Fn(&[String]) -> Result<(), String>,
) -> Result<(Content<'a>, Vec<String>), String> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    let called = |names: &[&str]| names.contains(&extension.as_str());
    let called_json = called(&["jsonl", "json", "ndjson"]);

    if let Some(message) = foreign::name(bytes) {
        return Err(message);
    }
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    if bytes.trim_ascii().is_empty() {
        return Err("has no examples: it is empty".into());
    }
    if let Some((format, records)) = json(bytes, called_json)? {
        return Ok((Content::Records(format, records), Vec::new()));
    }
    if let Some((delimiter, columns)) = columns(bytes, called(&["csv", "tsv"]), &is_form) {
        is_form(&columns).map_err(|message| {
            let columns = columns.join(", ");
            format!("is {} with the columns [{columns}]: {message}", Format::Table(delimiter))
        })?;
        foreign::text(bytes)?;
        let records = Rows::new(bytes, delimiter).skip(1);
        let records = records.map(|(line, row)| Record { line, source: Source::Row(row) }).collect();
        return Ok((Content::Records(Format::Table(delimiter), records), columns));
    }
    if called_json {
        return Ok((Content::Records(Format::JsonLines, lines(bytes)), Vec::new()));
    }
    Ok((Content::Text(foreign::text(bytes)?), Vec::new()))
}

/// Returns the lines that aren't empty.
fn lines(bytes: &[u8]) -> Vec<Record<'_>> {
    let all = (1..).zip(bytes.split(|&byte| byte == b'\n'));
    let full = all.filter(|(_, line)| !line.trim_ascii().is_empty());
    full.map(|(line, text)| Record { line, source: Source::Json(text) }).collect()
}

/// Returns the objects of a file, if it is JSON.
fn json(bytes: &[u8], called_json: bool) -> Result<Option<(Format, Vec<Record<'_>>)>, String> {
    static LIST: LazyLock<Regex> = LazyLock::new(|| expression(r#"\A\s*\[\s*\{\s*"(?:[^"\\]|\\.)*"\s*:"#));
    static OBJECT: LazyLock<Regex> = LazyLock::new(|| expression(r#"\A\s*\{\s*(?:"(?:[^"\\]|\\.)*"\s*:|\}\s*\z)"#));
    /// Number of lines to look at.
    const SAMPLE: usize = 64;

    let full = || bytes.split(|&byte| byte == b'\n').filter(|line| !line.trim_ascii().is_empty());
    let first = full().next().unwrap_or_default();
    let is_whole = serde_json::from_slice::<IgnoredAny>(first).is_ok();
    if bytes.trim_ascii_start().starts_with(b"[") {
        match values(bytes, true) {
            Ok(records) => return Ok(Some((Format::JsonList, records))),
            Err(error) if LIST.is_match(bytes) || called_json && !is_whole => {
                return Err(format!("begins as a JSON list, but is malformed: {error}"));
            }
            Err(_) => {}
        }
    }
    // A text may begin with a brace, or even with an object. What most lines are decides.
    let sample = full()
        .take(SAMPLE)
        .fold((0, 0), |(all, objects), line| (all + 1, objects + usize::from(OBJECT.is_match(line))));
    let are_lines = 2 * sample.1 >= sample.0 && OBJECT.is_match(first);
    if !is_whole && OBJECT.is_match(bytes) {
        match values(bytes, false) {
            Ok(records) => return Ok(Some((Format::JsonObjects, records))),
            Err(error) if !are_lines && (called_json || bytes.trim_ascii_end().ends_with(b"}")) => {
                return Err(format!("begins as a JSON object, but is malformed: {error}"));
            }
            Err(_) => {}
        }
    }
    Ok(are_lines.then(|| (Format::JsonLines, lines(bytes))))
}

fn expression(text: &str) -> Regex {
    Regex::new(text).unwrap_or_else(|error| unreachable!("{error}"))
}

/// Returns the values in `bytes`, one after another, or the elements if it is a list.
fn values(bytes: &[u8], is_list: bool) -> Result<Vec<Record<'_>>, String> {
    let (mut records, mut at, mut line) = (Vec::new(), 0, 1);
    // Skips white space and returns the next byte.
    let next = |at: &mut usize, line: &mut usize| {
        let rest = bytes[*at..].trim_ascii_start();
        let start = bytes.len() - rest.len();
        *line += bytes[*at..start].iter().filter(|&&byte| byte == b'\n').count();
        *at = start;
        rest.first().copied()
    };
    if is_list {
        next(&mut at, &mut line);
        at += 1;
    }
    loop {
        match next(&mut at, &mut line) {
            None if !is_list => return Ok(records),
            Some(b']') if is_list && records.is_empty() => {}
            _ => {
                let mut value = Deserializer::from_slice(&bytes[at..]).into_iter::<IgnoredAny>();
                let failed = |e: Option<serde_json::Error>| match e {
                    Some(e) => {
                        let line = line + e.line() - 1;
                        format!("{} in line {line}, column {}", without_place(&e.to_string()), e.column())
                    }
                    None => format!("it ends in line {line}"),
                };
                value.next().unwrap_or(Ok(IgnoredAny)).map_err(|e| failed(Some(e)))?;
                let end = at + value.byte_offset();
                if end == at {
                    return Err(failed(None));
                }
                records.push(Record { line, source: Source::Json(&bytes[at..end]) });
                line += bytes[at..end].iter().filter(|&&byte| byte == b'\n').count();
                at = end;
            }
        }
        if is_list {
            match next(&mut at, &mut line) {
                Some(b',') => at += 1,
                Some(b']') if bytes[at + 1..].trim_ascii().is_empty() => return Ok(records),
                Some(b']') => return Err(format!("text follows it in line {line}")),
                Some(_) => return Err(format!("a comma is missing in line {line}")),
                None => return Err(format!("its end is missing in line {line}")),
            }
        }
    }
}

/// The error message, without a position in the parsed part.
fn without_place(message: &str) -> &str {
    message.rsplit_once(" at line ").map_or(message, |(message, _)| message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_form(columns: &[String]) -> Result<(), String> {
        if columns.iter().any(|name| name == "prompt") { Ok(()) } else { Err("no prompt".into()) }
    }

    /// Format and record lines, or the error.
    fn found(name: &str, text: impl AsRef<[u8]>) -> Result<(Format, Vec<usize>), String> {
        Ok(match read(text.as_ref(), name.as_ref(), is_form)?.0 {
            Content::Records(format, records) => (format, records.iter().map(|record| record.line).collect()),
            Content::Text(_) => (Format::Text, Vec::new()),
        })
    }

    #[test]
    fn the_content_decides_and_not_the_name() {
        let lines = "\n{\"prompt\": 1}\r\n\r\n{\"a\": [\n{}\n";
        for name in ["a.jsonl", "a.txt", "a", "a.csv"] {
            assert_eq!(found(name, lines), Ok((Format::JsonLines, vec![2, 4, 5])), "{name}");
            assert_eq!(found(name, format!("\u{feff}{lines}")), Ok((Format::JsonLines, vec![2, 4, 5])), "{name}");
            assert_eq!(
                found(name, "[\n{\"a\": 1}, {\n\"a\": 2},\n{}]\n"),
                Ok((Format::JsonList, vec![2, 2, 4])),
                "{name}"
            );
            assert_eq!(found(name, "{\n\"a\": 1\n}\n{\"a\":\n 2}"), Ok((Format::JsonObjects, vec![1, 4])), "{name}");
            let table = "prompt,completion\n\n\"a\n\",b\nc\n";
            assert_eq!(found(name, table), Ok((Format::Table(','), vec![3, 5])), "{name}");
            assert_eq!(found(name, table.replace(',', "\t")), Ok((Format::Table('\t'), vec![3, 5])), "{name}");
            assert!(
                found(name, "question;answer\na;b\n").unwrap_err().contains("[question, answer]: no prompt"),
                "{name}"
            );
            assert!(found(name, "[{\"a\": 1},\n{]").unwrap_err().contains("begins as a JSON list"), "{name}");
            assert!(found(name, "{\n\"a\": 1,\n}").unwrap_err().contains("begins as a JSON object"), "{name}");
            assert_eq!(found(name, b"\x1f\x8b\x08").unwrap_err(), "is compressed with gzip, not text; unpack it first");
            assert_eq!(found(name, " \n").unwrap_err(), "has no examples: it is empty");
        }
        assert_eq!(found("a.json", "x\n"), Ok((Format::JsonLines, vec![1])));
        assert_eq!(found("a.jsonl", "[1]\n{}\n"), Ok((Format::JsonLines, vec![1, 2])));
        assert!(found("a.csv", "one column\nx\n").unwrap_err().contains("[one column]"));
    }

    #[test]
    fn text_stays_text() {
        for text in [
            "{one}\n\ntwo\n",
            "{\"a\": 1}\nThat was an object.\nThis is about it.\n",
            "{ \"Well\": said he, and left.\nNothing more\nwas said.\n",
            "[Intro]\nla la\n",
            "[1, 2] is a list\n",
            "Hello, world\nHow, are you\n",
            "a,b\n",
            "Roses are red; violets are blue\nSugar is sweet; and so are you\n",
            "\u{feff}Text\n",
        ] {
            assert_eq!(found("a.txt", text), Ok((Format::Text, vec![])), "{text}");
        }
    }
}
