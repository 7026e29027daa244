//! Finds out how many lanes a driver uses for a pipeline with cooperative matrices. The shader
//! divides its work among subgroups of a known size, but drivers that support several sizes choose
//! one per pipeline.

use super::raw::Raw;
use super::shader::{Access, Kernel};
use crate::error::Result;

/// Bytes of a dummy buffer for an operand: more than one element of any type.
const BYTES: u64 = 256;

/// Runs one workgroup of a pipeline without any work. The shader then stores the size of its
/// subgroups as an f32 in its last buffer (`each_group` of `shaders/shared/coop.wgsl`).
pub(super) fn measured(
    raw: &Raw,
    label: &str,
    kernel: &Kernel,
    pipeline: &wgpu::ComputePipeline,
    layout: &wgpu::BindGroupLayout,
) -> Result<u32> {
    let immediates = raw.limits.immediates;
    let (staging, submission) = raw.scoped(label, |device| {
        let buffer = |size, usage| {
            device.create_buffer(&wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false })
        };
        let storage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
        let mut operands: Vec<_> = kernel.bindings.iter().map(|_| buffer(BYTES, storage)).collect();
        let answer = operands.iter().zip(kernel.bindings).rfind(|(_, (_, access))| *access == Access::Write);
        let answer = answer.map(|(buffer, _)| buffer.clone());
        let parameters = u64::from(raw.limits.uniform_alignment);
        operands.extend((!immediates).then(|| buffer(parameters, wgpu::BufferUsages::UNIFORM)));
        let entries: Vec<_> = (0..)
            .zip(&operands)
            .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() })
            .collect();
        let group =
            device.create_bind_group(&wgpu::BindGroupDescriptor { label: Some(label), layout, entries: &entries });
        let staging = buffer(BYTES, wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST);
        let mut encoder = device.create_command_encoder(&Default::default());
        {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            pass.set_pipeline(pipeline);
            if immediates {
                pass.set_bind_group(0, &group, &[]);
                pass.set_immediates(0, &vec![0; kernel.params_bytes]);
            } else {
                pass.set_bind_group(0, &group, &[0]);
            }
            pass.dispatch_workgroups(1, 1, 1);
        }
        if let Some(answer) = answer {
            encoder.copy_buffer_to_buffer(&answer, 0, &staging, 0, BYTES);
        }
        let submission = raw.queue.submit([encoder.finish()]);
        staging.map_async(wgpu::MapMode::Read, .., |_| {});
        (staging, submission)
    })?;
    let wait = wgpu::PollType::Wait { submission_index: Some(submission), timeout: None };
    let polled = raw.scoped(label, |device| device.poll(wait))?;
    polled.map_err(|error| raw.error(label, error.to_string()))?;
    let view = staging.get_mapped_range(..).map_err(|error| raw.error(label, error.to_string()))?;
    let lanes: f32 = bytemuck::pod_read_unaligned(&view[..4]);
    Ok(lanes as u32)
}
