//! Profiling: the time of each kernel on a device, by timestamp queries.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::commands::BATCH;
use super::gpu::Gpu;
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

/// Timestamps of dispatches while profiling. Each dispatch is a pass of its own with two
/// timestamps.
#[derive(Default)]
pub(super) struct Stamps {
    /// Queries of the batch being recorded, and its kernels.
    open: Option<(wgpu::QuerySet, Vec<&'static str>)>,
    /// Timestamps of submitted batches.
    done: Vec<(wgpu::Buffer, Vec<&'static str>)>,
}

impl Stamps {
    /// Begins the pass of the next dispatch, for `kernel`.
    pub(super) fn pass(
        &mut self,
        gpu: &Gpu,
        encoder: &mut wgpu::CommandEncoder,
        kernel: &'static str,
    ) -> Result<wgpu::ComputePass<'static>> {
        let (queries, kernels) = match self.open.take() {
            Some(open) => open,
            None => (query_set(gpu, 2 * BATCH as u32)?, Vec::new()),
        };
        let (queries, kernels) = self.open.insert((queries, kernels));
        let first = 2 * kernels.len() as u32;
        kernels.push(kernel);
        let descriptor = wgpu::ComputePassDescriptor {
            label: Some(kernel),
            timestamp_writes: Some(wgpu::ComputePassTimestampWrites {
                query_set: queries,
                beginning_of_pass_write_index: Some(first),
                end_of_pass_write_index: Some(first + 1),
            }),
        };
        Ok(encoder.begin_compute_pass(&descriptor).forget_lifetime())
    }

    /// Ends the batch: copies its timestamps to a buffer.
    pub(super) fn close(&mut self, gpu: &Gpu, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        let Some((queries, kernels)) = self.open.take() else { return Ok(()) };
        self.done.push((resolve(gpu, encoder, &queries, 2 * kernels.len() as u32)?, kernels));
        Ok(())
    }
}

/// Makes a query set for this many timestamps.
pub(super) fn query_set(gpu: &Gpu, count: u32) -> Result<wgpu::QuerySet> {
    gpu.scoped("timestamp queries", |device| {
        device.create_query_set(&wgpu::QuerySetDescriptor {
            label: Some("timestamps"),
            ty: wgpu::QueryType::Timestamp,
            count,
        })
    })
}

/// Records a copy of the first `count` timestamps to a buffer.
pub(super) fn resolve(
    gpu: &Gpu,
    encoder: &mut wgpu::CommandEncoder,
    queries: &wgpu::QuerySet,
    count: u32,
) -> Result<wgpu::Buffer> {
    let resolved = gpu.scoped("timestamps", |device| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("timestamps"),
            size: u64::from(count) * 8,
            usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        })
    })?;
    encoder.resolve_query_set(queries, 0..count, &resolved, 0);
    Ok(resolved)
}

impl Gpu {
    /// Whether the device can tell when a kernel began and ended.
    pub(super) fn has_timestamps(&self) -> bool {
        let features = wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS;
        self.wgpu_device().features().contains(features)
    }

    /// Returns the timestamps that [`resolve`] has put in a buffer, in nanoseconds from an
    /// arbitrary start.
    pub(super) fn timestamps(&self, resolved: &wgpu::Buffer) -> Result<Vec<f64>> {
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
        self.stamp(Some(Stamps::default()));
        let start = Instant::now();
        let worked = work().and_then(|()| self.wait());
        let wall = start.elapsed();
        let stamps = self.stamp(None).unwrap_or_default();
        worked?;
        let mut sums = BTreeMap::<_, (usize, f64)>::new();
        for (resolved, kernels) in &stamps.done {
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
