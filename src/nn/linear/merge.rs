//! Merging adapters into the base: W + s * B * A; for DoRA, each row times its factor c.

use ndarray::{Array2, Axis};

use super::layer::{AdaptedLinear, LoraLinear, Merged};
use crate::error::{Error, Result};
use crate::kernels::matrix::DeviceMatrix;
use crate::kernels::matrix::dequantize::{Delta, dequantize};
use crate::nn::adapter::LoraAdapter;
use crate::quant::HostMatrix;
use crate::quant::{DenseData, DenseMatrix};
use crate::tensor::Tensor;

const OP: &str = "merge";

/// Applies `apply` to each value of row i and the i-th factor.
fn each_row(values: &mut Array2<f32>, factor: Option<&[f32]>, apply: impl Fn(&mut f32, f32)) {
    for (mut row, &factor) in values.axis_iter_mut(Axis(0)).zip(factor.unwrap_or_default()) {
        row.iter_mut().for_each(|value| apply(value, factor));
    }
}

impl<Base> AdaptedLinear<Base> {
    /// Computes W + s * B * A of the active adapter on the layer's device, as f32 [d_out, d_in].
    /// This is what an export writes. With DoRA, the magnitude sets the rows' lengths.
    pub fn merge_to_f32(&self) -> Result<Array2<f32>> {
        let adapter = self.active_adapter().filter(|_| !self.is_merged());
        let mut values = dequantize(self.base(), adapter.map(LoraAdapter::delta))?;
        if adapter.is_some() {
            each_row(&mut values, self.row_factor()?.as_deref(), |value, factor| *value *= factor);
        }
        Ok(values)
    }

    fn row_factor(&self) -> Result<Option<Vec<f32>>> {
        self.dora_factor()?.map(|factor| factor.c.to_vec()).transpose()
    }
}

impl LoraLinear {
    /// Merges the active adapter into the base; afterwards the layer computes with the base alone.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no active adapter, one is already merged, or the merge
    /// couldn't be undone: the base isn't f32, or DoRA's factor for a row is zero or not finite
    /// (use [`AdaptedLinear::merge_to_f32`]).
    pub fn merge(&mut self) -> Result<()> {
        let adapter = self.active_adapter().cloned();
        let Some(adapter) = adapter.filter(|_| !self.is_merged()) else {
            let got = if self.is_merged() { "merged already" } else { "without an active adapter" };
            return Err(Error::invalid(OP, "the layer", got, "merge needs an active adapter that isn't merged yet"));
        };
        if !self.base.is_f32() {
            return Err(Error::invalid(
                OP,
                "the base",
                "not f32",
                "only an f32 base can be merged in place and unmerged",
            ));
        }
        let factor = self.row_factor()?;
        if factor.iter().flatten().any(|factor| *factor == 0.0 || !factor.is_finite()) {
            return Err(Error::invalid(
                OP,
                "DoRA's factor",
                "zero or not finite in a row",
                "the merge couldn't be undone",
            ));
        }
        let values = self.merge_to_f32()?;
        self.set_base(values)?;
        self.merged = Some(Merged { adapter, factor });
        Ok(())
    }

    /// Removes the merged adapter from the base, to within f32 rounding.
    ///
    /// # Errors
    /// [`Error::Invalid`] if no adapter is merged.
    pub fn unmerge(&mut self) -> Result<()> {
        let Some(Merged { adapter, factor }) = self.merged.clone() else {
            return Err(Error::invalid(OP, "the layer", "not merged", "unmerge needs a merged layer"));
        };
        // The base is c * (W + s * B * A). Subtract s * (c * B) * A, then divide by c.
        let mut b = adapter.b().to_array2()?;
        each_row(&mut b, factor.as_deref(), |value, factor| *value *= factor);
        let b = Tensor::from_array(&self.device(), &b)?;
        let mut values = dequantize(&self.base, Some(Delta { a: adapter.a(), b: &b, scale: -adapter.scale() }))?;
        each_row(&mut values, factor.as_deref(), |value, factor| *value /= factor);
        self.set_base(values)?;
        self.merged = None;
        Ok(())
    }

    fn set_base(&mut self, values: Array2<f32>) -> Result<()> {
        let (rows, cols) = values.dim();
        let base = DenseMatrix::new(rows, cols, DenseData::F32(values.into_raw_vec_and_offset().0))?;
        self.base = DeviceMatrix::new(&self.device(), HostMatrix::from(base))?;
        Ok(())
    }
}
