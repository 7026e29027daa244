//! Commands of a GPU: dispatches and copies gather in one encoder and are submitted in batches.

use super::buffer::Buffer;
use super::gpu::Gpu;
use super::pipeline::Bound;
use super::raw::MAX_PARAMS_BYTES;
use super::recorder::{BATCH, Recorder};
use super::shader::{Defines, Kernel};
use super::tier::Tier;
use crate::error::Result;

/// Maximum floating-point operations of a submission with several dispatches, on a device of
/// unknown speed: enough for one token of a model with 15 billion parameters. Longer work starts
/// before all of it is recorded.
const BATCH_FLOPS: u64 = 32_000_000_000;
/// If the speed is known, a submission may take 5 ms, if that is more.
const BATCHES_PER_SECOND: u64 = 200;
/// Maximum floating-point operations of one dispatch on a device of unknown speed: about 0.2 s at
/// 100 GFLOP/s, so that no desktop watchdog stops it.
const MAX_FLOPS: u64 = 20_000_000_000;
/// If the speed is known, a dispatch may take a tenth of a second, if that is more. With less, a
/// fast device would have too little to do.
const DISPATCHES_PER_SECOND: u64 = 10;
/// Any discrete GPU of the last ten years reaches this speed, in floating-point operations per
/// second.
const DISCRETE_SPEED: u64 = 1_000_000_000_000;
/// Maximum floating-point operations of one dispatch on software drivers, which run at a tenth of
/// that speed. They have no watchdog, but other processes want the cores.
const MAX_FLOPS_SOFTWARE: u64 = 4_000_000_000;

/// One call of a kernel.
pub(crate) struct Dispatch<'a> {
    pub kernel: &'static Kernel,
    pub defines: &'a Defines,
    /// Buffers in the order of `kernel.bindings`.
    pub buffers: &'a [&'a Buffer],
    /// The kernel's `Params`, whose first two words are `first_group` and `groups`; the recorder
    /// fills them in.
    pub params: &'a [u8],
    /// Number of workgroups.
    pub groups: u64,
    /// Floating-point operations per workgroup; used to keep dispatches short.
    pub flops_per_group: u64,
}

impl Gpu {
    /// Records a dispatch, in several parts if it would run too long. [`Gpu::flush`] reports the
    /// driver's errors.
    pub(crate) fn dispatch(&self, call: Dispatch<'_>) -> Result<()> {
        debug_assert_eq!(call.params.len(), call.kernel.params_bytes);
        debug_assert_eq!(call.buffers.len(), call.kernel.bindings.len());
        if self.is_planned() {
            return Ok(());
        }
        #[cfg(test)]
        super::dispatched::note(call.kernel);
        let bound = match self.pipelines().expected(call.kernel, call.defines, call.buffers) {
            Some(bound) => bound,
            None => self.bind(&call)?,
        };
        let recorder = &mut *self.recorder();

        let (max_flops, batch_flops) = limits(self.tier(), self.speed());
        let part = (max_flops / call.flops_per_group.max(1)).clamp(1, u64::from(u32::MAX));
        let mut params = [0; MAX_PARAMS_BYTES as usize];
        let params = &mut params[..call.params.len()];
        params.copy_from_slice(call.params);
        let mut first = 0;
        while first < call.groups {
            let end = (first + part).min(call.groups);
            params[..4].copy_from_slice(&(first as u32).to_ne_bytes());
            params[4..8].copy_from_slice(&(end as u32).to_ne_bytes());
            let flops = (end - first) * call.flops_per_group;
            let full = recorder.dispatches >= BATCH || recorder.flops + flops > batch_flops;
            if full && recorder.dispatches > 0 {
                self.submit(recorder)?;
            }
            let offset = recorder.stage_uniform(self.raw(), params);
            let pass = recorder.pass(self.raw(), call.kernel.name, &bound.pipeline)?;
            match offset {
                Some(offset) => pass.set_bind_group(0, &bound.group, &[offset]),
                None => {
                    pass.set_bind_group(0, &bound.group, &[]);
                    pass.set_immediates(0, params);
                }
            }
            let (x, y) = fold(end - first, self.limits().max_workgroups);
            pass.dispatch_workgroups(x, y, 1);
            recorder.dispatches += 1;
            recorder.flops += flops;
            recorder.total_flops += flops;
            first = end;
        }
        Ok(())
    }

    /// Looks up or makes a dispatch's bindings, and keeps them for the next time.
    fn bind(&self, call: &Dispatch<'_>) -> Result<Bound> {
        // Compiled before the recorder is locked, because it takes long.
        let pipeline = self.pipelines().get(self.raw(), call.kernel, call.defines)?;
        let uniforms = self.recorder().uniform_buffer(self.raw())?;
        let group = pipeline.bind_group(self.raw(), call.buffers, uniforms.as_ref())?;
        let bound = Bound { pipeline, group };
        self.pipelines().note(call.buffers, &bound);
        Ok(bound)
    }

