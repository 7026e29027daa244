//! Recording: dispatches gather in one encoder and are submitted in batches. Reading back is the
//! only wait.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use super::gpu::{Buffer, Gpu, MAX_PARAMS_BYTES};
use super::ledger::no_values;
use super::pipeline::{Bound, Pipeline};
use super::profile::{self, Stamps};
use super::shader::{Defines, Kernel};
use super::tier::Tier;
use crate::error::Result;

/// Maximum dispatches per submission: enough for one token of a 100-layer model.
pub(super) const BATCH: usize = 2048;
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

/// Work that has been recorded and not yet submitted.
#[derive(Default)]
pub(super) struct Recorder {
    // The open pass, with the pipeline that is set. It stays open across dispatches and must end
    // before its encoder does.
    pass: Option<(wgpu::ComputePass<'static>, Arc<Pipeline>)>,
    encoder: Option<wgpu::CommandEncoder>,
    dispatches: usize,
    /// Floating-point operations of the recorded dispatches.
    flops: u64,
    /// Floating-point operations of all dispatches so far.
    total_flops: u64,
    /// Number of submissions so far.
    submissions: u64,
    /// Parameters of the batch on devices without immediates: one slot of `uniform_alignment`
    /// bytes per dispatch.
    uniforms: Vec<u8>,
    uniform_buffer: Option<wgpu::Buffer>,
    /// Set while profiling.
    stamps: Option<Stamps>,
}

/// Wait between two checks whether a buffer is mapped.
const POLL_INTERVAL: Duration = Duration::from_micros(20);

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
        let recorder = &mut *self.recorder().lock().unwrap_or_else(PoisonError::into_inner);

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
            let offset = recorder.stage_uniform(self, params);
            let pass = recorder.pass(self, call.kernel.name, &bound.pipeline)?;
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
        let pipeline = self.pipelines().get(self, call.kernel, call.defines)?;
        let uniforms = if self.immediates() { None } else { Some(self.uniforms()?) };
        let group = pipeline.bind_group(self, call.buffers, uniforms.as_ref())?;
        let bound = Bound { pipeline, group };
        self.pipelines().note(call.buffers, &bound);
        Ok(bound)
    }

    /// Submits the recorded work without waiting for it.
    pub fn flush(&self) -> Result<()> {
        self.submit(&mut self.recorder().lock().unwrap_or_else(PoisonError::into_inner)).map(drop)
    }

    /// Number of submissions so far.
    pub fn submissions(&self) -> u64 {
        self.recorder().lock().unwrap_or_else(PoisonError::into_inner).submissions
    }

    /// Floating-point operations per second that the device at least reaches; 0 if unknown.
    fn speed(&self) -> u64 {
        let discrete = self.info().device_type == wgpu::DeviceType::DiscreteGpu;
        self.tuner().speed().max(if discrete { DISCRETE_SPEED } else { 0 })
    }

    /// Floating-point operations of all dispatches so far.
    pub(super) fn recorded_flops(&self) -> u64 {
        self.recorder().lock().unwrap_or_else(PoisonError::into_inner).total_flops
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

    fn poll(&self, how: wgpu::PollType) -> Result<()> {
        let polled = self.scoped("waiting for the device", |device| device.poll(how))?;
        polled.map_err(|error| self.error("waiting for the device", error.to_string()))?;
        self.check()
    }

    /// Returns the buffer for the batch's parameters, on devices without immediates.
    fn uniforms(&self) -> Result<wgpu::Buffer> {
        let mut recorder = self.recorder().lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(buffer) = &recorder.uniform_buffer {
            return Ok(buffer.clone());
        }
        let buffer = self.scoped("parameters", |device| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("parameters"),
                size: u64::from(self.limits().uniform_alignment) * BATCH as u64,
                usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        })?;
        Ok(recorder.uniform_buffer.insert(buffer).clone())
    }

    /// Submits the recorded work; returns `None` if nothing was recorded.
    fn submit(&self, recorder: &mut Recorder) -> Result<Option<wgpu::SubmissionIndex>> {
        // Returns an earlier error before the batch is taken, so that the batch isn't lost.
        self.check()?;
        recorder.pass = None;
        let Some(mut encoder) = recorder.encoder.take() else { return Ok(None) };
        (recorder.dispatches, recorder.flops) = (0, 0);
        recorder.submissions += 1;
        if let Some(stamps) = &mut recorder.stamps {
            stamps.close(self, &mut encoder)?;
        }
        let uniforms = std::mem::take(&mut recorder.uniforms);
        let submitted = self.scoped("submitting commands", |_| {
            if let (Some(buffer), false) = (&recorder.uniform_buffer, uniforms.is_empty()) {
                self.wgpu_queue().write_buffer(buffer, 0, &uniforms);
            }
            Some(self.wgpu_queue().submit([encoder.finish()]))
        });
        self.forget_retired();
        // The tensors of a lost batch have no values, so the next caller gets the error too.
        submitted.inspect_err(|error| self.remember(error))
    }

    /// Reads the first `bytes` of a buffer, once everything recorded before has run.
    pub(crate) async fn read_async(&self, buffer: &Buffer, bytes: u64) -> Result<Vec<u8>> {
        let read = self.start_read(buffer, bytes)?;
        poll_fn(|context| {
            // Native wgpu only calls back while a thread polls the device.
            if let Err(error) = self.poll(wgpu::PollType::Poll) {
                return Poll::Ready(Err(error));
            }
            let mut state = read.state.lock().unwrap_or_else(PoisonError::into_inner);
            match state.mapped.take() {
                Some(mapped) => Poll::Ready(mapped.map_err(|message| self.error("reading back", message))),
                None => {
                    state.waker = Some(context.waker().clone());
                    if cfg!(not(target_arch = "wasm32")) {
                        std::thread::sleep(POLL_INTERVAL);
                        context.waker().wake_by_ref();
                    }
                    Poll::Pending
                }
            }
        })
        .await?;
        self.copied(read)
    }

    /// Like [`Gpu::read_async`], but blocking.
    pub(crate) fn read(&self, buffer: &Buffer, bytes: u64) -> Result<Vec<u8>> {
        self.finish_read(self.start_read(buffer, bytes)?)
    }

    /// Submits the recorded work and a copy of the first `bytes` of a buffer. [`Gpu::finish_read`]
    /// returns the bytes.
    pub(crate) fn start_read(&self, buffer: &Buffer, bytes: u64) -> Result<Read> {
        if self.is_planned() {
            return Err(no_values(self.name()));
        }
        let size = bytes.next_multiple_of(4);
        let mut recorder = self.recorder().lock().unwrap_or_else(PoisonError::into_inner);
        let staging = self.scoped_alloc("readback buffer", size, |device| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("readback"),
                size: size.max(4),
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        })?;
        recorder.encoder(self)?.copy_buffer_to_buffer(buffer.raw(), 0, &staging, 0, size);
        let submission = self.submit(&mut recorder)?;
        self.pipelines().restart_trail();
        let state = Arc::new(Mutex::new(ReadState::default()));
        let shared = state.clone();
        self.scoped("reading back", |_| {
            staging.map_async(wgpu::MapMode::Read, .., move |result| {
                let mut state = shared.lock().unwrap_or_else(PoisonError::into_inner);
                state.mapped = Some(result.map_err(|error| error.to_string()));
                if let Some(waker) = state.waker.take() {
                    waker.wake();
                }
            });
        })?;
        Ok(Read { staging, bytes: bytes as usize, submission, state })
    }

    /// Waits for the copy, but not for work submitted after it.
    pub(crate) fn finish_read(&self, read: Read) -> Result<Vec<u8>> {
        loop {
            self.poll(wgpu::PollType::Wait { submission_index: read.submission.clone(), timeout: None })?;
            let mapped = read.state.lock().unwrap_or_else(PoisonError::into_inner).mapped.take();
            match mapped {
                Some(Ok(())) => return self.copied(read),
                Some(Err(message)) => return Err(self.error("reading back", message)),
                // Another thread's poll has taken our callback and is about to run it.
                None => std::thread::sleep(POLL_INTERVAL),
            }
        }
    }

    fn copied(&self, read: Read) -> Result<Vec<u8>> {
        let view = read.staging.get_mapped_range(..).map_err(|error| self.error("reading back", error.to_string()))?;
        let bytes = view[..read.bytes].to_vec();
        drop(view);
        let _turn = self.turn();
        drop(read);
        Ok(bytes)
    }

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
        let queries = profile::query_set(self, 2)?;
        self.record(|encoder| encoder.write_timestamp(&queries, 0))?;
        work()?;
        self.record(|encoder| encoder.write_timestamp(&queries, 1))?;
        let resolved = self.record(|encoder| profile::resolve(self, encoder, &queries, 2))??;
        let times = self.timestamps(&resolved)?;
        Ok(Duration::from_nanos((times[1] - times[0]).max(0.0) as u64))
    }

    /// Records a command other than a dispatch.
    pub(super) fn record<T>(&self, command: impl FnOnce(&mut wgpu::CommandEncoder) -> T) -> Result<T> {
        let mut recorder = self.recorder().lock().unwrap_or_else(PoisonError::into_inner);
        Ok(command(recorder.encoder(self)?))
    }

    /// Whether dispatches are being timed.
    pub(super) fn is_profiling(&self) -> bool {
        self.recorder().lock().unwrap_or_else(PoisonError::into_inner).stamps.is_some()
    }

    /// Starts or stops timing dispatches; returns the timestamps taken so far.
    pub(super) fn stamp(&self, stamps: Option<Stamps>) -> Option<Stamps> {
        std::mem::replace(&mut self.recorder().lock().unwrap_or_else(PoisonError::into_inner).stamps, stamps)
    }
}

