//! What a training run needs in memory, before it is loaded.
//!
//! Nothing is fitted: a plan is a training step without values. It records the tape of a step ([`crate::autograd`]), frees
//! what the way back frees, and asks a pool like the device's for the sizes that layers and kernels ask for, kernels' scratch
//! memory included; only the bytes are counted. Matrices count with what the headers of their files say
//! ([`ModelSpec`]).
//!
//! Memory is largest at one of three moments. Without checkpoints it is at the end of the forward pass, when all layers have
//! saved what their backward needs: at the loss, where a chunk of logits is there too, or where the way back begins, in the
//! last layer, whose gradients come on top. With checkpoints only the inputs of the layers are there at the loss, and a layer
//! that runs again on the way back may weigh more than the logits; gradients of adapters gather meanwhile, so that it
//! may be the first layer. From the second micro-batch on all gradients are there from the start.
//!
//! Two numbers matter. [`Plan::peak_bytes`] is what tensors and matrices take at the worst moment: the `peak_bytes` of
//! [`MemoryCounters`](crate::device::MemoryCounters). A device's pool keeps freed memory for the next tensor of that size, so
//! that a process holds more: [`Plan::held_bytes`], the `peak_held_bytes` there, and what should fit. Not counted are what a
//! driver takes for itself, files that are mapped (the system may drop their pages), and while a model is loaded, one of its
//! matrices in host memory.

mod ledger;
mod linear;
mod step;

use serde::Serialize;

use self::ledger::{Ledger, Part, Seen};
pub use self::ledger::{Moment, Parts};
use self::step::Model;
use super::TrainOptions;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::formats::peft::PeftConfig;
use crate::nn::{ModelConfig, ModelSpec};

const OP: &str = "plan";

/// The share of a device's memory that [`Plan::fit`] fills, in percent: the rest is for the driver, the desktop and others.
pub const MEMORY_PERCENT: u64 = 90;

/// The micro-batches of a step, all of one shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MicroBatches {
    /// How many make a step.
    pub count: usize,
    /// Sequences of each.
    pub rows: usize,
    /// Tokens a sequence, padding included.
    pub tokens: usize,
}

/// What a training run takes on a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// For these steps.
    pub batches: MicroBatches,
    /// The most that each part takes.
    pub most: Parts,
    /// What each part takes when all together take most.
    pub at_peak: Parts,
    /// When that is.
    pub moment: Moment,
    /// The sum of `at_peak`.
    pub peak_bytes: u64,
    /// The most that the device's pool holds, with freed memory that it keeps for reuse.
    pub held_bytes: u64,
}

impl Plan {
    /// What it takes to train an adapter of this configuration on the model.
    ///
    /// # Errors
    /// Those that the run would end with: [`Error::TooLarge`] for a tensor over the device's binding limit,
    /// [`Error::Invalid`] for sequences longer than the model's, an adapter that fits no layer, and a batch without tokens.
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
            return Err(Error::Invalid { op: OP, what: "the step", got, expected: "it has at least one token".into() });
        }
        model.config().check_positions(OP, tokens)?;
        crate::tensor::element_count(&[rows, tokens])?;

        let ledger = Ledger::new(device);
        let mut trained = Model::new(&ledger, model, adapter, tokens)?;
        let _batches = ledger.fixed(Part::Activations, batch_bytes(&ledger, model.config(), &batches)?);
        // The optimizer's moments come with the first step; the second finds them.
        for _ in 0..2 {
            trained.step(&batches, options.checkpoint_activations)?;
        }
        let Seen { most, at_peak, moment, held } = ledger.seen();
        Ok(Plan { batches, most, at_peak, moment, peak_bytes: at_peak.total(), held_bytes: held })
    }

    /// The plan of the largest micro-batch, of 1, 2, 4 or 8 rows, that holds at most [`MEMORY_PERCENT`] of `memory` bytes;
    /// that of one row if none does. The other numbers are those of `batches`.
    ///
    /// # Errors
    /// Those of one row.
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

/// Bytes of the micro-batches of a step, which are on the device together: ids, positions, labels, and for every
/// visibility the range of keys of each query, and on a GPU that of queries of each key.
fn batch_bytes(ledger: &Ledger, config: &ModelConfig, batches: &MicroBatches) -> Result<u64> {
    let &MicroBatches { count, rows, tokens } = batches;
    let m = rows * tokens;
    let windowed = config.sliding_window().is_some_and(|window| window < tokens);
    let all_windowed = windowed && config.windows.iter().all(Option::is_some);
    let visibilities = 1 + u64::from(windowed);
    let ways_back = match ledger.device {
        Device::Cpu(_) => 0,
        Device::Gpu(_) => visibilities - u64::from(all_windowed),
    };
    let batch = 3 * ledger.index_bytes(m)? + (visibilities + ways_back) * ledger.index_bytes(2 * m)?;
    Ok(batch.saturating_mul(count as u64))
}
