//! `qlora generate`: text from a model.

use std::io::{IsTerminal, Write, stdout};
use std::ops::ControlFlow;
use std::time::Instant;

use clap::Args;

use super::model::AdaptedArgs;
use crate::error::{Error, Result};
use crate::generate::{Sampler, Sampling, generate};
use crate::text::Message;

/// Continues a prompt, token by token.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    qlora generate --model model.gguf --chat --prompt 'What is the capital of France?'\n  \
    qlora generate --model DIR --adapter ADAPTER --prompt 'Once upon a time' --temperature 0.8 --top-p 0.95")]
pub struct GenerateArgs {
    #[command(flatten)]
    model: AdaptedArgs,
    /// The text to continue; with --chat, the user's message.
    #[arg(long)]
    prompt: String,
    /// Put the prompt into the model's chat template.
    #[arg(long)]
    chat: bool,
    /// A system message before it; needs --chat.
    #[arg(long, requires = "chat")]
    system: Option<String>,
    /// The most tokens to answer.
    #[arg(long, default_value_t = 128)]
    max_tokens: usize,
    /// 0 takes the likeliest token, always.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f32,
    /// Only so many of the likeliest tokens; 0: all.
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Only the likeliest tokens that together have this probability.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f32,
    /// The same seed chooses the same tokens.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Ends the answer where this text comes; may be given several times.
    #[arg(long)]
    stop: Vec<String>,
    /// Print tokens per second to stderr at the end.
    #[arg(long)]
    stats: bool,
}

pub fn run(args: &GenerateArgs) -> Result<()> {
    let sampling = Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    let mut sampler = Sampler::new(sampling)?;
    let path = args.model.model.path()?;
    let model = args.model.load(&path)?;
    let tokenizer = args.model.model.tokenizer(&path, model.config().vocab_size)?;
    let prompt = if args.chat {
        let system = args.system.iter().map(|text| Message::new("system", text));
        let messages: Vec<Message> = system.chain([Message::new("user", &args.prompt)]).collect();
        // The template writes the special tokens itself.
        let text = tokenizer.chat()?.render(&messages, true, tokenizer.bos_text(), tokenizer.eos_text())?;
        tokenizer.encode(&text, false)?
    } else {
        tokenizer.encode(&args.prompt, true)?
    };

    let mut stream = tokenizer.decode_stream(true);
    let mut text = Printer { held: String::new(), stopped: false, stop: &args.stop };
    let mut failed = None;
    let start = Instant::now();
    let mut first = None;
    let answer = generate(&model, &prompt, args.max_tokens, &mut sampler, tokenizer.eos_ids(), |token| {
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
    text.finish(&stream.finish()?)?;
    if args.stats {
        let (first, all) = (first.unwrap_or_default().as_secs_f64(), start.elapsed().as_secs_f64());
        eprintln!(
            "prompt: {} tokens, {:.1} tokens/s; answer: {} tokens, {:.1} tokens/s",
            prompt.len(),
            prompt.len() as f64 / first,
            answer.len(),
            answer.len().saturating_sub(1) as f64 / (all - first).max(f64::MIN_POSITIVE),
        );
    }
    Ok(())
}

/// Prints text as it comes, but holds back what may become a stop string.
struct Printer<'a> {
    held: String,
    /// A stop string came.
    stopped: bool,
    stop: &'a [String],
}

impl Printer<'_> {
    fn push(&mut self, piece: &str) -> Result<ControlFlow<()>> {
        self.held.push_str(piece);
        if let Some(at) = self.stop.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            print(&self.held[..at])?;
            self.stopped = true;
            return Ok(ControlFlow::Break(()));
        }
        let safe = self.held.len() - self.pending();
        let rest = self.held.split_off(safe);
        print(&std::mem::replace(&mut self.held, rest))?;
        Ok(ControlFlow::Continue(()))
    }

    /// Bytes at the end that are the start of a stop string.
    fn pending(&self) -> usize {
        let start_of = |stop: &String| {
            stop.char_indices().map(|(at, _)| at).filter(|&at| at > 0 && self.held.ends_with(&stop[..at])).max()
        };
        self.stop.iter().filter_map(start_of).max().unwrap_or(0)
    }

    /// Prints what was held back, and what came last.
    fn finish(mut self, piece: &str) -> Result<()> {
        if !self.stopped && self.push(piece)?.is_continue() {
            print(&self.held)?;
        }
        print("\n")
    }
}

fn print(text: &str) -> Result<()> {
    let mut out = stdout();
    let written = out.write_all(text.as_bytes()).and_then(|()| if out.is_terminal() { out.flush() } else { Ok(()) });
    match written {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::Io { path: "standard output".into(), message: error.to_string() })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_become_a_stop_string_is_held_back() {
        let stop = ["END".to_owned(), "stop".to_owned()];
        let mut printer = Printer { held: String::new(), stopped: false, stop: &stop };
        assert!(printer.push("a EN").unwrap().is_continue());
        assert_eq!(printer.held, "EN");
        assert!(printer.push("X sto").unwrap().is_continue());
        assert_eq!(printer.held, "sto");
        assert!(printer.push("p and on").unwrap().is_break());
        assert!(printer.stopped);
    }
}
