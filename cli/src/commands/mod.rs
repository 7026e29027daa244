//! The subcommands: each has its arguments, with the text of its help, and `run`.

pub(super) mod bench;
pub(super) mod completions;
pub(super) mod data;
pub(super) mod demo;
pub(super) mod dequantize;
pub(super) mod devices;
pub(super) mod eval;
pub(super) mod export;
pub(super) mod finetune;
pub(super) mod generate;
pub(super) mod inspect;
pub(super) mod merge;
pub(super) mod plan;
pub(super) mod quantize;
