//! Models from files: recorded ones, a real one, and what users have.

#[path = "../common/mod.rs"]
mod common;

mod export;
mod files;
mod golden;
mod input;
mod smollm2;
