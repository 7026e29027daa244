//! Simulated memory pool without buffers: allocations are counted, not made.

use std::cell::RefCell;
use std::ops::{Index, IndexMut};
use std::rc::Rc;

use serde::Serialize;

use crate::autograd::Value;
use crate::device::{Device, Pool, size_class};
use crate::error::Result;
use crate::kernels::Scratch;
use crate::tensor::element_count;

/// Uses of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
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

/// Memory of a device: a pool like the device's, but without buffers. It gets the same requests in
/// the same order.
pub(super) struct Ledger {
    pub device: Device,
    pool: Pool<()>,
    tally: RefCell<Tally>,
}

#[derive(Clone, Copy, Default)]
struct Tally {
    now: Moment,
    live: Parts,
    most: Parts,
    at_peak: Parts,
    moment: Moment,
}

/// Maxima that a ledger has recorded.
pub(super) struct Seen {
    /// Maximum of each part.
    pub most: Parts,
    /// All parts when their sum was largest, and the phase.
    pub at_peak: Parts,
    pub moment: Moment,
    /// Maximum held in total, including memory that the pool keeps.
    pub held: u64,
}

/// A piece of memory. Clones share it; the last one returns it.
#[derive(Clone)]
pub(super) struct Bytes(Rc<Held>);

struct Held {
    ledger: Rc<Ledger>,
    part: Part,
    size: u64,
    pooled: bool,
}

impl Ledger {
    pub fn new(device: &Device) -> Rc<Ledger> {
        Rc::new(Ledger { device: device.clone(), pool: Pool::new(None), tally: RefCell::default() })
    }

    /// Sets the current phase.
    pub fn begin(&self, moment: Moment) {
        self.tally.borrow_mut().now = moment;
    }

    /// Allocates a tensor of this shape.
    ///
    /// # Errors
    /// Same as for such a tensor on the device: [`Error::TooLarge`](crate::Error::TooLarge),
    /// [`Error::Invalid`](crate::Error::Invalid).
    pub fn tensor(self: &Rc<Self>, part: Part, shape: &[usize]) -> Result<Bytes> {
        self.values(part, element_count(shape)?)
    }

    fn values(self: &Rc<Self>, part: Part, values: usize) -> Result<Bytes> {
        let size = self.pooled_bytes(values)?;
        Ok(self.take(part, size, true))
    }

    /// Bytes that this many 32-bit values take from the pool.
    fn pooled_bytes(&self, values: usize) -> Result<u64> {
        let bytes = 4 * values as u64;
        match &self.device {
            Device::Cpu(_) => Ok(size_class(bytes)),
            Device::Gpu(gpu) => gpu.pooled_bytes("a tensor of the training step", bytes),
        }
    }

    /// Bytes of this many u32 values.
    pub fn index_bytes(&self, values: usize) -> Result<u64> {
        match &self.device {
            Device::Cpu(_) => Ok(4 * values as u64),
            Device::Gpu(_) => self.pooled_bytes(values),
        }
    }

    /// Allocates bytes that don't come from the pool.
    pub fn fixed(self: &Rc<Self>, part: Part, size: u64) -> Bytes {
        self.take(part, size, false)
    }

    /// Allocates a kernel's scratch memory and returns it.
    pub fn scratch(self: &Rc<Self>, scratch: &Scratch) -> Result<()> {
        let new = |&values: &usize| self.values(Part::Activations, values);
        let _kept = scratch.kept.iter().map(new).collect::<Result<Vec<_>>>()?;
        let mut tasks = scratch.tasks.clone();
        tasks.sort_unstable_by(|a, b| b.cmp(a));
        let alive = tasks.len().min(rayon::current_num_threads());
        let largest = tasks[..alive].iter().flat_map(|values| std::iter::repeat_n(values, scratch.of_task));
        drop(largest.map(new).collect::<Result<Vec<_>>>()?);
        // The pool keeps one buffer of each size.
        tasks.dedup();
        tasks.iter().try_for_each(|values| new(values).map(drop))
    }

    fn take(self: &Rc<Self>, part: Part, size: u64, pooled: bool) -> Bytes {
        if pooled {
            // The pool has no buffers, so its answer doesn't matter.
            self.pool.take(size, true);
        } else {
            self.pool.count(size);
        }
        let tally = &mut *self.tally.borrow_mut();
        tally.live[part] += size;
        tally.most[part] = tally.most[part].max(tally.live[part]);
        if tally.live.total() > tally.at_peak.total() {
            (tally.at_peak, tally.moment) = (tally.live, tally.now);
        }
        Bytes(Rc::new(Held { ledger: self.clone(), part, size, pooled }))
    }

    pub fn seen(&self) -> Seen {
        let Tally { most, at_peak, moment, .. } = *self.tally.borrow();
        Seen { most, at_peak, moment, held: self.pool.counters().peak_held_bytes }
    }
}

impl Bytes {
    /// Allocates the same size for another part.
    pub fn another(&self, part: Part) -> Bytes {
        self.0.ledger.take(part, self.0.size, true)
    }

    /// Adds this to the sum, if there is one.
    pub fn added_to(self, sum: Option<Bytes>) -> Result<Bytes> {
        let Some(mut sum) = sum else { return Ok(self) };
        sum.add_in_place(&self)?;
        Ok(sum)
    }

    /// Gives this its own memory if clones share it, as a tensor would.
    pub fn unshare(&mut self) {
        if Rc::strong_count(&self.0) > 1 {
            *self = self.another(self.0.part);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.ledger.tally.borrow_mut().live[self.part] -= self.size;
        if self.pooled {
            self.ledger.pool.put(self.size, 0, ());
        } else {
            self.ledger.pool.forget(self.size);
        }
    }
}

impl Value for Bytes {
    fn add_in_place(&mut self, _: &Bytes) -> Result<()> {
        self.unshare();
        Ok(())
    }
}