    /// Submits the recorded work without waiting for it.
    pub fn flush(&self) -> Result<()> {
        self.submit(&mut self.recorder()).map(drop)
    }

    /// Number of submissions so far.
    pub fn submissions(&self) -> u64 {
        self.recorder().submissions
    }

    /// Floating-point operations per second that the device at least reaches; 0 if unknown.
    fn speed(&self) -> u64 {
        let discrete = self.info().device_type == wgpu::DeviceType::DiscreteGpu;
        self.tuner().speed().max(if discrete { DISCRETE_SPEED } else { 0 })
    }

    /// Floating-point operations of all dispatches so far.
    pub(super) fn recorded_flops(&self) -> u64 {
        self.recorder().total_flops
    }

    /// Submits the recorded work and waits until the device has finished.
    pub(crate) fn wait(&self) -> Result<()> {
        self.flush()?;
        self.poll(wgpu::PollType::wait_indefinitely())
    }

    /// Allocates a buffer of `bytes` zero bytes (a multiple of 4) from the pool.
    pub(crate) fn zeroed(&self, what: &str, bytes: u64) -> Result<Buffer> {
        let buffer = self.alloc(what, bytes)?;
        if !self.is_planned() {
            self.record(|encoder| encoder.clear_buffer(buffer.raw(), 0, None))?;
        }
        Ok(buffer)
    }

    /// Returns another buffer with the same bytes.
    pub(crate) fn copy_of(&self, what: &str, buffer: &Buffer) -> Result<Buffer> {
        let copy = self.alloc(what, buffer.bytes())?;
        self.copy(buffer, 0, &copy, 0, buffer.bytes())?;
        Ok(copy)
    }

    /// Copies `bytes` between two different buffers. Size and places are multiples of 4.
    pub(crate) fn copy(&self, from: &Buffer, at: u64, to: &Buffer, to_at: u64, bytes: u64) -> Result<()> {
        if self.is_planned() {
            return Ok(());
        }
        self.record(|encoder| encoder.copy_buffer_to_buffer(from.raw(), at, to.raw(), to_at, bytes))
    }

    pub(super) fn poll(&self, how: wgpu::PollType) -> Result<()> {
        let polled = self.raw().scoped("waiting for the device", |device| device.poll(how))?;
        polled.map_err(|error| self.raw().error("waiting for the device", error.to_string()))?;
        self.raw().check()
    }

    /// Submits the recorded work; returns `None` if nothing was recorded.
    pub(super) fn submit(&self, recorder: &mut Recorder) -> Result<Option<wgpu::SubmissionIndex>> {
        let submitted = recorder.submit(self.raw());
        self.forget_retired();
        submitted
    }

    /// Records a command other than a dispatch.
    pub(super) fn record<T>(&self, command: impl FnOnce(&mut wgpu::CommandEncoder) -> T) -> Result<T> {
        let mut recorder = self.recorder();
        Ok(command(recorder.encoder(self.raw())?))
    }
}

/// Returns the maximum floating-point operations of a dispatch and of a submission, for a device
/// of this speed (0: unknown).
fn limits(tier: Tier, speed: u64) -> (u64, u64) {
    let dispatch =
        if tier == Tier::Software { MAX_FLOPS_SOFTWARE } else { MAX_FLOPS.max(speed / DISPATCHES_PER_SECOND) };
    (dispatch, BATCH_FLOPS.max(speed / BATCHES_PER_SECOND))
}

/// Splits `groups` workgroups into x and y within the limit. All rows of y are full; the shader
/// skips the surplus.
fn fold(groups: u64, max: u32) -> (u32, u32) {
    let y = groups.div_ceil(u64::from(max)).max(1);
    (groups.div_ceil(y) as u32, y as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dispatches_are_as_long_as_the_device_is_fast() {
        assert_eq!(limits(Tier::Plain, 0), (MAX_FLOPS, BATCH_FLOPS));
        // 40 GFLOP/s and 100 TFLOP/s.
        assert_eq!(limits(Tier::Plain, 40_000_000_000), (MAX_FLOPS, BATCH_FLOPS));
        assert_eq!(limits(Tier::Plain, 100_000_000_000_000), (10_000_000_000_000, 500_000_000_000));
        assert_eq!(limits(Tier::Software, 40_000_000_000), (MAX_FLOPS_SOFTWARE, BATCH_FLOPS));
    }

    #[test]
    fn folding_covers_every_group_within_the_limit() {
        for groups in [1, 2, 65_534, 65_535, 65_536, 65_537, 131_070, 131_071, 10_000_000] {
            let (x, y) = fold(groups, 65_535);
            assert!(x <= 65_535 && y <= 65_535);
            let covered = u64::from(x) * u64::from(y);
            assert!(covered >= groups && covered < groups + u64::from(y), "{groups}: {x} x {y}");
        }
    }
}
