//! Text to token ids and back: tokenizers and chat templates.
//!
//! ```no_run
//! use qlora_wgpu::text::{Conversation, Message, Tokenizer};
//!
//! # fn main() -> qlora_wgpu::Result<()> {
//! let tokenizer = Tokenizer::from_dir("path/to/model")?;
//! let ids = tokenizer.encode("The capital of France is", true)?;
//! assert_eq!(tokenizer.decode(&ids, true)?, "The capital of France is");
//!
//! let chat = Conversation::from(vec![Message::new("user", "What is the capital of France?")]);
//! let prompt = tokenizer.chat()?.render(&chat, true, tokenizer.bos_text(), tokenizer.eos_text())?;
//! let ids = tokenizer.encode(&prompt, false)?; // the template writes the special tokens itself
//! # Ok(())
//! # }
//! ```

mod added;
mod bounds;
mod chat;
mod gguf_tokenizer;
mod gguf_write;
mod guard;
mod instrument;
mod jinja;
mod long;
mod marks;
mod panics;
mod pretokenizer;
mod python;
mod steps;
mod tokenizer;
mod tokenizer_write;

pub use chat::{ChatTemplate, Conversation, Message};
pub(crate) use chat::{usual_role, written_out};
pub(crate) use marks::{Rendered, Speaker};
pub use tokenizer::{DecodeStream, Tokenizer};
