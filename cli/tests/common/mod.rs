//! Shared by tests of the command, with the library's devices and recorded models.

#![allow(dead_code, unused_imports, reason = "every test program uses its own part of this")]

pub mod hub;
#[path = "../../../tests/common/mod.rs"]
mod library;
pub mod run;

pub use library::*;
