//! Linear layers on a tape.

use super::linear::AdaptedLinear;
use super::train::LinearGrads;
use crate::autograd::{Tape, Var};
use crate::error::Result;

impl<Base> AdaptedLinear<Base> {
    /// The layer's result for `x`, recorded: gradients come back to `x` and to the active adapter. `seed` is that of the
    /// adapter's dropout, and `None` means none.
    ///
    /// # Errors
    /// As [`AdaptedLinear::forward`].
    pub fn record<'a>(&'a self, tape: &mut Tape<'a>, x: &Var, seed: Option<u64>) -> Result<Var> {
        let (y, saved) = match seed {
            Some(seed) => self.forward_train(x.value(), seed)?,
            None => self.run(x.value(), None)?,
        };
        let need_dx = x.needs_grad();
        let mut inputs = vec![x.node()];
        inputs.extend(self.parameters().map(|(_, tensor)| tape.leaf(tensor)));
        Ok(tape.record(y, inputs, move |dy, _| {
            let LinearGrads { dx, da, db, dmagnitude, dbias } = self.backward(dy, &saved, need_dx)?;
            // In the order of `parameters`: of an optional one, those that are trained.
            let trained = [da, db, dmagnitude, dbias].into_iter().flatten().map(Some);
            Ok(std::iter::once(dx).chain(trained).collect())
        }))
    }
}
