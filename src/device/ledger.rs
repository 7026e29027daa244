//! Memory of a planned device, by use.

use std::ops::{Index, IndexMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::error::Error;

/// Uses of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Base,
    Adapters,
    Gradients,
    Optimizer,
    Activations,
    Logits,
}

/// Bytes on the device by use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Parts {
    /// Matrices, norms, biases and the rotary table.
    pub base: u64,
    /// A, B and DoRA's magnitudes.
    pub adapters: u64,
    /// Gradients of the adapters.
    pub gradients: u64,
    /// AdamW's two moments per trained value.
    pub optimizer: u64,
    /// Everything else in a step: values saved for the backward pass, gradients in transit,
    /// scratch memory of kernels, and the batches.
    pub activations: u64,
    /// Logits of one chunk of tokens.
    pub logits: u64,
}

impl Parts {
    /// Sum of all parts.
    pub fn total(&self) -> u64 {
        self.base + self.adapters + self.gradients + self.optimizer + self.activations + self.logits
    }
}

impl Index<Part> for Parts {
    type Output = u64;

    fn index(&self, part: Part) -> &u64 {
        match part {
            Part::Base => &self.base,
            Part::Adapters => &self.adapters,
            Part::Gradients => &self.gradients,
            Part::Optimizer => &self.optimizer,
            Part::Activations => &self.activations,
            Part::Logits => &self.logits,
        }
    }
}

impl IndexMut<Part> for Parts {
    fn index_mut(&mut self, part: Part) -> &mut u64 {
        match part {
            Part::Base => &mut self.base,
            Part::Adapters => &mut self.adapters,
            Part::Gradients => &mut self.gradients,
            Part::Optimizer => &mut self.optimizer,
            Part::Activations => &mut self.activations,
            Part::Logits => &mut self.logits,
        }
    }
}

/// Phase of a training step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Moment {
    /// Not started; the model is loaded.
    #[default]
    Loaded,
    /// The decoder's layers.
    Forward,
    /// The head. Its gradient is computed along with the loss.
    Loss,
    /// The backward pass, including recomputed layers.
    Backward,
    /// The optimizer.
    Update,
}

/// Live bytes of a planned device, by use, and the maxima so far. Clones share it.
#[derive(Clone)]
pub(crate) struct Ledger(Arc<Mutex<Tally>>);

#[derive(Clone, Copy)]
pub(crate) struct Tally {
    /// The use of what is allocated now.
    part: Part,
    now: Moment,
    live: Parts,
    /// Maximum of each part.
    pub most: Parts,
    /// All parts when their sum was largest.
    pub at_peak: Parts,
    /// The phase at that time.
    pub moment: Moment,
}

/// An allocation in a ledger. Dropping it ends it.
pub(crate) struct Charge {
    ledger: Ledger,
    part: Mutex<Part>,
    bytes: u64,
}

impl Ledger {
    /// An empty ledger, which counts allocations for this part at first.
    pub fn new(part: Part) -> Ledger {
        let none = Parts::default();
        let moment = Moment::Loaded;
        Ledger(Arc::new(Mutex::new(Tally { part, now: moment, live: none, most: none, at_peak: none, moment })))
    }

    pub fn is(&self, other: &Ledger) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The maxima so far.
    pub fn tally(&self) -> Tally {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, Tally> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts further allocations for this part.
    pub fn count_for(&self, part: Part) {
        self.lock().part = part;
    }

    /// Sets the current phase.
    pub(super) fn begin(&self, moment: Moment) {
        self.lock().now = moment;
    }

    /// Counts an allocation.
    pub(super) fn charge(&self, bytes: u64) -> Charge {
        let mut tally = self.lock();
        let part = tally.part;
        tally.add(part, bytes);
        Charge { ledger: self.clone(), part: Mutex::new(part), bytes }
    }
}

impl Tally {
    fn add(&mut self, part: Part, bytes: u64) {
        self.live[part] += bytes;
        self.most[part] = self.most[part].max(self.live[part]);
        if self.live.total() > self.at_peak.total() {
            (self.at_peak, self.moment) = (self.live, self.now);
        }
    }
}

impl Charge {
    /// Counts the allocation for another part.
    pub fn move_to(&self, part: Part) {
        let mut own = self.part.lock().unwrap_or_else(PoisonError::into_inner);
        let mut tally = self.ledger.lock();
        tally.live[*own] -= self.bytes;
        tally.add(part, self.bytes);
        *own = part;
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let part = *self.part.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.ledger.lock().live[part] -= self.bytes;
    }
}

/// The error for reading values from a planned device.
pub(crate) fn no_values(device: &str) -> Error {
    Error::invalid("plan", "the values of a tensor", format!("none on {device}"), "a planned device has sizes only")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maxima_are_by_part_and_of_the_sum() {
        let ledger = Ledger::new(Part::Base);
        let base = ledger.charge(100);
        ledger.count_for(Part::Activations);
        ledger.begin(Moment::Forward);
        let moved = ledger.charge(30);
        moved.move_to(Part::Gradients);
        ledger.begin(Moment::Loss);
        drop(ledger.charge(50));
        ledger.begin(Moment::Update);
        drop(moved);
        let last = ledger.charge(40);
        let Tally { most, at_peak, moment, live, .. } = ledger.tally();
        assert_eq!(most, Parts { base: 100, gradients: 30, activations: 50, ..Parts::default() });
        assert_eq!((at_peak.total(), at_peak.gradients, moment), (180, 30, Moment::Loss));
        assert_eq!((live.total(), live.activations), (140, 40));
        drop((base, last));
        assert_eq!(ledger.tally().live, Parts::default());
    }
}
