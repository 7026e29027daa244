//! `qlora data`: shows training examples, and which tokens carry loss.

use std::collections::BTreeMap;
use std::io::stdout;
use std::path::PathBuf;

use anstream::{AutoStream, ColorChoice};
use clap::builder::styling::{AnsiColor, Style};
use clap::{Args, ValueHint};
use indicatif::HumanCount;
use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::internal::is_hidden;
use qlora_wgpu::nn::IGNORE_LABEL;
use qlora_wgpu::text::Tokenizer;
use qlora_wgpu::train::data::Example;
use serde::Serialize;

use crate::dataset::{check, read};
use crate::model::ModelArgs;
use crate::output::{print, print_json};

/// Shows training examples as the model gets them, and which tokens carry loss.
///
/// Tokens with loss are green, or between ⟦ and ⟧ without colours. Special tokens are shown, and
/// line breaks appear as \n. Counts are for the whole file.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    qlora data train.jsonl --model model.gguf\n  \
    qlora data train.jsonl --model DIR --example 7\n  \
    qlora data - --model DIR --limit 100 --json")]
pub struct DataArgs {
    /// JSON Lines, a JSON list, comma- or tab-separated values, or plain text; - for standard
    /// input.
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    data: PathBuf,
    /// The model whose tokenizer and chat template to use: a directory, a .gguf file, or an id on
    /// the hub.
    #[arg(long, value_name = "PATH|ID", value_hint = ValueHint::AnyPath)]
    model: PathBuf,
    /// Skip lines that can't be read, and count them.
    #[arg(long)]
    skip_bad_lines: bool,
    /// Examples to show, each with its start and end.
    #[arg(long, value_name = "N", default_value_t = 3, conflicts_with = "example")]
    limit: usize,
    /// Show this example in full, counted from 1.
    #[arg(long, value_name = "N")]
    example: Option<usize>,
    /// Print JSON: path, format, examples, tokens, label_tokens, bad_lines, passed_over (ignored
    /// keys with counts), shown: example, tokens, label_tokens, ids, labels (-100 for none), parts
    /// (text, loss). For text without lines, only the first 1000 tokens are shown, unless
    /// --example asks for it.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    path: String,
    format: String,
    examples: usize,
    tokens: usize,
    label_tokens: usize,
    bad_lines: usize,
    passed_over: BTreeMap<&'static str, usize>,
    shown: Vec<Shown>,
}

#[derive(Serialize)]
struct Shown {
    /// Counted from 1.
    example: usize,
    tokens: usize,
    label_tokens: usize,
    ids: Vec<u32>,
    labels: Vec<i64>,
    parts: Vec<Part>,
}

/// Text of consecutive tokens that all carry loss, or all don't.
#[derive(Serialize, Debug, PartialEq)]
struct Part {
    text: String,
    loss: bool,
}

pub fn run(args: &DataArgs) -> Result<()> {
    check([args.data.as_path()])?;
    let files = ModelArgs::of(args.model.clone()).open()?;
    let (vocabulary, tokenizer) = (files.vocab_size()?, files.tokenizer());
    let data = read(&args.data, tokenizer.as_ref(), args.skip_bad_lines, vocabulary)?;

    let count = data.examples.len();
    let (first, shown) = match args.example {
        Some(number) if (1..=count).contains(&number) => (number, 1),
        Some(number) => {
            let expected = format!("there are {count}, counted from 1");
            return Err(Error::invalid("data", "--example", number, expected));
        }
        None => (1, args.limit),
    };
    let most = if data.continuous && args.example.is_none() { TEXT_TOKENS } else { usize::MAX };
    let show = |(number, example)| Shown::new(number, example, tokenizer.as_ref().ok(), most);
    let report = Report {
        path: args.data.display().to_string(),
        format: data.format.to_string(),
        examples: count,
        tokens: data.examples.iter().map(|example| example.ids().len()).sum(),
        label_tokens: data.examples.iter().map(Example::label_tokens).sum(),
        bad_lines: data.bad_lines,
        passed_over: data.passed_over.iter().copied().collect(),
        shown: (1..).zip(&data.examples).skip(first - 1).take(shown).map(show).collect::<Result<_>>()?,
    };
    if args.json {
        return print_json(&report);
    }
    let view = View { colors: AutoStream::choice(&stdout()) != ColorChoice::Never, whole: args.example.is_some() };
    print(&view.text(&report)).map(drop)
}

