//! Tokenizers and chats.

mod chat_masks;
mod limits;
mod tokenizer;
