//! The kernels: one file for each, named like its shader in `shaders/`, with the formula, host
//! checks, dispatch, CPU twin and tests. [`matrix`] describes the layout of matrices on a device;
//! [`registry`] lists every kernel.
//!
//! Letters: M = tokens (rows of X), N = d_out (rows of W), K = d_in (columns of W), r = rank.

pub mod attention;
pub(crate) mod cpu;
pub mod elementwise;
#[cfg(test)]
mod golden;
pub mod lora;
pub mod loss;
pub mod matrix;
pub mod optim;
mod parity;
pub mod qmatmul;
#[cfg(test)]
mod real;
#[cfg(any(test, feature = "testing"))]
pub mod registry;
pub mod rows;

pub(crate) use cpu::scratch::Scratch;
pub use matrix::DeviceMatrix;
pub(crate) use parity::disagreement;
#[cfg(test)]
pub(crate) use real::Real;
pub(crate) use rows::factors::{RowFactors, Rows};

/// Declares a kernel's `Params`: the `#[repr(C)]` struct and its field offsets, which the registry
/// test compares with the shader's.
macro_rules! params {
    ($(#[$meta:meta])* struct $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
        pub(crate) struct $name {
            $($(#[$field_meta])* pub(crate) $field: $type,)*
        }

        impl $name {
            #[allow(dead_code, reason = "for a struct nested in another's Params, only the registry test uses it")]
            pub(crate) const FIELDS: &'static [(&'static str, usize)] =
                &[$((stringify!($field), std::mem::offset_of!($name, $field))),*];
        }

        const _: () = assert!(size_of::<$name>() <= crate::device::MAX_PARAMS_BYTES as usize);
    };
}

/// Declares a kernel: its name, its shader's path in `shaders/`, its `Params`, its storage buffers
/// in binding order, and the text constants of every variant that a tier may run. `twin` compares
/// the kernel with its CPU twin on a device; a test calls it for every device.
macro_rules! kernel {
    ($(#[$meta:meta])* $static:ident = $name:literal in $path:literal, $params:ty,
        [$($binding:ident: $access:ident),* $(,)?], variants: $variants:expr, twin: $twin:expr $(,)?) => {
        $(#[$meta])*
        pub(crate) static $static: crate::device::Kernel = crate::device::Kernel {
            name: $name,
            path: $path,
            bindings: &[$((stringify!($binding), crate::device::Access::$access)),*],
            params_bytes: size_of::<$params>(),
            params_fields: <$params>::FIELDS,
            variants: $variants,
        };

        #[cfg(any(test, feature = "testing"))]
        inventory::submit! {
            crate::kernels::registry::Entry {
                kernel: &$static,
                #[cfg(test)]
                twin: $twin,
            }
        }

        #[cfg(test)]
        #[test]
        fn agrees_with_its_twin() {
            crate::kernels::registry::compare(&$static);
        }
    };
}

pub(crate) use {kernel, params};

use crate::device::{Gpu, Kernel, Tier};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Whether a device runs a kernel that takes several tensors at a time. It must be able to bind
/// them all. Software drivers don't, because their dispatches cost little.
fn takes_several(gpu: &Gpu, kernel: &Kernel) -> bool {
    gpu.tier() != Tier::Software && gpu.limits().max_storage_buffers as usize >= kernel.bindings.len()
}

/// The adapter's part of a fused product: `s * H * B^T`.
#[derive(Clone, Copy)]
pub struct LoraUp<'a> {
    /// H = X * A^T, [M, r].
    pub h: &'a Tensor,
    /// B, [N, r].
    pub b: &'a Tensor,
    /// s: alpha / r or alpha / sqrt(r).
    pub scale: f32,
}

/// Returns an error unless `tensor` has this shape.
pub(crate) fn expect_shape(op: &'static str, what: &'static str, tensor: &Tensor, expected: &[usize]) -> Result<()> {
    if tensor.shape() == expected {
        return Ok(());
    }
    Err(Error::shape(op, what, format!("{expected:?}"), format!("{:?}", tensor.shape())))
}

/// Returns the rows and columns of a 2-D tensor.
pub(crate) fn expect_2d(op: &'static str, what: &'static str, tensor: &Tensor) -> Result<(usize, usize)> {
    match *tensor.shape() {
        [rows, cols] => Ok((rows, cols)),
        _ => Err(Error::shape(op, what, "[rows, columns]", format!("{:?}", tensor.shape()))),
    }
}
