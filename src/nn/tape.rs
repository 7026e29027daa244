//! Linear layers on a tape.

use super::linear::AdaptedLinear;
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
            None => self.forward_saved(x.value())?,
        };
        let need_dx = x.needs_grad();
        let names: Vec<_> = self.trainable_params().into_iter().map(|(name, _)| name).collect();
        let mut inputs = vec![x.node()];
        inputs.extend(self.trainable_params().into_iter().map(|(_, tensor)| tape.leaf(tensor)));
        Ok(tape.record(y, inputs, move |dy, _| {
            let mut found = self.backward(dy, &saved, need_dx)?;
            let mut gradients = vec![found.dx.take()];
            gradients.extend(names.into_iter().map(|name| found.take(name)));
            Ok(gradients)
        }))
    }
}
