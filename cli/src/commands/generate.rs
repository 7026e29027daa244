//! `qlora generate`: generates text.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::time::Instant;

use clap::Args;
use qlora_wgpu::error::Result;
use qlora_wgpu::generate::{Sampler, Sampling, generate};
use qlora_wgpu::internal::lines;
use qlora_wgpu::nn::Decoder;
use qlora_wgpu::text::{Conversation, Message, Tokenizer};
use serde::Serialize;

use crate::model::{AdaptedArgs, With, label, print_all, switch};
use crate::output::{self, print};

/// Continues a prompt, token by token.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    qlora generate --model model.gguf --chat --prompt 'What is the capital of France?'\n  \
    qlora generate --model DIR --adapter ADAPTER --prompt 'Once upon a time' --temperature 0.8 --top-p 0.95\n  \
    qlora generate --model DIR --adapter formal=DIR1 --adapter brief=DIR2 --use formal --use brief --prompt 'Dear Sir'")]
pub struct GenerateArgs {
    #[command(flatten)]
    model: AdaptedArgs,
    /// The text to continue; with --chat, the user's message.
    #[arg(long, allow_hyphen_values = true)]
    prompt: String,
    /// Apply the model's chat template to the prompt.
    #[arg(long)]
    chat: bool,
    /// System message before the prompt; needs --chat.
    #[arg(long, requires = "chat", allow_hyphen_values = true)]
    system: Option<String>,
    /// Maximum tokens to generate.
    #[arg(long, default_value_t = 128)]
    max_tokens: usize,
    /// Sampling temperature; 0 always takes the likeliest token.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f32,
    /// Sample from the N likeliest tokens; 0: all.
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Sample from the likeliest tokens that together have this probability.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f32,
    /// The same seed gives the same tokens.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Stop at this text; may be repeated.
    #[arg(long, allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Print tokens per second to stderr at the end.
    #[arg(long)]
    stats: bool,
    /// Print JSON at the end: adapter, text, end (eos, stop or length), prompt_tokens, tokens,
    /// prompt_tokens_per_second, tokens_per_second; an array of these with several --use.
    #[arg(long)]
    json: bool,
}

/// Generated text, and speed.
#[derive(Serialize)]
struct Report {
    text: String,
    end: End,
    prompt_tokens: usize,
    /// Tokens of the answer.
    tokens: usize,
    prompt_tokens_per_second: f64,
    /// Speed after the first token, which the prompt's pass computes.
    tokens_per_second: f64,
}

/// Why generation ended.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum End {
    /// The model produced an end-of-text token.
    Eos,
    /// A `--stop` text came, or the output's reader is gone.
    Stop,
    /// The answer has the maximum number of tokens.
    Length,
}

pub fn run(args: &GenerateArgs) -> Result<()> {
    let sampling = Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    let sampler = Sampler::new(sampling)?;
    let files = args.model.model.open()?;
    let (mut model, uses) = args.model.load(&files)?;
    let tokenizer = files.tokenizer()?;
    let prompt = if args.chat {
        let system = args.system.iter().map(|text| Message::new("system", text));
        let messages: Vec<Message> = system.chain([Message::new("user", &args.prompt)]).collect();
        // The template adds special tokens itself.
        let chat = Conversation::from(messages);
        let text = tokenizer.chat()?.render(&chat, true, tokenizer.bos_text(), tokenizer.eos_text())?;
        tokenizer.encode(&text, false)?
    } else {
        tokenizer.encode(&args.prompt, true)?
    };

    let mut reports = Vec::with_capacity(uses.len());
    for &adapter in &uses {
        switch(&mut model, adapter)?;
        if uses.len() > 1 && !args.json && print(&format!("{}: ", label(adapter)))?.is_break() {
            break;
        }
        reports.push(With::new(adapter, answer(args, &model, &tokenizer, &prompt, sampler.clone())?));
    }
    if args.json { print_all(&reports) } else { Ok(()) }
}

