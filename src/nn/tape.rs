//! Linear layers on a tape.

use super::linear::AdaptedLinear;
use super::train::{LinearGrads, run_all};
use crate::autograd::{Tape, Var};
use crate::error::Result;

impl<Base> AdaptedLinear<Base> {
    /// The layer's result for `x`, recorded: gradients come back to `x` and to the active adapter. `seed` is that of the
    /// adapter's dropout, and `None` means none.
    ///
    /// # Errors
    /// As [`AdaptedLinear::forward`].
    pub fn record<'a>(&'a self, tape: &mut Tape<'a>, x: &Var, seed: Option<u64>) -> Result<Var> {
        let [y] = record_all([self], tape, x, [seed])?;
        Ok(y)
    }
}

/// As [`AdaptedLinear::record`], of several layers that read the same `x`.
///
/// # Errors
/// As [`AdaptedLinear::forward`].
pub(super) fn record_all<'a, Base, const N: usize>(
    layers: [&'a AdaptedLinear<Base>; N],
    tape: &mut Tape<'a>,
    x: &Var,
    seeds: [Option<u64>; N],
) -> Result<[Var; N]> {
    let mut dropouts = [None; N];
    for ((layer, seed), dropout) in layers.iter().zip(seeds).zip(&mut dropouts) {
        if let Some(seed) = seed {
            layer.check_unmerged("a training pass")?;
            *dropout = layer.dropout(seed);
        }
    }
    let need_dx = x.needs_grad();
    let mut results = run_all(layers, x.value(), dropouts)?.into_iter().zip(layers);
    Ok(std::array::from_fn(|_| {
        let ((y, saved), layer) = results.next().unwrap_or_else(|| unreachable!("a result for each layer"));
        let mut inputs = vec![x.node()];
        inputs.extend(layer.parameters().map(|(_, tensor)| tape.leaf(tensor)));
        tape.record_adding(y, inputs, move |dy, sum| {
            let LinearGrads { dx, da, db, dmagnitude, dbias } = layer.backward_onto(sum, dy, &saved, need_dx)?;
            // In the order of `parameters`: of an optional one, those that are trained.
            let trained = [da, db, dmagnitude, dbias].into_iter().flatten().map(Some);
            Ok(std::iter::once(dx).chain(trained).collect())
        })
    }))
}
