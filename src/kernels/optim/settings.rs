//! AdamW's settings, and the parameters that its kernels share.

use crate::error::{Error, Result};
use crate::kernels::elementwise::quads;
use crate::kernels::params;

pub(crate) const OP: &str = "adamw";

params! {
    struct AdamWParams {
        first_group: u32,
        groups: u32,
        /// Number of values / 4, rounded up.
        quads: u32,
        /// 1 - lr * weight_decay.
        decay: f32,
        /// 1 - beta1.
        new1: f32,
        beta2: f32,
        /// 1 - beta2.
        new2: f32,
        /// lr / (1 - beta1^t).
        step_size: f32,
        /// sqrt(1 - beta2^t).
        root2: f32,
        eps: f32,
    }
}

/// The optimizer's settings. They are f64 because torch derives its step factors in f64 too.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the mean of squares.
    pub eps: f64,
    /// A step at learning rate 1 shrinks a parameter by this fraction.
    pub weight_decay: f64,
}

impl Default for AdamW {
    /// torch's defaults: learning rate 1e-3, betas 0.9 and 0.999, eps 1e-8, weight decay 0.01.
    fn default() -> Self {
        AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

impl AdamW {
    pub(crate) fn params(&self, step: u32, len: usize) -> AdamWParams {
        // powf rather than powi: a step of 2^31 or more doesn't fit an i32.
        let correction = |beta: f64| 1.0 - beta.powf(step.into());
        AdamWParams {
            quads: quads::count(len),
            decay: (1.0 - self.lr * self.weight_decay) as f32,
            new1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            new2: (1.0 - self.beta2) as f32,
            step_size: (self.lr / correction(self.beta1)) as f32,
            root2: correction(self.beta2).sqrt() as f32,
            eps: self.eps as f32,
            ..Default::default()
        }
    }

    pub(crate) fn check(&self, step: u32) -> Result<()> {
        let beta = |beta: f64| (0.0..1.0).contains(&beta);
        let wrong = [
            ("the step", f64::from(step), step >= 1, "steps count from 1"),
            ("beta1", self.beta1, beta(self.beta1), "it must be at least 0 and less than 1"),
            ("beta2", self.beta2, beta(self.beta2), "it must be at least 0 and less than 1"),
            ("eps", self.eps, self.eps >= 0.0, "it must not be negative"),
            ("the learning rate", self.lr, self.lr.is_finite(), "it must be finite"),
            ("the weight decay", self.weight_decay, self.weight_decay.is_finite(), "it must be finite"),
        ];
        match wrong.into_iter().find(|(_, _, fine, _)| !fine) {
            None => Ok(()),
            Some((what, got, _, expected)) => Err(Error::invalid(OP, what, got, expected)),
        }
    }
}
