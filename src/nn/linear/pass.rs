//! Forward and backward passes of a linear layer, usable without a tape.
//!
//! | letter | meaning |
//! | --- | --- |
//! | x | input [M, d_in], xd = dropout(x) |
//! | H | xd * A^T [M, r] |
//!
//! LoRA: y = x * W^T + bias + s * H * B^T. Given dY, the gradients are G = s * dY * B,
//! dA = G^T * xd, dB = s * dY^T * H and dX = dY * W + mask * (G * A).
//!
//! With DoRA (`dora.rs`), dU takes the place of dY, except in
//! dX = (1 - mask) * (dY * W) + mask * (dU * W + G * A).

use ndarray::{Array2, ArrayView2};

use super::dora::{DoraLayer, SavedDora};
use super::layer::AdaptedLinear;
use crate::error::Result;
use crate::kernels::elementwise::add_assign;
use crate::kernels::elementwise::dropout::Dropout;
use crate::kernels::elementwise::dropout_mix::{Mix, dropout_mix};
use crate::kernels::lora::down::lora_down_all;
use crate::kernels::lora::{dh, dw};
use crate::kernels::qmatmul::dx::{self, LoraDx, qmatmul_dx};
use crate::kernels::qmatmul::{Product, product};
use crate::kernels::rows::column_sum::column_sum;
use crate::kernels::{LoraUp, RowFactors, Rows, expect_shape};
use crate::nn::adapter::LoraAdapter;
use crate::tensor::Tensor;

const OP: &str = "linear layer's backward";

/// Values from the forward pass that [`AdaptedLinear::backward`] needs. Shares the input and the
/// adapter's values; while this lives, an optimizer that updates them in place has to copy them.
#[derive(Clone)]
pub struct Saved {
    rows: usize,
    adapted: Option<SavedAdapter>,
}

#[derive(Clone)]
struct SavedAdapter {
    adapter: LoraAdapter,
    dropout: Option<Dropout>,
    x: Tensor,
    /// Factors of x, shared by all layers that read x.
    x_factors: RowFactors,
    h: Tensor,
    dora: Option<SavedDora>,
}

/// Gradients of a layer's input and of its trained tensors. The frozen base has none.
#[derive(Clone, Debug, Default)]
pub struct LinearGrads {
    /// For the input, [M, d_in], if asked for.
    pub dx: Option<Tensor>,
    /// For A, [r, d_in], if an adapter is active.
    pub da: Option<Tensor>,
    /// For B, [d_out, r], if an adapter is active.
    pub db: Option<Tensor>,
    /// For DoRA's magnitude, `[d_out]`, if the active adapter has one.
    pub dmagnitude: Option<Tensor>,
    /// For the bias, `[d_out]`, if it is trained.
    pub dbias: Option<Tensor>,
}

