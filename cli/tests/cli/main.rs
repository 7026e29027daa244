//! The command, as users run it.

#[path = "../common/mod.rs"]
mod common;

mod bad_input;
mod bench;
mod data;
mod export;
mod finetune;
mod global;
mod hardware;
mod hub;
mod inspect;
mod interop_files;
mod model;
mod output;
mod overview;
mod plan;
mod quantize;
mod resume;
mod smollm2;
