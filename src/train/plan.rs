//! Memory plans: what a training run needs, before anything is loaded.
//!
//! A plan isn't an estimate from fitted numbers. It is a training step ([`Trainer::step`]) on a
//! planned device, which has the tier and limits of a real one but no values: tensors and scratch
//! memory are only counted, by a pool like the device's, and kernels compute nothing. Sizes of
//! matrices come from the headers of their files ([`ModelSpec`]).
//!
//! Memory peaks at one of three moments. Without recomputation it is at the end of the forward
//! pass, when all layers have saved what their backward pass needs: either at the loss, where a
//! chunk of logits is added, or at the start of the backward pass, where the gradients of the last
//! layer are added. With recomputation only the inputs of the layers are saved at the loss, and a
//! layer that runs again in the backward pass may need more than the logits. Meanwhile the
//! adapters' gradients accumulate, so the peak may be in the first layer. From the second
//! micro-batch on, all gradients exist from the start.
//!
//! Two numbers matter. [`Plan::peak_bytes`] is the peak of tensors and matrices: the `peak_bytes`
//! of [`MemoryCounters`](crate::device::MemoryCounters). A device's pool keeps freed memory for
//! the next tensor of that size, so a process holds more: [`Plan::held_bytes`], the counters'
//! `peak_held_bytes`. This is what has to fit. Not counted are memory that a driver takes for
//! itself, mapped files (the system may drop their pages) and, while a model is loaded, one of its
//! matrices in host memory.

use serde::Serialize;

use super::{TrainOptions, Trainer};
use crate::device::Device;
use crate::device::ledger::{Ledger, Part, Tally};
pub use crate::device::ledger::{Moment, Parts};
use crate::error::{Error, Result};
use crate::formats::peft::PeftConfig;
use crate::nn::{Batch, Decoder, ModelSpec, Tokens};
use crate::tensor::element_count;

const OP: &str = "plan";

/// Cap on the bytes of a plan's further batches, so that sums don't overflow. No device has as
/// many.
const MOST_BYTES: u64 = 1 << 60;

/// Percentage of a device's memory that [`Plan::fit`] fills. The rest is for the driver, the
/// desktop and other programs.
pub const MEMORY_PERCENT: u64 = 90;

/// Micro-batches of a step, all of the same shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MicroBatches {
    /// Number of micro-batches per step.
    pub count: usize,
    /// Sequences in each.
    pub rows: usize,
    /// Tokens per sequence, padding included.
    pub tokens: usize,
}

/// Memory of a training run on a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// The micro-batches that were planned for.
    pub batches: MicroBatches,
    /// Maximum of each part.
    pub most: Parts,
    /// Each part at the peak of their sum.
    pub at_peak: Parts,
    /// Phase of the peak.
    pub moment: Moment,
    /// Sum of `at_peak`.
    pub peak_bytes: u64,
    /// Maximum held by the device's pool, including freed memory that it keeps for reuse.
    pub held_bytes: u64,
}

impl Plan {
    /// Plans training an adapter with this configuration on the model.
    ///
    /// # Errors
    /// Those that the run would end with: [`Error::TooLarge`] for a tensor over the device's
    /// binding limit, [`Error::Invalid`] for sequences longer than the model's, an adapter that
    /// fits no layer, or a batch without tokens.
    pub fn new(
        model: &ModelSpec,
        adapter: &PeftConfig,
        batches: MicroBatches,
        options: &TrainOptions,
        device: &Device,
    ) -> Result<Plan> {
        let MicroBatches { count, rows, tokens } = batches;
        if count == 0 || rows == 0 || tokens == 0 {
            let got = format!("{count} micro-batches of {rows} rows of {tokens} tokens");
            return Err(Error::invalid(OP, "the step", got, "it needs at least one token"));
        }
        model.config().check_positions(OP, tokens)?;
        let width = model.config().hidden_size;
        element_count(&[element_count(&[rows, tokens])?, width])?;

        let ledger = Ledger::new(Part::Base);
        let device = device.planned(&ledger);
        let mut model = Decoder::planned(&device, model)?;
        // A longer rotary table replaces the first one when a sequence needs it.
        model.rope_table(tokens)?;
        ledger.count_for(Part::Activations);
        model.attach("plan", adapter, 0)?;
        for (_, tensor) in model.parameters_mut() {
            tensor.count_as(Part::Adapters);
        }
        let row = Tokens::new(vec![0; rows * tokens], rows)?;
        let labels = vec![0; rows * tokens];
        // From the third micro-batch on, everything is as in the second. Their batches live as
        // long, so they add a constant.
        let (mut made, mut each) = (Vec::<Batch>::new(), 0);
        for _ in 0..count.min(2) {
            let before = device.memory().live_bytes;
            made.push(model.batch(&row, Some(&labels))?);
            each = device.memory().live_bytes - before;
        }
        let others = each.saturating_mul((count - made.len()) as u64).min(MOST_BYTES);
        let mut trainer = Trainer::new(*options);
        // The first step creates the optimizer's moments; from the second on they exist.
        for _ in 0..2 {
            trainer.step(&mut model, &made)?;
        }
        let Tally { mut most, mut at_peak, moment, .. } = ledger.tally();
        [&mut most, &mut at_peak].into_iter().for_each(|parts| parts.activations += others);
        let held_bytes = device.memory().peak_held_bytes + others;
        Ok(Plan { batches, most, at_peak, moment, peak_bytes: at_peak.total(), held_bytes })
    }

    /// Plans the largest micro-batch of 1, 2, 4 or 8 rows that holds at most [`MEMORY_PERCENT`] of
    /// `memory` bytes, or one row if none does. The other numbers are those of `batches`.
    ///
    /// # Errors
    /// Those of planning one row.
    pub fn fit(
        model: &ModelSpec,
        adapter: &PeftConfig,
        batches: MicroBatches,
        options: &TrainOptions,
        device: &Device,
        memory: u64,
    ) -> Result<Plan> {
        let of_rows = |rows| Plan::new(model, adapter, MicroBatches { rows, ..batches }, options, device);
        let mut best = of_rows(1)?;
        for rows in [2, 4, 8] {
            match of_rows(rows) {
                Ok(plan) if plan.fits(memory) => best = plan,
                Ok(_) | Err(Error::TooLarge { .. }) => break,
                Err(error) => return Err(error),
            }
        }
        let MicroBatches { count, rows, tokens } = best.batches;
        tracing::info!(
            rows,
            count,
            tokens,
            held_bytes = best.held_bytes,
            memory_bytes = memory,
            "micro-batches chosen"
        );
        Ok(best)
    }

    /// Whether the run holds at most [`MEMORY_PERCENT`] of `memory` bytes.
    pub fn fits(&self, memory: u64) -> bool {
        u128::from(self.held_bytes) * 100 <= u128::from(memory) * u128::from(MEMORY_PERCENT)
    }
}