/// Tokens shown of text without lines.
const TEXT_TOKENS: usize = 1000;

impl Shown {
    fn new(number: usize, example: &Example, tokenizer: Option<&Tokenizer>, most: usize) -> Result<Shown> {
        let ids: Vec<u32> = example.ids().iter().copied().take(most).collect();
        let labels: Vec<i64> = example.labels().take(most).collect();
        // The first token has no predecessor that predicts it.
        let loss = labels.iter().enumerate().map(|(at, &label)| at > 0 && label != IGNORE_LABEL);
        let parts = parts(&ids, loss, tokenizer)?;
        let tokens = example.ids().len();
        Ok(Shown { example: number, tokens, label_tokens: example.label_tokens(), ids, labels, parts })
    }
}

/// The text for ids; without a tokenizer, the ids themselves.
fn parts(ids: &[u32], loss: impl Iterator<Item = bool>, tokenizer: Option<&Tokenizer>) -> Result<Vec<Part>> {
    let mut parts: Vec<Part> = Vec::new();
    let mut stream = tokenizer.map(|tokenizer| (tokenizer.vocab_size(), tokenizer.decode_stream(false)));
    for (&id, loss) in ids.iter().zip(loss) {
        let text = match &mut stream {
            Some((size, stream)) if (id as usize) < *size => stream.push(id)?,
            // The model has this id, the tokenizer doesn't.
            Some(_) => format!("<{id}>"),
            None => format!("{id} "),
        };
        match parts.last_mut() {
            Some(part) if part.loss == loss => part.text.push_str(&text),
            _ => parts.push(Part { text, loss }),
        }
    }
    if let (Some((_, stream)), Some(last)) = (stream, parts.last_mut()) {
        last.text.push_str(&stream.finish()?);
    }
    Ok(parts)
}

/// Options for showing examples to people.
struct View {
    /// Colours instead of brackets.
    colors: bool,
    /// Show all of an example, with its line breaks; otherwise only its start and end.
    whole: bool,
}

impl View {
    /// Maximum characters of a shortened example. Three of them, with their headings, fill most of
    /// a small screen.
    const MOST: usize = 400;

    fn text(&self, report: &Report) -> String {
        let count = |count: usize| HumanCount(count as u64).to_string();
        let marks = if self.colors { "" } else { ", between ⟦ and ⟧" };
        let mut text = format!(
            "{}: {}, {} examples, {} tokens; {} carry loss{marks}\n",
            report.path,
            report.format,
            count(report.examples),
            count(report.tokens),
            count(report.label_tokens)
        );
        for shown in &report.shown {
            text += &format!(
                "\nexample {}: {} tokens, {} carry loss\n",
                shown.example,
                count(shown.tokens),
                count(shown.label_tokens)
            );
            let all = shown.parts.iter().map(|part| (self.visible(&part.text), part.loss)).collect();
            let parts = if self.whole { all } else { shortened(all, View::MOST) };
            parts.iter().for_each(|(part, loss)| text += &self.marked(part, *loss));
            text.push('\n');
        }
        text
    }

    fn marked(&self, text: &str, loss: bool) -> String {
        let style: Style = AnsiColor::Green.on_default().bold();
        match (loss, self.colors) {
            (false, _) => text.to_owned(),
            (true, true) => format!("{style}{text}{style:#}"),
            (true, false) => format!("⟦{text}⟧"),
        }
    }

