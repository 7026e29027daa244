//! AdamW on the device, learning-rate schedules, and gradient clipping.

mod schedule;

pub use schedule::{Decay, Schedule};

use crate::autograd::{Parameter, ParameterId};
use crate::device::ledger::Part;
use crate::error::{Error, Result};
use crate::kernels::expect_shape;
pub use crate::kernels::optim::adamw::AdamW;
use crate::kernels::optim::adamw::{Update, adamw};
use crate::kernels::optim::grad_norm::GradNorm;
use crate::tensor::Tensor;

const OP: &str = "AdamW";

/// First and second moments of every parameter, and the number of updates.
/// Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
#[derive(Clone, Debug)]
pub struct Optimizer {
    /// Rates and decay; a schedule multiplies `lr`.
    pub config: AdamW,
    /// In the order of the ids.
    moments: Vec<Moments>,
    step: u32,
}

#[derive(Clone, Debug)]
struct Moments {
    id: ParameterId,
    m: Tensor,
    v: Tensor,
}

impl Optimizer {
    /// Creates an optimizer without moments. A parameter's moments are created, as zeros, at its
    /// first update.
    pub fn new(config: AdamW) -> Optimizer {
        Optimizer { config, moments: Vec::new(), step: 0 }
    }

    /// Restores an optimizer after `steps` updates, with parameters and their moments as
    /// [`Optimizer::moments`] returned them.
    ///
    /// # Errors
    /// [`Error::Shape`] if a moment doesn't have its parameter's shape.
    pub(crate) fn restored<'a>(
        config: AdamW,
        steps: u32,
        moments: impl IntoIterator<Item = (&'a Parameter, [Tensor; 2])>,
    ) -> Result<Optimizer> {
        let mut restored = Optimizer { step: steps, ..Optimizer::new(config) };
        for (parameter, [m, v]) in moments {
            for moment in [&m, &v] {
                expect_shape(OP, "a moment", moment, parameter.shape())?;
            }
            let moments = Moments { id: parameter.id(), m, v };
            match restored.find(parameter.id()) {
                Ok(place) => restored.moments[place] = moments,
                Err(place) => restored.moments.insert(place, moments),
            }
        }
        Ok(restored)
    }

    /// Number of updates so far.
    pub fn steps(&self) -> u32 {
        self.step
    }

    /// Starts the next update. Then call [`Optimizer::update`] for every parameter.
    pub fn begin(&mut self) {
        self.step += 1;
    }

    /// Undoes [`Optimizer::begin`], for an update that the device skipped (see [`GradNorm`]) for
    /// every parameter.
    pub(crate) fn undo(&mut self) {
        self.step = self.step.saturating_sub(1);
    }

    /// Updates one parameter in place, with `factor` times the configured learning rate. The
    /// gradient is multiplied by the clip factor in `norm`; if that is NaN, nothing changes.
    ///
    /// # Errors
    /// [`Error::Invalid`] before the first [`Optimizer::begin`], [`Error::Shape`] if the parameter
    /// had another shape before, and errors of the device.
    pub fn update(&mut self, parameter: &mut Parameter, gradient: &Tensor, factor: f64, norm: &GradNorm) -> Result<()> {
        self.update_all(vec![(parameter, gradient)], factor, norm)
    }

    /// Like [`Optimizer::update`], for all parameters with their gradients. A GPU updates several
    /// at a time.
    ///
    /// # Errors
    /// Same as [`Optimizer::update`]; [`Error::Invalid`] for a parameter that is there twice.
    pub fn update_all(
        &mut self,
        mut parameters: Vec<(&mut Parameter, &Tensor)>,
        factor: f64,
        norm: &GradNorm,
    ) -> Result<()> {
        if self.step == 0 {
            return Err(Error::invalid(OP, "the step", 0, "begin an update first"));
        }
        for (parameter, _) in &parameters {
            if let Err(place) = self.find(parameter.id()) {
                let zeros = || Tensor::zeros(&parameter.device(), parameter.shape());
                let moments = Moments { id: parameter.id(), m: zeros()?, v: zeros()? };
                [&moments.m, &moments.v].iter().for_each(|moment| moment.count_as(Part::Optimizer));
                self.moments.insert(place, moments);
            }
        }
        // Moments and parameters are both in the order of their ids.
        parameters.sort_by_key(|(parameter, _)| parameter.id());
        let mut moments = self.moments.iter_mut();
        let mut updates = Vec::with_capacity(parameters.len());
        for (param, grad) in parameters {
            let Some(Moments { m, v, .. }) = moments.find(|moments| moments.id == param.id()) else {
                return Err(Error::invalid(OP, "a parameter", "twice in one update", "each has one gradient"));
            };
            updates.push(Update { param, grad, m, v });
        }
        let config = AdamW { lr: self.config.lr * factor, ..self.config };
        adamw(&mut updates, &config, self.step, norm)
    }

