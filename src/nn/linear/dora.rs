//! DoRA (Liu et al., 2024) in a linear layer:
//!
//! | letter | meaning |
//! | --- | --- |
//! | n | row norms of W + s * B * A, `[d_out]` |
//! | c | factor m / n of the magnitude m, `[d_out]` |
//! | U | xd * W^T + s * H * B^T [M, d_out], with xd = dropout(x) and H = xd * A^T |
//!
//! As in PEFT, the factor applies to the base's product with xd, not x:
//! y = (x - xd) * W^T + bias + c * U. No gradient flows through n. With dU = c * dY, dm is the
//! column sums of (dY * U) / n; dA and dB are those of LoRA, with dU in place of dY.

use crate::error::{Error, Result};
use crate::kernels::elementwise::dropout::Dropout;
use crate::kernels::elementwise::dropout_mix::{Mix, dropout_mix};
use crate::kernels::elementwise::scale_columns::{divide_columns, scale_columns};
use crate::kernels::lora::dora_norm::dora_norm;
use crate::kernels::lora::down;
use crate::kernels::qmatmul::{Product, product, qmatmul};
use crate::kernels::rows::column_sum::column_sum;
use crate::kernels::{DeviceMatrix, LoraUp, RowFactors, Rows};
use crate::nn::adapter::LoraAdapter;
use crate::tensor::Tensor;

/// DoRA's factor for each output column.
#[derive(Clone)]
pub(super) struct DoraFactor {
    /// n, `[d_out]`.
    norm: Tensor,
    /// c = m / n, `[d_out]`.
    pub c: Tensor,
}

/// Values from the forward pass that the backward pass needs.
#[derive(Clone)]
pub(super) struct SavedDora {
    factor: DoraFactor,
    u: Tensor,
}

/// An adapter and its factor in a layer with this base and bias.
pub(super) struct DoraLayer<'a> {
    pub w: &'a DeviceMatrix,
    pub bias: Option<&'a Tensor>,
    pub adapter: &'a LoraAdapter,
    pub factor: &'a DoraFactor,
}

impl DoraFactor {
    /// Computes the factor of an adapter beside the base `w`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the adapter has no magnitude yet; errors of the device.
    pub fn new(w: &DeviceMatrix, adapter: &LoraAdapter) -> Result<DoraFactor> {
        let Some(magnitude) = adapter.magnitude() else {
            let got = "missing: the adapter was never added to this layer";
            return Err(Error::invalid("linear layer", "DoRA's magnitude", got, "add_adapter sets it"));
        };
        let norm = dora_norm(w, Some(adapter.delta()))?;
        Ok(DoraFactor { c: divide_columns(magnitude, &norm)?, norm })
    }
}

impl DoraLayer<'_> {
    /// Returns y, H and the values for the backward pass.
    pub fn forward(&self, x: Rows<'_>, dropout: Option<Dropout>) -> Result<(Tensor, Tensor, SavedDora)> {
        let (kept, kept_factors);
        let (xd, beside) = match dropout {
            None => (x, self.bias.cloned()),
            Some(dropout) => {
                let taken = dropout_mix(Mix::Rest(x.tensor), dropout)?;
                let beside = qmatmul(&taken, self.w, self.bias, None)?;
                (kept, kept_factors) = (dropout_mix(Mix::Kept(x.tensor), dropout)?, RowFactors::default());
                (Rows { tensor: &kept, factors: &kept_factors }, Some(beside))
            }
        };
        let h = down::of_rows(xd, self.adapter.a(), None)?;
        let up = LoraUp { h: &h, b: self.adapter.b(), scale: self.adapter.scale() };
        let u = product(xd, Product { w: self.w, bias: None, lora: Some(up) })?;
        let y = scale_columns(&u, &self.factor.c, beside.as_ref())?;
        Ok((y, h, SavedDora { factor: self.factor.clone(), u }))
    }
}

impl SavedDora {
    /// dU = c * dY.
    pub fn du(&self, dy: &Tensor) -> Result<Tensor> {
        scale_columns(dy, &self.factor.c, None)
    }

    /// dm, `[d_out]`.
    pub fn dmagnitude(&self, dy: &Tensor) -> Result<Tensor> {
        divide_columns(&column_sum(dy, Some(&self.u))?, &self.factor.norm)
    }
}