    /// The text with characters escaped that a terminal wouldn't show, or that look like a
    /// bracket.
    fn visible(&self, text: &str) -> String {
        let mut visible = String::with_capacity(text.len());
        for c in text.chars() {
            match c {
                '\n' if self.whole => visible.push_str("\\n\n"),
                '\n' | '\r' | '\t' => visible.extend(c.escape_default()),
                '⟦' | '⟧' if !self.colors => visible.extend(c.escape_unicode()),
                c if is_hidden(c) => visible.extend(c.escape_unicode()),
                c => visible.push(c),
            }
        }
        visible
    }
}

/// Shortens parts to about `most` characters together: long parts lose their middle, and so does a
/// long list of parts.
fn shortened(parts: Vec<(String, bool)>, most: usize) -> Vec<(String, bool)> {
    const GAP: &str = " … ";
    let count = |text: &str| text.chars().count();
    if parts.iter().map(|(text, _)| count(text)).sum::<usize>() <= most {
        return parts;
    }
    let each = (most / parts.len()).max(most / 8);
    let short = |(text, loss): (String, bool)| {
        if count(&text) <= each {
            return (text, loss);
        }
        let room = each - GAP.chars().count();
        let start: String = text.chars().take(room * 2 / 3).collect();
        let end: String = text.chars().skip(count(&text) - room / 3).collect();
        (format!("{start}{GAP}{end}"), loss)
    };
    let mut parts: Vec<(String, bool)> = parts.into_iter().map(short).collect();
    let room = |parts: &mut dyn Iterator<Item = &(String, bool)>| {
        let mut sum = 0;
        parts.take_while(|(text, _)| (sum += count(text), sum <= most / 2).1).count()
    };
    let (first, last) = (room(&mut parts.iter()), room(&mut parts.iter().rev()));
    if first + last < parts.len() {
        parts.splice(first..parts.len() - last, [(GAP.to_owned(), false)]);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(text: &str, loss: bool) -> Part {
        Part { text: text.into(), loss }
    }

    fn report(parts: Vec<Part>) -> Report {
        let shown = Shown { example: 1, tokens: 9, label_tokens: 4, ids: vec![], labels: vec![], parts };
        Report {
            path: "a.jsonl".into(),
            format: "JSON Lines".into(),
            examples: 1,
            tokens: 1234,
            label_tokens: 4,
            bad_lines: 0,
            passed_over: BTreeMap::new(),
            shown: vec![shown],
        }
    }

    #[test]
    fn tokens_with_loss_are_marked_and_text_cannot_look_like_a_mark() {
        let report = report(vec![part("<|user|>a\u{1b}[2J⟦\n", false), part("b\tc", true)]);
        let plain = View { colors: false, whole: false }.text(&report);
        let wanted = "a.jsonl: JSON Lines, 1 examples, 1,234 tokens; 4 carry loss, between ⟦ and ⟧\n\n\
            example 1: 9 tokens, 4 carry loss\n<|user|>a\\u{1b}[2J\\u{27e6}\\n⟦b\\tc⟧\n";
        assert_eq!(plain, wanted);
        let colored = View { colors: true, whole: true }.text(&report);
        assert!(colored.contains("a\\u{1b}[2J⟦\\n\n\u{1b}[1m\u{1b}[32mb\\tc\u{1b}[0m\n"), "{colored:?}");
    }

    #[test]
    fn a_long_example_loses_its_middle() {
        let long = "é".repeat(5000);
        let many: Vec<Part> = (0..300).map(|i| part(if i == 299 { "last" } else { &long }, i % 2 == 1)).collect();
        for parts in [vec![part(&long, false), part(&long, true)], many] {
            let report = report(parts);
            let text = View { colors: false, whole: false }.text(&report);
            assert!(text.chars().count() < 700, "{text}");
            assert!(text.contains('…') && text.ends_with("⟧\n"), "{text}");
            assert!(View { colors: false, whole: true }.text(&report).len() > 10_000);
        }
    }
}
