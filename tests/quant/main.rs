//! Quantization equals that of other libraries.

#[path = "../common/mod.rs"]
mod common;

mod bitsandbytes;
mod seed_parity;
