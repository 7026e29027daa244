//! Recording linear layers on a tape.

use super::layer::AdaptedLinear;
use super::pass::{LinearGrads, run_all};
use crate::autograd::{Tape, Var};
use crate::error::Result;

impl<Base> AdaptedLinear<Base> {
    /// Computes the layer's output for `x` and records it; gradients flow to `x` and to the active
    /// adapter. `seed` is for the adapter's dropout; `None` disables dropout.
    ///
    /// # Errors
    /// Same as [`AdaptedLinear::forward`].
    pub fn record<'a>(&'a self, tape: &mut Tape<'a>, x: &Var, seed: Option<u64>) -> Result<Var> {
        let [y] = record_all([self], tape, x, [seed], [None])?;
        Ok(y)
    }

    /// Like [`AdaptedLinear::record`], with `residual` [M, d_out] added to the result.
    ///
    /// # Errors
    /// Same as [`AdaptedLinear::forward`].
    pub(crate) fn record_onto<'a>(
        &'a self,
        tape: &mut Tape<'a>,
        x: &Var,
        residual: &Var,
        seed: Option<u64>,
    ) -> Result<Var> {
        if !self.adds_residuals() {
            let y = self.record(tape, x, seed)?;
            return tape.add(residual, &y);
        }
        let [y] = record_all([self], tape, x, [seed], [Some(residual)])?;
        Ok(y)
    }
}

/// Like [`AdaptedLinear::record`], for several layers that read the same `x`. A layer may add a
/// residual to its output.
///
/// # Errors
/// Same as [`AdaptedLinear::forward`].
pub(in crate::nn) fn record_all<'a, Base, const N: usize>(
    layers: [&'a AdaptedLinear<Base>; N],
    tape: &mut Tape<'a>,
    x: &Var,
    seeds: [Option<u64>; N],
    residuals: [Option<&Var>; N],
) -> Result<[Var; N]> {
    let mut dropouts = [None; N];
    for ((layer, seed), dropout) in layers.iter().zip(seeds).zip(&mut dropouts) {
        if let Some(seed) = seed {
            layer.check_unmerged("a training pass")?;
            *dropout = layer.dropout(seed);
        }
    }
    let need_dx = x.needs_grad();
    let added = residuals.map(|residual| residual.map(Var::value));
    let mut results = run_all(layers, x.value(), dropouts, added)?.into_iter().zip(layers.into_iter().zip(residuals));
    Ok(std::array::from_fn(|_| {
        let ((y, saved), (layer, residual)) = results.next().unwrap_or_else(|| unreachable!("a result for each layer"));
        let mut inputs = vec![x.node()];
        inputs.extend(residual.map(Var::node));
        let has_residual = residual.is_some();
        inputs.extend(layer.parameters().map(|(_, parameter)| tape.leaf(parameter.id())));
        tape.record_adding(y, inputs, move |dy, sum| {
            let LinearGrads { dx, da, db, dmagnitude, dbias } = layer.backward_onto(sum, dy, &saved, need_dx)?;
            // In the order of `parameters`; optional ones only if they are trained.
            let trained = [da, db, dmagnitude, dbias].into_iter().flatten().map(Some);
            let beside = has_residual.then(|| Some(dy.clone()));
            Ok(std::iter::once(dx).chain(beside).chain(trained).collect())
        })
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::{Gradients, Parameter};
    use crate::kernels::elementwise::add::add;
    use crate::nn::{Linear, LoraAdapter, Scaling};
    use crate::tensor::Tensor;
    use crate::testing;

    #[test]
    fn a_residual_is_what_adding_it_afterwards_is() {
        let [m, d_out, d_in, rank] = [11, 20, 24, 4];
        for device in testing::devices() {
            let tensor = |seed, shape: &[usize]| {
                Tensor::from_slice(&device, shape, &testing::values(seed, shape.iter().product(), 1.0)).unwrap()
            };
            let [x, residual] = [tensor(1, &[m, d_in]), tensor(2, &[m, d_out])].map(Parameter::new);
            let head = tensor(3, &[d_out]);
            // With a bias there is no place for the residual in the product, and DoRA scales the
            // product's result.
            for (bias, dora) in [(false, false), (true, false), (false, true)] {
                let (a, b) = (tensor(4, &[rank, d_in]), tensor(5, &[d_out, rank]));
                let mut adapter = LoraAdapter::from_tensors(a, b, 8.0, Scaling::Standard).unwrap();
                if dora {
                    adapter = adapter.with_magnitude(tensor(6, &[d_out])).unwrap();
                }
                let (_, matrix) = testing::matrices(7, d_out, d_in, 0.3).swap_remove(1);
                let mut layer = Linear::new(&device, matrix).unwrap().with_adapter("default", adapter).unwrap();
                if bias {
                    layer = layer.with_bias(&testing::values(8, d_out, 1.0)).unwrap();
                }
                let run = |together: bool| {
                    let mut tape = Tape::new();
                    let [x_var, residual_var] = [&x, &residual].map(|parameter| tape.parameter(parameter));
                    let y = if together {
                        layer.record_onto(&mut tape, &x_var, &residual_var, None).unwrap()
                    } else {
                        let y = layer.record(&mut tape, &x_var, None).unwrap();
                        tape.add(&residual_var, &y).unwrap()
                    };
                    let value = y.value().to_vec().unwrap();
                    let normed = tape.rms_norm(&y, &head, 1e-5).unwrap();
                    let dy = add(normed.value(), &residual).unwrap();
                    let mut gradients = Gradients::new();
                    tape.run(&normed, dy, &mut gradients, None).unwrap();
                    let parameters = layer.parameters().map(|(_, parameter)| parameter);
                    let of = |parameter: &Parameter| gradients.get(parameter).unwrap().to_vec().unwrap();
                    let found: Vec<Vec<f32>> = [&x, &residual].into_iter().chain(parameters).map(of).collect();
                    (value, found)
                };
                let (together, apart) = (run(true), run(false));
                let context = format!("{} bias {bias} dora {dora}", testing::name(&device));
                // The same sums in the same order, but a GPU may fuse the last addition; with f16,
                // other values of dY are then rounded.
                let share = if testing::is_f16(&device) { 4e-3 } else { 1e-5 };
                let all = |(value, found): &(Vec<f32>, Vec<Vec<f32>>)| [std::slice::from_ref(value), found].concat();
                for (got, wanted) in all(&together).iter().zip(&all(&apart)) {
                    let largest = wanted.iter().fold(0.0f32, |most, value| most.max(value.abs()));
                    let bounds = vec![share * f64::from(largest); wanted.len()];
                    testing::assert_close(&context, got, &testing::wide(wanted), &bounds);
                }
            }
        }
    }
}
