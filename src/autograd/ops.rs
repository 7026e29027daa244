//! The ops that a tape records: each is a fused kernel with its backward.

use std::sync::Arc;

use super::{Tape, Var};
use crate::error::Result;
use crate::indices::Indices;
use crate::kernels::DeviceMatrix;
use crate::kernels::attention::backward::attention_backward;
use crate::kernels::attention::visibility::Visibility;
use crate::kernels::attention::{AttentionShape, attention};
use crate::kernels::elementwise::add::add;
use crate::kernels::elementwise::rope::{RopeTable, rope_backward, rope_both};
use crate::kernels::elementwise::silu_mul::silu_mul;
use crate::kernels::elementwise::silu_mul_backward::silu_mul_backward;
use crate::kernels::loss::linear_cross_entropy::linear_cross_entropy;
use crate::kernels::rows::rms_norm::rms_norm;
use crate::kernels::rows::rms_norm_backward;
use crate::tensor::Tensor;

impl<'a> Tape<'a> {
    /// x / sqrt(mean(x^2) + eps) * weight, over runs of values as long as `weight`.
    ///
    /// # Errors
    /// Like [`rms_norm`].
    pub fn rms_norm(&mut self, x: &Var, weight: &'a Tensor, eps: f32) -> Result<Var> {
        let y = rms_norm(&x.value, weight, eps)?;
        let saved = x.value.clone();
        Ok(self.record_adding(y, vec![x.node], move |dy, sum| {
            Ok(vec![Some(rms_norm_backward::onto(sum, dy, &saved, weight, eps)?)])
        }))
    }

    /// Rotary position embedding of every head in the rows of q and k.
    ///
    /// # Errors
    /// Like [`rope`](crate::kernels::elementwise::rope::rope).
    pub fn rope(&mut self, [q, k]: [&Var; 2], table: &RopeTable, positions: &Indices) -> Result<[Var; 2]> {
        let ys = rope_both([&q.value, &k.value], table, positions, false)?;
        let (table, positions) = (table.clone(), positions.clone());
        Ok(self.record_several(ys, vec![q.node, k.node], move |dys, _| {
            if let [Some(dq), Some(dk)] = &dys {
                return Ok(rope_both([dq, dk], &table, &positions, true)?.map(Some).into());
            }
            dys.iter().map(|dy| dy.as_ref().map(|dy| rope_backward(dy, &table, &positions)).transpose()).collect()
        }))
    }

    /// Softmax attention of q over k and v.
    ///
    /// # Errors
    /// Like [`attention`].
    pub fn attention(
        &mut self,
        [q, k, v]: [&Var; 3],
        shape: AttentionShape,
        visibility: &Arc<Visibility>,
    ) -> Result<Var> {
        let attended = attention(&q.value, &k.value, &v.value, &shape, visibility)?;
        let y = attended.o.clone();
        let saved = [q, k, v].map(|var| var.value.clone());
        let visibility = visibility.clone();
        Ok(self.record(y, vec![q.node, k.node, v.node], move |dy, _| {
            let [q, k, v] = &saved;
            let found = attention_backward(dy, q, k, v, &attended, &shape, &visibility)?;
            Ok(vec![Some(found.dq), Some(found.dk), Some(found.dv)])
        }))
    }

    /// silu(gate) * up.
    ///
    /// # Errors
    /// Like [`silu_mul`].
    pub fn silu_mul(&mut self, gate: &Var, up: &Var) -> Result<Var> {
        let y = silu_mul(&gate.value, &up.value)?;
        let saved = [gate, up].map(|var| var.value.clone());
        Ok(self.record(y, vec![gate.node, up.node], move |dy, _| {
            let [gate, up] = &saved;
            let (d_gate, d_up) = silu_mul_backward(dy, gate, up)?;
            Ok(vec![Some(d_gate), Some(d_up)])
        }))
    }

    /// a + b.
    ///
    /// # Errors
    /// Like [`add`].
    pub fn add(&mut self, a: &Var, b: &Var) -> Result<Var> {
        let y = add(&a.value, &b.value)?;
        Ok(self.record(y, vec![a.node, b.node], |dy, _| Ok(vec![Some(dy.clone()), Some(dy.clone())])))
    }

    /// Returns `scale` times the summed cross-entropy of `labels` for the logits `hidden` *
    /// `head`^T, and the (unscaled) loss of each token. The gradient is computed in the forward
    /// pass, while a chunk's logits exist, and can't be rescaled later. So the loss must be used
    /// as it is: other ops reject it, because it is a single value.
    ///
    /// # Errors
    /// Like [`linear_cross_entropy`].
    pub fn linear_cross_entropy(
        &mut self,
        hidden: &Var,
        head: &DeviceMatrix,
        labels: &Indices,
        scale: f32,
    ) -> Result<(Var, Tensor)> {
        let with_grad = self.is_recording() && hidden.needs_grad();
        let found = linear_cross_entropy(&hidden.value, head, labels, scale, with_grad)?;
        let d_hidden = found.d_hidden;
        let loss = self.record(found.loss, vec![hidden.node], move |_, _| Ok(vec![d_hidden]));
        Ok((loss, found.token_losses))
    }
}
