//! Logits: cross-entropy with its gradient, and sampling.

pub mod cross_entropy;
pub mod linear_cross_entropy;
pub mod sample;
pub(crate) mod sample_cpu;
mod sampling;
