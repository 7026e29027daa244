//! [`adamw`](crate::kernels::optim::adamw) for three tensors in one dispatch: a model has hundreds
//! of small tensors, and each dispatch costs the host the same. The results equal single updates to
//! the bit.

use super::settings::AdamWParams;
use crate::device::{Buffer, Dispatch, Gpu, Tier};
use crate::error::Result;
use crate::kernels::elementwise::quads;
use crate::kernels::{kernel, params, takes_several};

params! {
    struct AdamWSeveralParams {
        first_group: u32,
        groups: u32,
        /// First workgroup of the second tensor.
        first1: u32,
        /// First workgroup of the third tensor.
        first2: u32,
        /// Number of values / 4 of each tensor, rounded up.
        quads0: u32,
        quads1: u32,
        quads2: u32,
        /// This and the fields below: as in `AdamWParams`.
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
    KERNEL = "adamw_several" in "optim/adamw_several.wgsl", AdamWSeveralParams, [
        norm: Read,
        param0: Write, grad0: Read, m0: Write, v0: Write,
        param1: Write, grad1: Read, m1: Write, v1: Write,
        param2: Write, grad2: Read, m2: Write, v2: Write,
    ],
    variants: |tier| if tier == Tier::Software { Vec::new() } else { vec![quads::defines()] },
    twin: super::adamw::tests::twin_of_several,
}

/// Tensors per dispatch.
pub(crate) const TENSORS: usize = 3;

/// Whether a device can bind several tensors at a time, and gains by it.
pub(crate) fn fits(gpu: &Gpu) -> bool {
    takes_several(gpu, &KERNEL)
}

/// Records the update of tensors of `lens` values. `buffers` are the norm, then the parameter,
/// gradient, m and v of each tensor.
pub(crate) fn dispatch(
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
