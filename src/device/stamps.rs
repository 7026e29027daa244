//! Timestamp queries: recorded with dispatches, and resolved to buffers.

use super::raw::Raw;
use crate::error::Result;

/// Timestamps of dispatches while profiling. Each dispatch is a pass of its own with two
/// timestamps.
pub(super) struct Stamps {
    /// Maximum dispatches per submission.
    batch: usize,
    /// Queries of the batch being recorded, and its kernels.
    open: Option<(wgpu::QuerySet, Vec<&'static str>)>,
    /// Timestamps of submitted batches.
    pub done: Vec<(wgpu::Buffer, Vec<&'static str>)>,
}

impl Stamps {
    /// For submissions of at most `batch` dispatches.
    pub(super) fn new(batch: usize) -> Stamps {
        Stamps { batch, open: None, done: Vec::new() }
    }

    /// Begins the pass of the next dispatch, for `kernel`.
    pub(super) fn pass(
        &mut self,
        raw: &Raw,
        encoder: &mut wgpu::CommandEncoder,
        kernel: &'static str,
    ) -> Result<wgpu::ComputePass<'static>> {
        let (queries, kernels) = match self.open.take() {
            Some(open) => open,
            None => (query_set(raw, 2 * self.batch as u32)?, Vec::new()),
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
    pub(super) fn close(&mut self, raw: &Raw, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        let Some((queries, kernels)) = self.open.take() else { return Ok(()) };
        self.done.push((resolve(raw, encoder, &queries, 2 * kernels.len() as u32)?, kernels));
        Ok(())
    }
}

/// Makes a query set for this many timestamps.
pub(super) fn query_set(raw: &Raw, count: u32) -> Result<wgpu::QuerySet> {
    raw.scoped("timestamp queries", |device| {
        device.create_query_set(&wgpu::QuerySetDescriptor {
            label: Some("timestamps"),
            ty: wgpu::QueryType::Timestamp,
            count,
        })
    })
}

/// Records a copy of the first `count` timestamps to a buffer.
pub(super) fn resolve(
    raw: &Raw,
    encoder: &mut wgpu::CommandEncoder,
    queries: &wgpu::QuerySet,
    count: u32,
) -> Result<wgpu::Buffer> {
    let resolved = raw.scoped("timestamps", |device| {
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
