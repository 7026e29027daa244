//! Training: recorded runs, memory plans, files of examples.

#[path = "../common/mod.rs"]
mod common;

mod data;
mod golden;
mod plan;