impl<Base> AdaptedLinear<Base> {
    /// Computes Y [M, d_out] from X [M, d_in], without dropout.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape),
    /// [`Error::DeviceMismatch`](crate::Error::DeviceMismatch), and errors of the device.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, None).map(|(y, _)| y)
    }

    /// Like [`AdaptedLinear::forward`], from host memory to host memory.
    pub fn forward_array(&self, x: ArrayView2<'_, f32>) -> Result<Array2<f32>> {
        self.forward(&Tensor::from_array(&self.device(), &x)?)?.to_array2()
    }

    /// Like [`AdaptedLinear::forward`], with the active adapter's dropout; also returns what the
    /// backward pass needs. The same seed drops the same values on every device.
    ///
    /// # Errors
    /// Same as [`AdaptedLinear::forward`]; [`Error::Invalid`](crate::Error::Invalid) while an
    /// adapter is merged into the base.
    pub fn forward_train(&self, x: &Tensor, seed: u64) -> Result<(Tensor, Saved)> {
        self.check_unmerged("a training pass")?;
        self.run(x, self.dropout(seed))
    }

    /// The active adapter's dropout, if its probability isn't 0.
    pub(super) fn dropout(&self, seed: u64) -> Option<Dropout> {
        let probability = self.active_adapter().map_or(0.0, LoraAdapter::dropout);
        (probability > 0.0).then_some(Dropout { probability, seed })
    }

    /// Computes the gradients from dY [M, d_out] and the result of
    /// [`AdaptedLinear::forward_train`]. The input's gradient is computed only if `need_dx`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape),
    /// [`Error::DeviceMismatch`](crate::Error::DeviceMismatch), and errors of the device.
    pub fn backward(&self, dy: &Tensor, saved: &Saved, need_dx: bool) -> Result<LinearGrads> {
        self.backward_onto(None, dy, saved, need_dx)
    }

    /// Like [`AdaptedLinear::backward`], but adds the input's gradient to `sum`, the part from
    /// other users of the input.
    pub(super) fn backward_onto(
        &self,
        sum: Option<Tensor>,
        dy: &Tensor,
        saved: &Saved,
        need_dx: bool,
    ) -> Result<LinearGrads> {
        expect_shape(OP, "dY", dy, &[saved.rows, self.d_out()])?;
        let dbias = self.trained_bias().map(|_| column_sum(dy, None)).transpose()?;
        let Some(SavedAdapter { adapter, dropout, x, x_factors, h, dora }) = &saved.adapted else {
            let rows = Rows { tensor: dy, factors: &RowFactors::default() };
            let dx = need_dx.then(|| dx::onto(sum, rows, self.base(), None)).transpose()?;
            return Ok(LinearGrads { dx, dbias, ..LinearGrads::default() });
        };
        let (a, b, s) = (adapter.a(), adapter.b(), adapter.scale());
        // Gradient of the value that the adapter is added to: dU for DoRA, otherwise dY.
        let du = match dora {
            Some(dora) => &dora.du(dy)?,
            None => dy,
        };
        let du_factors = RowFactors::default();
        let du = Rows { tensor: du, factors: &du_factors };
        let g = dh::of_rows(du, b, s)?;
        let of_u = |sum, dropout| dx::onto(sum, du, self.base(), Some(LoraDx { g: &g, a, dropout }));
        let dx = match (dora, dropout) {
            _ if !need_dx => None,
            (Some(_), Some(dropout)) => {
                let kept = of_u(None, None)?;
                let dx = dropout_mix(Mix::Both(&kept, &qmatmul_dx(dy, self.base(), None)?), *dropout)?;
                Some(add_assign::finish(sum, dx)?)
            }
            _ => Some(of_u(sum, *dropout)?),
        };
        let da = dw::of_a(&g, Rows { tensor: x, factors: x_factors }, *dropout)?;
        let db = dw::of_b(du, h, s)?;
        let dmagnitude = dora.as_ref().map(|dora| dora.dmagnitude(dy)).transpose()?;
        Ok(LinearGrads { dx, da: Some(da), db: Some(db), dmagnitude, dbias })
    }

    /// Returns y for x, and what the backward pass needs.
    fn run(&self, x: &Tensor, dropout: Option<Dropout>) -> Result<(Tensor, Saved)> {
        let [result] = run_all([self], x, [dropout], [None])?;
        Ok(result)
    }

    /// Whether the layer's product can add a residual. A residual takes the bias's place, and DoRA
    /// would scale it.
    pub(super) fn adds_residuals(&self) -> bool {
        self.bias().is_none() && self.adapter_beside().is_none_or(|adapter| !adapter.is_dora())
    }

    /// The active adapter, unless it is merged into the base.
    fn adapter_beside(&self) -> Option<&LoraAdapter> {
        self.active_adapter().filter(|_| !self.is_merged())
    }
}

