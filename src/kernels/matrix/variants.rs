//! Text constants of every kind of matrix, for the kernels' lists of variants.

use super::device_matrix::{dense_defines, quant_defines, wide};
use crate::device::Defines;
use crate::quant::Codebook;

/// Every way in which `shared/matrix.wgsl` can read a matrix.
pub(crate) fn matrices() -> Vec<Defines> {
    let count_up = Codebook(std::array::from_fn(|i| i as f32 - 8.0));
    let mut all = Vec::new();
    for ragged in [false, true] {
        for codebook in [&Codebook::NF4, &Codebook::INT4, &count_up] {
            all.push(quant_defines(codebook, "plain", "none", ragged));
        }
        all.push(quant_defines(&Codebook::FP4, "double", "none", ragged));
        all.push(quant_defines(&count_up, "plain", "plain", ragged));
        all.push(quant_defines(&count_up, "double", "double", ragged));
        all.extend(["f32", "f16", "bf16"].map(|kind| dense_defines(kind, ragged)));
    }
    all.push(dense_defines("q8_0", false));
    all
}

/// Every way in which hardware reads a matrix.
pub(crate) fn wide_matrices() -> Vec<Defines> {
    let chunks = |matrix: &Defines| matrix.label().starts_with("kind=quant") && !matrix.flag("ragged");
    let mut all: Vec<_> = matrices().into_iter().map(|matrix| (chunks(&matrix), matrix)).collect();
    // Rows of whole words, with blocks that cut the chunks of 32.
    all.extend(
        all.iter().filter(|(chunked, _)| *chunked).map(|(_, matrix)| (false, matrix.clone())).collect::<Vec<_>>(),
    );
    all.into_iter().map(|(chunked, matrix)| wide(matrix, chunked)).collect()
}
