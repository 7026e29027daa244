//! Shared code of the elementwise kernels, with one invocation for every four values;
//! `each_quad` of `shaders/shared/entry.wgsl`.

use crate::device::{Buffer, Defines, Dispatch, Gpu, Kernel, Tier};
use crate::error::Result;
use crate::kernels::params;

params! {
    /// Parameters of a kernel without any of its own.
    struct QuadParams {
        first_group: u32,
        groups: u32,
        /// Number of values / 4, rounded up.
        quads: u32,
    }
}

/// Values per task on the CPU.
pub(crate) const CPU_CHUNK: usize = 16 << 10;

/// Invocations per workgroup.
pub(crate) const THREADS: u32 = 64;

/// The text constants of every such kernel.
pub(crate) fn defines() -> Defines {
    Defines::new().with("threads", THREADS)
}

/// Text constants of every variant of such a kernel.
pub(crate) fn variants(_: Tier) -> Vec<Defines> {
    vec![defines()]
}

/// Number of vec4 that hold `len` values.
pub(crate) fn count(len: usize) -> u32 {
    len.div_ceil(4) as u32
}

/// Records a kernel over tensors of `len` values.
pub(crate) fn dispatch(gpu: &Gpu, kernel: &'static Kernel, buffers: &[&Buffer], len: usize) -> Result<()> {
    let params = QuadParams { quads: count(len), ..Default::default() };
    dispatch_with(gpu, kernel, buffers, len, bytemuck::bytes_of(&params))
}

/// Like [`dispatch`], with the kernel's own parameters, which contain `quads`.
pub(crate) fn dispatch_with(
    gpu: &Gpu,
    kernel: &'static Kernel,
    buffers: &[&Buffer],
    len: usize,
    params: &[u8],
) -> Result<()> {
    gpu.dispatch(Dispatch {
        kernel,
        defines: &defines(),
        buffers,
        params,
        groups: count(len).div_ceil(THREADS).into(),
        // Roughly the cost of loads and stores.
        flops_per_group: 64 * u64::from(THREADS),
    })
}
