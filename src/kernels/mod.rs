//! The kernels: one file for each, named like its shader in `shaders/`, with the formula, host
//! checks, dispatch, CPU twin and tests. [`matrix`] describes the layout of matrices on a device;
//! [`registry`] lists every kernel.
//!
//! Letters: M = tokens (rows of X), N = d_out (rows of W), K = d_in (columns of W), r = rank.

pub mod adamw;
mod adamw_several;
pub mod add;
pub mod add_assign;
pub mod append;
pub mod attention;
pub mod attention_backward;
mod attention_coop;
mod attention_cpu;
mod attention_delta;
mod attention_dkv;
mod attention_dkv_coop;
mod attention_dkv_lanes;
mod attention_dkv_tile;
mod attention_dq;
mod attention_dq_coop;
mod attention_dq_lanes;
mod attention_dq_tile;
mod attention_form;
mod attention_lanes;
mod attention_pack;
mod attention_tile;
pub mod column_sum;
pub mod cross_entropy;
pub mod dequantize;
pub mod dora_norm;
pub mod dropout_mix;
pub mod embedding;
mod exp;
pub mod grad_norm;
mod host_matrix;
pub mod linear_cross_entropy;
pub(crate) mod lora_coop;
pub mod lora_dh;
pub mod lora_down;
pub mod lora_dw;
pub mod matrix;
mod matrix_spec;
pub(crate) mod pack_rows;
mod packing;
mod parity;
mod product;
pub mod qmatmul;
mod qmatmul_coop;
mod qmatmul_cpu;
pub mod qmatmul_dx;
mod qmatmul_dx_coop;
mod qmatmul_dx_cpu;
mod qmatmul_dx_lanes;
mod qmatmul_dx_operands;
mod qmatmul_dx_tile;
mod qmatmul_gemv;
mod qmatmul_lanes;
mod qmatmul_operands;
mod qmatmul_tile;
mod quads;
pub mod registry;
pub mod rms_norm;
pub mod rms_norm_backward;
pub mod rope;
pub mod rope_append;
mod row_factor;
mod row_teams;
pub(crate) mod rows;
pub mod sample;
mod sample_cpu;
pub mod scale_columns;
mod scratch;
pub mod silu_mul;
pub mod silu_mul_backward;
mod simd;
mod square_sums;
pub mod sum;
pub mod visibility;

pub use matrix::{DeviceMatrix, HostMatrix};
pub use matrix_spec::{MatrixKind, MatrixSpec, ScaleKind};
pub(crate) use parity::disagreement;
pub(crate) use rows::{RowFactors, Rows};
pub(crate) use scratch::Scratch;

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

/// Declares a kernel: the name of its shader, its `Params`, and its storage buffers in binding
/// order.
macro_rules! kernel {
    ($(#[$meta:meta])* $static:ident = $name:literal, $params:ty, [$($binding:ident: $access:ident),* $(,)?]) => {
        $(#[$meta])*
        pub(crate) static $static: crate::device::Kernel = crate::device::Kernel {
            name: $name,
            source: include_str!(concat!("../../shaders/", $name, ".wgsl")),
            bindings: &[$((stringify!($binding), crate::device::Access::$access)),*],
            params_bytes: size_of::<$params>(),
            params_fields: <$params>::FIELDS,
        };
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

/// The scalar of a CPU twin: f32 like the kernels, f64 for finite differences.
pub trait Real:
    num_traits::Float + num_traits::FromPrimitive + std::iter::Sum + std::ops::AddAssign + Send + Sync
{
    /// Converts a stored f32.
    fn of(value: f32) -> Self;
}

impl Real for f32 {
    fn of(value: f32) -> f32 {
        value
    }
}

impl Real for f64 {
    fn of(value: f32) -> f64 {
        f64::from(value)
    }
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
    Err(Error::Shape { op, what, expected: format!("{expected:?}"), got: format!("{:?}", tensor.shape()) })
}

/// Returns the rows and columns of a 2-D tensor.
pub(crate) fn expect_2d(op: &'static str, what: &'static str, tensor: &Tensor) -> Result<(usize, usize)> {
    match *tensor.shape() {
        [rows, cols] => Ok((rows, cols)),
        _ => Err(Error::Shape { op, what, expected: "[rows, columns]".into(), got: format!("{:?}", tensor.shape()) }),
    }
}
