//! Profiling: the time of each kernel on a device, by timestamp queries.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::gpu::Gpu;
use super::recorder::BATCH;
use super::stamps::{Stamps, query_set, resolve};
use crate::error::{Error, Result};

/// Result of [`Gpu::profile`].
#[derive(Clone, Debug)]
pub struct Profile {
    /// From the start of the work until the device finished it.
    pub wall: Duration,
    /// Kernels, slowest first.
    pub kernels: Vec<KernelTime>,
}

/// Time of a kernel.
#[derive(Clone, Debug)]
pub struct KernelTime {
    /// Name of the kernel and of its shader.
    pub kernel: &'static str,
    /// Number of dispatches.
    pub dispatches: usize,
    /// Total time of its dispatches.
    pub time: Duration,
}

impl Profile {
    /// Total time of all kernels.
    pub(crate) fn in_kernels(&self) -> Duration {
        self.kernels.iter().map(|kernel| kernel.time).sum()
    }
}

impl Gpu {
    /// Measures the device time of the work that `work` records: by timestamp queries if
    /// available, otherwise from submission until it is done.
    pub(crate) fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        self.wait()?;
        if !self.has_timestamps() {
            let start = Instant::now();
            work()?;
            self.wait()?;
            return Ok(start.elapsed());
        }
        let queries = query_set(self.raw(), 2)?;
        self.record(|encoder| encoder.write_timestamp(&queries, 0))?;
        work()?;
        self.record(|encoder| encoder.write_timestamp(&queries, 1))?;
        let resolved = self.record(|encoder| resolve(self.raw(), encoder, &queries, 2))??;
        let times = self.timestamps(&resolved)?;
        Ok(Duration::from_nanos((times[1] - times[0]).max(0.0) as u64))
    }

    /// Whether dispatches are being timed.
    pub(super) fn is_profiling(&self) -> bool {
        self.recorder().stamps.is_some()
    }

    /// Starts or stops timing dispatches; returns the timestamps taken so far.
    fn stamp(&self, stamps: Option<Stamps>) -> Option<Stamps> {
        std::mem::replace(&mut self.recorder().stamps, stamps)
    }

    /// Whether the device can tell when a kernel began and ended.
    fn has_timestamps(&self) -> bool {
        let features = wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS;
        self.wgpu_device().features().contains(features)
    }

    /// Returns the timestamps that [`resolve`] has put in a buffer, in nanoseconds from an
    /// arbitrary start.
    fn timestamps(&self, resolved: &wgpu::Buffer) -> Result<Vec<f64>> {
        let ticks = self.alloc("timestamps", resolved.size())?;
        self.record(|encoder| encoder.copy_buffer_to_buffer(resolved, 0, ticks.raw(), 0, resolved.size()))?;
        let bytes = self.read(&ticks, resolved.size())?;
        let period = f64::from(self.wgpu_queue().get_timestamp_period());
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&bytes);
        Ok(ticks.into_iter().map(|tick| tick as f64 * period).collect())
    }

    /// Measures the time of each kernel in the work that `work` records. Each dispatch is a pass
    /// of its own, so everything takes a little longer than usual.
    ///
    /// # Errors
    /// [`Error::Unsupported`] on a device without timestamp queries; errors of `work`.
    pub(crate) fn profile(&self, work: impl FnOnce() -> Result<()>) -> Result<Profile> {
        if !self.has_timestamps() {
            return Err(Error::Unsupported {
                device: self.name().to_owned(),
                what: "time of each kernel".into(),
                hint: "its driver or backend has no timestamp queries".into(),
            });
        }
        self.wait()?;
        self.stamp(Some(Stamps::new(BATCH)));
        let start = Instant::now();
        let worked = work().and_then(|()| self.wait());
        let wall = start.elapsed();
        let done = self.stamp(None).map(|stamps| stamps.done).unwrap_or_default();
        worked?;
        let mut sums = BTreeMap::<_, (usize, f64)>::new();
        for (resolved, kernels) in &done {
            for (kernel, times) in kernels.iter().zip(self.timestamps(resolved)?.chunks_exact(2)) {
                let (dispatches, nanoseconds) = sums.entry(*kernel).or_default();
                *dispatches += 1;
                *nanoseconds += (times[1] - times[0]).max(0.0);
            }
        }
        let mut kernels: Vec<_> = sums
            .into_iter()
            .map(|(kernel, (dispatches, nanoseconds))| KernelTime {
                kernel,
                dispatches,
                time: Duration::from_nanos(nanoseconds as u64),
            })
            .collect();
        kernels.sort_by_key(|kernel| std::cmp::Reverse(kernel.time));
        Ok(Profile { wall, kernels })
    }
}