impl Recorder {
    /// Returns the encoder, outside any pass.
    fn encoder(&mut self, gpu: &Gpu) -> Result<&mut wgpu::CommandEncoder> {
        self.pass = None;
        self.any_encoder(gpu)
    }

    /// Returns the encoder, possibly with an open pass.
    fn any_encoder(&mut self, gpu: &Gpu) -> Result<&mut wgpu::CommandEncoder> {
        let encoder = match self.encoder.take() {
            Some(encoder) => encoder,
            None => gpu.scoped("command encoder", |device| device.create_command_encoder(&Default::default()))?,
        };
        Ok(self.encoder.insert(encoder))
    }

    /// Returns the pass for a dispatch of `kernel`, with this pipeline set: the open pass, or
    /// while profiling one of its own.
    fn pass(
        &mut self,
        gpu: &Gpu,
        kernel: &'static str,
        pipeline: &Arc<Pipeline>,
    ) -> Result<&mut wgpu::ComputePass<'static>> {
        let mut pass = match (self.pass.take(), self.stamps.take()) {
            (open, Some(mut stamps)) => {
                drop(open);
                let pass = stamps.pass(gpu, self.any_encoder(gpu)?, kernel);
                self.stamps = Some(stamps);
                pass?
            }
            (Some((pass, set)), None) if Arc::ptr_eq(&set, pipeline) => {
                return Ok(&mut self.pass.insert((pass, set)).0);
            }
            (Some((pass, _)), None) => pass,
            (None, None) => self.any_encoder(gpu)?.begin_compute_pass(&Default::default()).forget_lifetime(),
        };
        pass.set_pipeline(&pipeline.raw);
        Ok(&mut self.pass.insert((pass, pipeline.clone())).0)
    }

    /// Puts the parameters in the batch's buffer and returns their offset, or `None` with
    /// immediates.
    fn stage_uniform(&mut self, gpu: &Gpu, params: &[u8]) -> Option<u32> {
        if gpu.immediates() {
            return None;
        }
        let offset = self.uniforms.len();
        self.uniforms.extend_from_slice(params);
        self.uniforms.resize(offset + gpu.limits().uniform_alignment as usize, 0);
        Some(offset as u32)
    }
}

/// Bytes on their way to the host.
pub(crate) struct Read {
    staging: wgpu::Buffer,
    bytes: usize,
    submission: Option<wgpu::SubmissionIndex>,
    state: Arc<Mutex<ReadState>>,
}

#[derive(Default)]
struct ReadState {
    mapped: Option<Result<(), String>>,
    waker: Option<Waker>,
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
