//! Shared by integration tests.

#![allow(dead_code, unused_imports, reason = "every test program uses its own part of this")]

mod devices;
pub mod model;
pub mod seed;
pub mod tolerances;

pub use devices::*;