/// Like [`AdaptedLinear::run`], for several layers that read the same x. It is staged once for all
/// of them, and one pass over it computes H for all. Residuals [M, d_out] are only for layers that
/// can add them ([`AdaptedLinear::adds_residuals`]).
pub(super) fn run_all<Base, const N: usize>(
    layers: [&AdaptedLinear<Base>; N],
    x: &Tensor,
    dropouts: [Option<Dropout>; N],
    residuals: [Option<&Tensor>; N],
) -> Result<[(Tensor, Saved); N]> {
    // A DoRA adapter isn't part of the product.
    let plain = |layer: &'_ AdaptedLinear<Base>| layer.adapter_beside().filter(|adapter| !adapter.is_dora()).cloned();
    let adapters = layers.map(plain);
    let downs: Vec<_> = adapters
        .iter()
        .zip(dropouts)
        .filter_map(|(adapter, dropout)| adapter.as_ref().map(|adapter| (adapter.a(), dropout)))
        .collect();
    let x_factors = RowFactors::default();
    let rows = Rows { tensor: x, factors: &x_factors };
    let mut hs = lora_down_all(rows, &downs)?.into_iter();
    let mut results = Vec::with_capacity(N);
    let beside = dropouts.into_iter().zip(residuals);
    for ((layer, adapter), (dropout, residual)) in layers.into_iter().zip(adapters).zip(beside) {
        let saved = |adapter, h, dora| {
            let (x, x_factors) = (x.clone(), x_factors.without_rows());
            SavedAdapter { adapter, dropout, x, x_factors, h, dora }
        };
        let (y, adapted) = if let (Some(adapter), Some(factor)) = (layer.adapter_beside(), layer.dora_factor()?) {
            let layer = DoraLayer { w: layer.base(), bias: layer.bias(), adapter, factor };
            let (y, h, dora) = layer.forward(rows, dropout)?;
            (y, Some(saved(adapter.clone(), h, Some(dora))))
        } else {
            let adapted = adapter.and_then(|adapter| Some((adapter, hs.next()?)));
            let lora = adapted.as_ref().map(|(adapter, h)| LoraUp { h, b: adapter.b(), scale: adapter.scale() });
            let y = product(rows, Product { w: layer.base(), bias: residual.or(layer.bias()), lora })?;
            (y, adapted.map(|(adapter, h)| saved(adapter, h, None)))
        };
        results.push((y, Saved { rows: x.shape()[0], adapted }));
    }
    let mut results = results.into_iter();
    // There is one result for each layer.
    Ok(std::array::from_fn(|_| results.next().unwrap_or_else(|| unreachable!("a result for each layer"))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Linear, Scaling};
    use crate::testing;

    #[test]
    fn the_input_s_gradient_is_added_to_what_came_before() {
        const SIZES: [usize; 4] = [11, 20, 24, 4];
        let [m, d_out, d_in, rank] = SIZES;
        for device in testing::devices() {
            let tensor = |seed, shape: &[usize]| {
                Tensor::from_slice(&device, shape, &testing::values(seed, shape.iter().product(), 1.0)).unwrap()
            };
            let (x, dy) = (tensor(1, &[m, d_in]), tensor(2, &[m, d_out]));
            // No adapter, LoRA, and DoRA, whose dropout needs two products.
            for (adapted, dora, probability) in
                [(false, false, 0.0), (true, false, 0.0), (true, false, 0.3), (true, true, 0.0), (true, true, 0.3)]
            {
                let (_, matrix) = testing::matrices(3, d_out, d_in, 0.3).swap_remove(1);
                let mut layer = Linear::new(&device, matrix).unwrap();
                if adapted {
                    let (a, b) = (tensor(4, &[rank, d_in]), tensor(5, &[d_out, rank]));
                    let adapter = LoraAdapter::from_tensors(a, b, 8.0, Scaling::Standard).unwrap();
                    let mut adapter = adapter.with_dropout(probability).unwrap();
                    if dora {
                        adapter = adapter.with_magnitude(tensor(6, &[d_out])).unwrap();
                    }
                    layer = layer.with_adapter("default", adapter).unwrap();
                }
                let (_, saved) = layer.forward_train(&x, 7).unwrap();
                let dx = |sum| layer.backward_onto(sum, &dy, &saved, true).unwrap().dx.unwrap();
                // The f16 tiles add the adapter's part before the rest.
                let bound = |_, sum: f64| if testing::is_f16(&device) { 1e-4 * (1.0 + sum.abs()) } else { 0.0 };
                let context = format!("{} DoRA {dora}, dropout {probability}", testing::name(&device));
                testing::assert_adds(&context, &dx(None), bound, |sum| Ok(dx(sum)));
            }
        }
    }
}
