//! GGUF files: metadata, tensors, configs, tokenizers, models.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(dead_code, unused_imports, reason = "the other targets use the rest")]
#[path = "../../tests/common/readers.rs"]
mod readers;

fuzz_target!(|bytes: &[u8]| drop(readers::gguf(bytes)));