    /// Index of a parameter's moments, or of where they belong.
    fn find(&self, id: ParameterId) -> Result<usize, usize> {
        self.moments.binary_search_by_key(&id, |moments| moments.id)
    }

    /// Bytes of the moments on their device.
    pub fn resident_bytes(&self) -> u64 {
        self.moments.iter().map(|moments| moments.m.resident_bytes() + moments.v.resident_bytes()).sum()
    }

    /// First and second moment of a parameter, if it has been updated. A checkpoint saves them
    /// with [`Optimizer::steps`].
    pub(crate) fn moments(&self, parameter: &Parameter) -> Option<[&Tensor; 2]> {
        let Moments { m, v, .. } = &self.moments[self.find(parameter.id()).ok()?];
        Some([m, v])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::kernels::optim::grad_norm::grad_norm;
    use crate::testing;

    const LENGTHS: [usize; 2] = [3, 5];

    /// Two parameters after updates in these orders, and the optimizer.
    fn updated(orders: &[[usize; 2]]) -> ([Parameter; 2], Optimizer) {
        let mut parameters = LENGTHS.map(|len| Parameter::new(tensor(len, len as u64)));
        let mut optimizer = Optimizer::new(AdamW::default());
        for order in orders {
            update(&mut parameters, &mut optimizer, *order);
        }
        (parameters, optimizer)
    }

    fn update(parameters: &mut [Parameter; 2], optimizer: &mut Optimizer, order: [usize; 2]) {
        optimizer.begin();
        let gradients = LENGTHS.map(|len| tensor(len, u64::from(10 + optimizer.steps())));
        let norm = grad_norm(&gradients.each_ref(), None, None).unwrap();
        let mut all: Vec<_> = parameters.iter_mut().zip(&gradients).collect();
        if order == [1, 0] {
            all.reverse();
        }
        optimizer.update_all(all, 1.0, &norm).unwrap();
    }

    fn tensor(len: usize, seed: u64) -> Tensor {
        Tensor::from_slice(&Device::cpu(), &[len], &testing::values(seed, len, 1.0)).unwrap()
    }

    fn values(parameters: &[Parameter; 2]) -> [Vec<f32>; 2] {
        parameters.each_ref().map(|parameter| parameter.to_vec().unwrap())
    }

    #[test]
    fn moments_belong_to_their_parameters_in_any_order() {
        let (wanted, _) = updated(&[[0, 1]; 3]);
        let (mut parameters, optimizer) = updated(&[[0, 1], [1, 0]]);
        let moments = parameters.iter().rev().map(|parameter| {
            let moments = optimizer.moments(parameter).unwrap().map(Tensor::clone);
            assert!(optimizer.moments(&parameter.clone()).is_none(), "a clone is another parameter");
            (parameter, moments)
        });
        let mut restored = Optimizer::restored(AdamW::default(), optimizer.steps(), moments).unwrap();
        update(&mut parameters, &mut restored, [1, 0]);
        assert_eq!(values(&parameters), values(&wanted));
    }

    #[test]
    fn moments_of_another_shape_are_an_error() {
        let ([short, long], optimizer) = updated(&[[0, 1]]);
        let moments = optimizer.moments(&long).unwrap().map(Tensor::clone);
        let error = Optimizer::restored(AdamW::default(), 1, [(&short, moments)]).unwrap_err().to_string();
        assert!(error.contains("[3]") && error.contains("[5]"), "{error}");
    }
}
