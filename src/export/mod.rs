//! Files for other programs: models with a merged adapter, and adapters alone.
//!
//! | from | to | by |
//! |---|---|---|
//! | a model and an adapter | a Hugging Face directory | [`Merged::write_directory`] |
//! | a model and an adapter | a GGUF file | [`Merged::write_gguf`] |
//! | an adapter | a GGUF adapter for llama.cpp | [`write_gguf_adapter`] |
//!
//! [`PeftAdapter`](crate::formats::peft::PeftAdapter) writes adapters in PEFT's format.

mod adapter;
mod directory;
mod gguf;
mod merged;

pub use crate::formats::gguf::TensorType;
pub use adapter::write_gguf_adapter;
pub use directory::{Companions, DirectoryOptions};
pub use merged::{Merged, Progress};
