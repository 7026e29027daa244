//! [`adamw`](super::adamw) of three tensors in one dispatch: a model has hundreds of small ones, and each dispatch costs the host
//! as much as any other. Bits are those of one at a time.

use super::adamw::AdamWParams;
use super::{kernel, params, quads, takes_several};
use crate::device::{Buffer, Dispatch, Gpu};
use crate::error::Result;

params! {
    struct AdamWSeveralParams {
        first_group: u32,
        groups: u32,
        /// Workgroup where the second tensor begins.
        first1: u32,
        /// And the third.
        first2: u32,
        /// Values of each, in fours, rounded up.
        quads0: u32,
        quads1: u32,
        quads2: u32,
        /// As in `AdamWParams`, from here on.
        decay: f32,
        new1: f32,
        beta2: f32,
        new2: f32,
        step_size: f32,
        root2: f32,
        eps: f32,
    }
}

kernel! {
    /// `shaders/adamw_several.wgsl`
    KERNEL = "adamw_several", AdamWSeveralParams, [
        norm: Read,
        param0: Write, grad0: Read, m0: Write, v0: Write,
        param1: Write, grad1: Read, m1: Write, v1: Write,
        param2: Write, grad2: Read, m2: Write, v2: Write,
    ]
}

/// Tensors a dispatch.
pub(super) const TENSORS: usize = 3;

/// Whether a device takes several tensors at a time.
pub(super) fn fits(gpu: &Gpu) -> bool {
    takes_several(gpu, &KERNEL)
}

/// Records the update of tensors of `lens` values; `buffers` are the norm, and the parameter, gradient, m and v of each.
pub(super) fn dispatch(
    gpu: &Gpu,
    buffers: &[&Buffer; 1 + 4 * TENSORS],
    lens: [usize; TENSORS],
    step: &AdamWParams,
) -> Result<()> {
    let quads = lens.map(quads::count);
    let groups = quads.map(|quads| quads.div_ceil(quads::THREADS));
    let params = AdamWSeveralParams {
        first1: groups[0],
        first2: groups[0] + groups[1],
        quads0: quads[0],
        quads1: quads[1],
        quads2: quads[2],
        decay: step.decay,
        new1: step.new1,
        beta2: step.beta2,
        new2: step.new2,
        step_size: step.step_size,
        root2: step.root2,
        eps: step.eps,
        ..Default::default()
    };
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &quads::defines(),
        buffers,
        params: bytemuck::bytes_of(&params),
        groups: groups.iter().map(|&groups| u64::from(groups)).sum(),
        flops_per_group: 64 * u64::from(quads::THREADS),
    })
}
