//! Work that has been recorded and not yet submitted.

use std::sync::Arc;

use super::pipeline::Pipeline;
use super::raw::Raw;
use super::stamps::Stamps;
use crate::error::Result;

/// Maximum dispatches per submission: enough for one token of a 100-layer model.
pub(super) const BATCH: usize = 2048;

/// Dispatches and other commands, in one encoder.
#[derive(Default)]
pub(super) struct Recorder {
    /// The open pass, with the pipeline that is set. It stays open across dispatches and must end
    /// before its encoder does.
    pass: Option<(wgpu::ComputePass<'static>, Arc<Pipeline>)>,
    encoder: Option<wgpu::CommandEncoder>,
    /// Number of recorded dispatches.
    pub dispatches: usize,
    /// Floating-point operations of the recorded dispatches.
    pub flops: u64,
    /// Floating-point operations of all dispatches so far.
    pub total_flops: u64,
    /// Number of submissions so far.
    pub submissions: u64,
    /// Parameters of the batch on devices without immediates: one slot of `uniform_alignment`
    /// bytes per dispatch.
    uniforms: Vec<u8>,
    uniform_buffer: Option<wgpu::Buffer>,
    /// Set while profiling.
    pub stamps: Option<Stamps>,
}

impl Recorder {
    /// Returns the encoder, outside any pass.
    pub fn encoder(&mut self, raw: &Raw) -> Result<&mut wgpu::CommandEncoder> {
        self.pass = None;
        self.any_encoder(raw)
    }

    /// Returns the encoder, possibly with an open pass.
    fn any_encoder(&mut self, raw: &Raw) -> Result<&mut wgpu::CommandEncoder> {
        let encoder = match self.encoder.take() {
            Some(encoder) => encoder,
            None => raw.scoped("command encoder", |device| device.create_command_encoder(&Default::default()))?,
        };
        Ok(self.encoder.insert(encoder))
    }

    /// Returns the pass for a dispatch of `kernel`, with this pipeline set: the open pass, or
    /// while profiling one of its own.
    pub fn pass(
        &mut self,
        raw: &Raw,
        kernel: &'static str,
        pipeline: &Arc<Pipeline>,
    ) -> Result<&mut wgpu::ComputePass<'static>> {
        let mut pass = match (self.pass.take(), self.stamps.take()) {
            (open, Some(mut stamps)) => {
                drop(open);
                let pass = stamps.pass(raw, self.any_encoder(raw)?, kernel);
                self.stamps = Some(stamps);
                pass?
            }
            (Some((pass, set)), None) if Arc::ptr_eq(&set, pipeline) => {
                return Ok(&mut self.pass.insert((pass, set)).0);
            }
            (Some((pass, _)), None) => pass,
            (None, None) => self.any_encoder(raw)?.begin_compute_pass(&Default::default()).forget_lifetime(),
        };
        pass.set_pipeline(&pipeline.raw);
        Ok(&mut self.pass.insert((pass, pipeline.clone())).0)
    }

    /// Puts the parameters in the batch's buffer and returns their offset, or `None` with
    /// immediates.
    pub fn stage_uniform(&mut self, raw: &Raw, params: &[u8]) -> Option<u32> {
        if raw.limits.immediates {
            return None;
        }
        let offset = self.uniforms.len();
        self.uniforms.extend_from_slice(params);
        self.uniforms.resize(offset + raw.limits.uniform_alignment as usize, 0);
        Some(offset as u32)
    }

    /// The buffer for the batch's parameters, on devices without immediates.
    pub fn uniform_buffer(&mut self, raw: &Raw) -> Result<Option<wgpu::Buffer>> {
        if raw.limits.immediates || self.uniform_buffer.is_some() {
            return Ok(self.uniform_buffer.clone());
        }
        let buffer = raw.scoped("parameters", |device| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("parameters"),
                size: u64::from(raw.limits.uniform_alignment) * BATCH as u64,
                usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        })?;
        Ok(Some(self.uniform_buffer.insert(buffer).clone()))
    }

    /// Submits what has been recorded; returns `None` if there is nothing.
    pub fn submit(&mut self, raw: &Raw) -> Result<Option<wgpu::SubmissionIndex>> {
        // Returns an earlier error before the batch is taken, so that the batch isn't lost.
        raw.check()?;
        self.pass = None;
        let Some(mut encoder) = self.encoder.take() else { return Ok(None) };
        (self.dispatches, self.flops) = (0, 0);
        self.submissions += 1;
        if let Some(stamps) = &mut self.stamps {
            stamps.close(raw, &mut encoder)?;
        }
        let uniforms = std::mem::take(&mut self.uniforms);
        let submitted = raw.scoped("submitting commands", |_| {
            if let (Some(buffer), false) = (&self.uniform_buffer, uniforms.is_empty()) {
                raw.queue.write_buffer(buffer, 0, &uniforms);
            }
            Some(raw.queue.submit([encoder.finish()]))
        });
        // The tensors of a lost batch have no values, so the next caller gets the error too.
        submitted.inspect_err(|error| raw.remember(error))
    }
}
