//! Operations on tensors, for layers and losses of your own: the fused kernels that
//! [`nn`](crate::nn), [`autograd`](crate::autograd) and [`train`](crate::train) are made of.
//!
//! An operation takes [`Tensor`](crate::Tensor)s and [`DeviceMatrix`]es on one device, checks
//! their shapes, and returns new tensors there. On the CPU it runs at once; on a GPU it is
//! recorded, and reading a result waits for it.
//!
//! Letters: M = tokens (rows of X), N = d_out (rows of W), K = d_in (columns of W), r = rank.
//!
//! | operation | forward | backward |
//! |---|---|---|
//! | Y = X Wᵀ + bias + s H Bᵀ, W 4-bit or dense | [`qmatmul`] | [`qmatmul_dx`] |
//! | H = dropout(X) Aᵀ | [`lora_down`] | [`lora_dh`], [`lora_dw`] |
//! | attention | [`attention`] | [`attention_backward`] |
//! | rotary positions | [`rope`] | [`rope_backward`] |
//! | RMS norm | [`rms_norm`] | [`rms_norm_backward`] |
//! | silu(gate) * up | [`silu_mul`] | [`silu_mul_backward`] |
//! | rows of an embedding table | [`embedding`] | |
//! | cross-entropy of X Wᵀ | [`linear_cross_entropy`] | with the forward |
//! | W as a host array | [`dequantize`] | |
//! | sums | [`add`], [`add_assign`] | |
//! | norm of gradients and clip factor | [`grad_norm`] | |

pub use crate::kernels::LoraUp;
pub use crate::kernels::attention::backward::{AttentionGrads, attention_backward};
pub use crate::kernels::attention::visibility::Visibility;
pub use crate::kernels::attention::{Attended, AttentionShape, attention};
pub use crate::kernels::elementwise::add::add;
pub use crate::kernels::elementwise::add_assign::add_assign;
pub use crate::kernels::elementwise::rope::{RopeTable, rope, rope_backward};
pub use crate::kernels::elementwise::silu_mul::silu_mul;
pub use crate::kernels::elementwise::silu_mul_backward::silu_mul_backward;
pub use crate::kernels::lora::dh::lora_dh;
pub use crate::kernels::lora::down::lora_down;
pub use crate::kernels::lora::dw::lora_dw;
pub use crate::kernels::loss::cross_entropy::{IGNORE, check_labels};
pub use crate::kernels::loss::linear_cross_entropy::{CrossEntropy, linear_cross_entropy};
pub use crate::kernels::matrix::DeviceMatrix;
pub use crate::kernels::matrix::dequantize::{Delta, dequantize};
pub use crate::kernels::optim::grad_norm::{GradNorm, grad_norm};
pub use crate::kernels::qmatmul::dx::{LoraDx, qmatmul_dx};
pub use crate::kernels::qmatmul::qmatmul;
pub use crate::kernels::rows::embedding::{check_ids, embedding};
pub use crate::kernels::rows::rms_norm::rms_norm;
pub use crate::kernels::rows::rms_norm_backward::rms_norm_backward;
