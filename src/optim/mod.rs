//! AdamW on the device, learning-rate schedules, and gradient clipping.

mod schedule;

pub use schedule::{Decay, Schedule};

use std::collections::HashMap;

use crate::error::{Error, Result};
pub use crate::kernels::optim::adamw::AdamW;
use crate::kernels::optim::adamw::{Update, adamw};
use crate::kernels::optim::grad_norm::GradNorm;
use crate::tensor::Tensor;

/// First and second moments of every trainable tensor, by name, and the number of updates.
/// Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
#[derive(Clone, Debug)]
pub struct Optimizer {
    /// Rates and decay; a schedule multiplies `lr`.
    pub config: AdamW,
    /// In the order of the first updates, or of the checkpoint they came from.
    moments: Vec<Moments>,
    /// Index of each name's moments.
    places: HashMap<String, usize>,
    step: u32,
}

#[derive(Clone, Debug)]
struct Moments {
    name: String,
    m: Tensor,
    v: Tensor,
}

impl Optimizer {
    /// Creates an optimizer without moments. A tensor's moments are created, as zeros, at its
    /// first update.
    pub fn new(config: AdamW) -> Optimizer {
        Optimizer::restored(config, 0, [])
    }

    /// Restores an optimizer after `steps` updates, with the moments that [`Optimizer::moments`]
    /// returned.
    pub fn restored(
        config: AdamW,
        steps: u32,
        moments: impl IntoIterator<Item = (String, Tensor, Tensor)>,
    ) -> Optimizer {
        let mut restored = Optimizer { config, moments: Vec::new(), places: HashMap::new(), step: steps };
        for (name, m, v) in moments {
            let next = restored.moments.len();
            let place = *restored.places.entry(name.clone()).or_insert(next);
            match restored.moments.get_mut(place) {
                Some(again) => *again = Moments { name, m, v },
                None => restored.moments.push(Moments { name, m, v }),
            }
        }
        restored
    }

    /// Number of updates so far.
    pub fn steps(&self) -> u32 {
        self.step
    }

    /// Starts the next update. Then call [`Optimizer::update`] for every tensor.
    pub fn begin(&mut self) {
        self.step += 1;
    }

    /// Undoes [`Optimizer::begin`], for an update that the device skipped (see [`GradNorm`]) for
    /// every tensor.
    pub fn undo(&mut self) {
        self.step = self.step.saturating_sub(1);
    }

    /// Updates one tensor in place, with `factor` times the configured learning rate. The gradient
    /// is multiplied by the clip factor in `norm`; if that is NaN, nothing changes.
    ///
    /// # Errors
    /// [`Error::Invalid`] before the first [`Optimizer::begin`], [`Error::Shape`] if a tensor of
    /// this name had another shape before, and errors of the device.
    pub fn update(
        &mut self,
        name: &str,
        tensor: &mut Tensor,
        gradient: &Tensor,
        factor: f64,
        norm: &GradNorm,
    ) -> Result<()> {
        self.update_all(vec![(name, tensor, gradient)], factor, norm)
    }

    /// Like [`Optimizer::update`], for all tensors with their names and gradients. A GPU updates
    /// several at a time.
    ///
    /// # Errors
    /// Same as [`Optimizer::update`]; [`Error::Invalid`] if a name occurs twice.
    pub fn update_all(
        &mut self,
        parameters: Vec<(&str, &mut Tensor, &Tensor)>,
        factor: f64,
        norm: &GradNorm,
    ) -> Result<()> {
        let invalid = |what, got: &str, expected: &str| {
            Err(Error::Invalid { op: "AdamW", what, got: got.into(), expected: expected.into() })
        };
        if self.step == 0 {
            return invalid("the step", "0", "begin an update first");
        }
        let mut places = Vec::with_capacity(parameters.len());
        for (index, (name, tensor, _)) in parameters.iter().enumerate() {
            // Usually the same tensors come in the same order.
            let place = match self.moments.get(index) {
                Some(moments) if moments.name == *name => index,
                _ => self.place(name, tensor)?,
            };
            places.push(place);
        }
        let mut moments: Vec<_> = self.moments.iter_mut().map(Some).collect();
        let mut updates = Vec::with_capacity(parameters.len());
        for ((name, param, grad), place) in parameters.into_iter().zip(places) {
            let Some(Moments { m, v, .. }) = moments[place].take() else {
                return invalid("a tensor's name", name, "each name may occur only once");
            };
            updates.push(Update { param, grad, m, v });
        }
        let config = AdamW { lr: self.config.lr * factor, ..self.config };
        adamw(&mut updates, &config, self.step, norm)
    }

    /// Index of this name's moments; creates them, as zeros, if there are none.
    fn place(&mut self, name: &str, tensor: &Tensor) -> Result<usize> {
        if let Some(place) = self.places.get(name) {
            return Ok(*place);
        }
        let zeros = || Tensor::zeros(&tensor.device(), tensor.shape());
        self.moments.push(Moments { name: name.to_owned(), m: zeros()?, v: zeros()? });
        let place = self.moments.len() - 1;
        self.places.insert(name.to_owned(), place);
        Ok(place)
    }

    /// Bytes of the moments on their device.
    pub fn resident_bytes(&self) -> u64 {
        self.moments.iter().map(|moments| moments.m.resident_bytes() + moments.v.resident_bytes()).sum()
    }

    /// Names with first and second moments. A checkpoint saves them with [`Optimizer::steps`].
    pub fn moments(&self) -> impl Iterator<Item = (&str, &Tensor, &Tensor)> {
        self.moments.iter().map(|moments| (moments.name.as_str(), &moments.m, &moments.v))
    }
}
