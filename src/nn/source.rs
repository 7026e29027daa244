//! Where a model's weights come from.

use crate::error::Result;
use crate::quant::HostMatrix;

/// A source of a model's tensors, by Hugging Face names.
pub trait WeightSource {
    /// Returns a vector as f32.
    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>>;

    /// Returns a matrix [rows, cols]. If `linear`, it belongs to a linear layer and may be made
    /// 4-bit; embeddings and heads keep their precision.
    fn matrix(&mut self, name: &str, rows: usize, cols: usize, linear: bool) -> Result<HostMatrix>;
}
