//! Files for other programs: models with an adapter merged into them, and adapters alone.
//!
//! | from | to | by |
//! |---|---|---|
//! | a model and an adapter | a Hugging Face directory | [`Merged::write_directory`] |
//! | a model and an adapter | a GGUF file | [`Merged::write_gguf`] |
//! | an adapter | a GGUF file of an adapter, as llama.cpp loads it | [`write_gguf_adapter`] |
//!
//! Adapters as PEFT has them are written by [`PeftAdapter`](crate::formats::peft::PeftAdapter).

mod adapter;
mod directory;
mod gguf;
mod merged;

pub use adapter::write_gguf_adapter;
pub use directory::{Companions, DirectoryOptions};
pub use merged::{Merged, Progress};
