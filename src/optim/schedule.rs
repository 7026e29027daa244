//! Learning-rate schedules: the factor for each step.

use std::f64::consts::PI;

/// Decay of the learning rate after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Decay {
    /// No decay.
    #[default]
    Constant,
    /// Linearly, to 0 after the last step.
    Linear,
    /// Along half a cosine, to 0 after the last step.
    Cosine,
}

/// Warm-up, then decay. Steps count from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    /// Decay after warm-up.
    pub decay: Decay,
    /// Number of warm-up steps: the factor of step s is (s + 1) / `warmup`.
    pub warmup: u32,
    /// Total number of steps; not used by a constant rate.
    pub total: u32,
}

impl Schedule {
    /// A constant rate.
    pub fn constant() -> Schedule {
        Schedule::default()
    }

    /// The factor of step `step`, in 0..=1.
    pub fn factor(&self, step: u32) -> f64 {
        if step < self.warmup {
            return f64::from(step + 1) / f64::from(self.warmup);
        }
        let left = self.total.saturating_sub(self.warmup).max(1);
        let progress = (f64::from(step - self.warmup) / f64::from(left)).min(1.0);
        match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear => 1.0 - progress,
            Decay::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_to_its_full_value_and_falls_to_zero() {
        let factors =
            |decay| (0..8).map(|step| Schedule { decay, warmup: 2, total: 6 }.factor(step)).collect::<Vec<_>>();
        assert_eq!(factors(Decay::Constant), [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(factors(Decay::Linear), [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]);
        // Learning rates from a recorded transformers run, divided by the base rate.
        let wanted = [0.5, 1.0, 1.0, 0.853_553_390_593_273_8, 0.5, 0.146_446_609_406_726_27, 0.0, 0.0];
        for (got, wanted) in factors(Decay::Cosine).into_iter().zip(wanted) {
            assert!((got - wanted).abs() < 1e-15, "{got} {wanted}");
        }
    }

    #[test]
    fn odd_totals_do_no_harm() {
        for schedule in [Schedule::default(), Schedule { decay: Decay::Cosine, warmup: 5, total: 3 }] {
            for step in [0, 1, 5, u32::MAX - 1] {
                assert!((0.0..=1.0).contains(&schedule.factor(step)));
            }
        }
    }
}
