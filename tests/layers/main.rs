//! Adapted layers, on every device and tier.

#[path = "../common/mod.rs"]
mod common;

mod adapters;
mod backward;
mod seed_parity;
