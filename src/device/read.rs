//! Reads buffers back to the host.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use super::buffer::Buffer;
use super::gpu::Gpu;
use super::ledger::no_values;
use crate::error::Result;

/// Wait between two checks whether a buffer is mapped.
const POLL_INTERVAL: Duration = Duration::from_micros(20);

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

impl Gpu {
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
                Some(mapped) => Poll::Ready(mapped.map_err(|message| self.raw().error("reading back", message))),
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
        let mut recorder = self.recorder();
        let staging = self.raw().scoped_alloc("readback buffer", size, |device| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("readback"),
                size: size.max(4),
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        })?;
        recorder.encoder(self.raw())?.copy_buffer_to_buffer(buffer.raw(), 0, &staging, 0, size);
        let submission = self.submit(&mut recorder)?;
        self.pipelines().restart_trail();
        let state = Arc::new(Mutex::new(ReadState::default()));
        let shared = state.clone();
        self.raw().scoped("reading back", |_| {
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
                Some(Err(message)) => return Err(self.raw().error("reading back", message)),
                // Another thread's poll has taken our callback and is about to run it.
                None => std::thread::sleep(POLL_INTERVAL),
            }
        }
    }

    fn copied(&self, read: Read) -> Result<Vec<u8>> {
        let view =
            read.staging.get_mapped_range(..).map_err(|error| self.raw().error("reading back", error.to_string()))?;
        let bytes = view[..read.bytes].to_vec();
        drop(view);
        let _turn = self.raw().turn();
        drop(read);
        Ok(bytes)
    }
}