/// Continues the prompt with the active adapter. Prints text as it comes, unless JSON is
/// requested.
fn answer(
    args: &GenerateArgs,
    model: &Decoder,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    mut sampler: Sampler,
) -> Result<Report> {
    let mut stream = tokenizer.decode_stream(true);
    let mut text = Printer { held: String::new(), stopped: false, stop: &args.stop, kept: args.json.then(String::new) };
    let mut failed = None;
    let start = Instant::now();
    let mut first = None;
    let answer = generate(model, prompt, args.max_tokens, &mut sampler, tokenizer.eos_ids(), |token| {
        first.get_or_insert_with(|| start.elapsed());
        match stream.push(token).and_then(|piece| text.push(&piece)) {
            Ok(flow) => flow,
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        }
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    let (first, all) = (first.unwrap_or_default().as_secs_f64(), start.elapsed().as_secs_f64());
    let most = args.max_tokens.min(model.config().max_position_embeddings - prompt.len());
    let (stopped, text) = text.finish(&stream.finish()?)?;
    let report = Report {
        text: text.unwrap_or_default(),
        end: match stopped {
            true => End::Stop,
            false if answer.len() < most => End::Eos,
            false => End::Length,
        },
        prompt_tokens: prompt.len(),
        tokens: answer.len(),
        prompt_tokens_per_second: prompt.len() as f64 / first.max(f64::MIN_POSITIVE),
        tokens_per_second: answer.len().saturating_sub(1) as f64 / (all - first).max(f64::MIN_POSITIVE),
    };
    if args.stats {
        output::fact(format!(
            "prompt: {} tokens, {:.1} tokens/s; answer: {} tokens, {:.1} tokens/s",
            report.prompt_tokens, report.prompt_tokens_per_second, report.tokens, report.tokens_per_second
        ));
    }
    Ok(report)
}

/// Prints or collects text as it comes, but holds back the possible start of a stop string.
struct Printer<'a> {
    held: String,
    /// Whether a stop string came or the output's reader is gone.
    stopped: bool,
    stop: &'a [String],
    /// The whole text, if it is collected instead of printed.
    kept: Option<String>,
}

impl Printer<'_> {
    fn push(&mut self, piece: &str) -> Result<ControlFlow<()>> {
        self.held.push_str(piece);
        if let Some(at) = self.stop.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            let _ = self.release(at)?;
            self.stopped = true;
            return Ok(ControlFlow::Break(()));
        }
        self.release(self.held.len() - self.pending())
    }

    /// Bytes at the end of the held text that may start a stop string.
    fn pending(&self) -> usize {
        let start_of = |stop: &String| {
            stop.char_indices().map(|(at, _)| at).filter(|&at| at > 0 && self.held.ends_with(&stop[..at])).max()
        };
        self.stop.iter().filter_map(start_of).max().unwrap_or(0)
    }

    /// Releases the first `len` bytes of the held text.
    fn release(&mut self, len: usize) -> Result<ControlFlow<()>> {
        let rest = self.held.split_off(len);
        let text = std::mem::replace(&mut self.held, rest);
        match &mut self.kept {
            Some(kept) => kept.push_str(&text),
            // A terminal would act on control characters, so escape them.
            None if std::io::stdout().is_terminal() => self.stopped = print(&lines(&text))?.is_break(),
            None => self.stopped = print(&text)?.is_break(),
        }
        Ok(if self.stopped { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    /// Releases the held text and the last `piece`. Returns whether generation was stopped, and
    /// the collected text.
    fn finish(mut self, piece: &str) -> Result<(bool, Option<String>)> {
        if !self.stopped && self.push(piece)?.is_continue() {
            let _ = self.release(self.held.len())?;
        }
        if self.kept.is_none() {
            let _ = print("\n")?;
        }
        Ok((self.stopped, self.kept))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_become_a_stop_string_is_held_back() {
        let stop = ["END".to_owned(), "stop".to_owned()];
        let mut printer = Printer { held: String::new(), stopped: false, stop: &stop, kept: Some(String::new()) };
        assert!(printer.push("a EN").unwrap().is_continue());
        assert_eq!(printer.held, "EN");
        assert!(printer.push("X sto").unwrap().is_continue());
        assert_eq!(printer.held, "sto");
        assert!(printer.push("p and on").unwrap().is_break());
        assert_eq!(printer.finish("").unwrap(), (true, Some("a ENX ".into())));
    }
}
