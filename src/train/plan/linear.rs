//! A linear layer's passes, in memory alone: `nn/train.rs`, allocation by allocation.

use std::cell::OnceCell;

use super::ledger::{Bytes, Part};
use super::step::Pass;
use crate::autograd::{Tape, Var};
use crate::error::Result;
use crate::kernels::{column_sum, dora_norm, lora_dh, lora_down, lora_dw, qmatmul, qmatmul_dx};

/// A linear layer [d_out, d_in].
pub(super) struct Linear {
    pub d_out: usize,
    pub d_in: usize,
    pub adapter: Option<Adapter>,
}

/// A [r, d_in], B [d_out, r], and for DoRA a magnitude `[d_out]` and its factor.
pub(super) struct Adapter {
    pub rank: usize,
    pub a: Bytes,
    pub b: Bytes,
    pub magnitude: Option<Bytes>,
    pub factor: OnceCell<Factor>,
}

/// n and m / n.
#[derive(Clone)]
pub(super) struct Factor {
    _norm: Bytes,
    _c: Bytes,
}

/// What the backward pass needs; dropped with it.
struct Saved {
    _x: Bytes,
    _h: Bytes,
    _dora: Option<(Factor, Bytes)>,
}

impl Adapter {
    /// What is trained, in the order of [`LoraAdapter::parameters`](crate::nn::LoraAdapter::parameters).
    pub fn parameters(&self) -> impl Iterator<Item = &Bytes> {
        [&self.a, &self.b].into_iter().chain(&self.magnitude)
    }
}

impl Linear {
    pub fn record<'a>(&'a self, pass: &'a Pass<'a>, tape: &mut Tape<'a, Bytes>, x: &Var<Bytes>) -> Result<Var<Bytes>> {
        let [y] = record_all([self], pass, tape, x)?;
        Ok(y)
    }

    /// X * W^T and its scratch.
    fn product(&self, pass: &Pass<'_>) -> Result<Bytes> {
        let y = pass.tensor(self.d_out)?;
        pass.ledger.scratch(&qmatmul::scratch(&pass.ledger.device, pass.tokens, self.d_out, self.d_in))?;
        Ok(y)
    }

    /// dY * W and its scratch.
    fn product_dx(&self, pass: &Pass<'_>) -> Result<Bytes> {
        let dx = pass.tensor(self.d_in)?;
        pass.ledger.scratch(&qmatmul_dx::scratch(&pass.ledger.device, pass.tokens, self.d_out, self.d_in))?;
        Ok(dx)
    }

    /// H, where it is made beside those of the layers that read the same x: of an adapter that is not DoRA's.
    fn down_beside(&self, pass: &Pass<'_>) -> Result<Option<Bytes>> {
        let adapter = self.adapter.as_ref().filter(|adapter| adapter.magnitude.is_none());
        adapter.map(|adapter| self.down(adapter, pass, pass.dropout)).transpose()
    }

    fn down(&self, adapter: &Adapter, pass: &Pass<'_>, dropout: bool) -> Result<Bytes> {
        let h = pass.tensor(adapter.rank)?;
        let shape = [pass.tokens, self.d_in, adapter.rank];
        pass.ledger.scratch(&lora_down::scratch(&pass.ledger.device, shape, dropout))?;
        Ok(h)
    }

    fn run(&self, pass: &Pass<'_>, x: &Bytes, h: Option<Bytes>) -> Result<(Bytes, Option<Saved>)> {
        let Some(adapter) = &self.adapter else { return Ok((self.product(pass)?, None)) };
        if let Some(h) = h {
            let y = self.product(pass)?;
            return Ok((y, Some(Saved { _x: x.clone(), _h: h, _dora: None })));
        }
        let factor = self.factor(adapter, pass)?;
        let _beside = match pass.dropout {
            true => {
                let taken = pass.tensor(self.d_in)?;
                let beside = self.product(pass)?;
                let kept = pass.tensor(self.d_in)?;
                drop(taken);
                Some((beside, kept))
            }
            false => None,
        };
        let h = self.down(adapter, pass, false)?;
        let u = self.product(pass)?;
        let y = pass.tensor(self.d_out)?;
        Ok((y, Some(Saved { _x: x.clone(), _h: h, _dora: Some((factor, u)) })))
    }

    fn factor(&self, adapter: &Adapter, pass: &Pass<'_>) -> Result<Factor> {
        if let Some(factor) = adapter.factor.get() {
            return Ok(factor.clone());
        }
        let new = || pass.ledger.tensor(Part::Activations, &[self.d_out]);
        let norm = new()?;
        pass.ledger.scratch(&dora_norm::scratch(&pass.ledger.device, self.d_out, self.d_in))?;
        let factor = Factor { _norm: norm, _c: new()? };
        Ok(adapter.factor.get_or_init(|| factor).clone())
    }

    fn backward(&self, pass: &Pass<'_>, need_dx: bool) -> Result<Vec<Option<Bytes>>> {
        let Some(adapter) = &self.adapter else {
            return Ok(vec![need_dx.then(|| self.product_dx(pass)).transpose()?]);
        };
        let dora = adapter.magnitude.is_some();
        let _du = dora.then(|| pass.tensor(self.d_out)).transpose()?;
        let _g = pass.tensor(adapter.rank)?;
        pass.ledger.scratch(&lora_dh::scratch(&pass.ledger.device, [pass.tokens, self.d_out, adapter.rank]))?;
        let dx = if !need_dx {
            None
        } else if dora && pass.dropout {
            let _both = (self.product_dx(pass)?, self.product_dx(pass)?);
            Some(pass.tensor(self.d_in)?)
        } else {
            Some(self.product_dx(pass)?)
        };
        let weight = |rows: usize, cols: usize, dropout: bool| {
            let gradient = pass.ledger.tensor(Part::Gradients, &[rows, cols])?;
            pass.ledger.scratch(&lora_dw::scratch(&pass.ledger.device, pass.tokens, rows, cols, dropout))?;
            Ok(gradient)
        };
        let mut grads = vec![dx];
        grads.push(Some(weight(adapter.rank, self.d_in, pass.dropout)?));
        grads.push(Some(weight(self.d_out, adapter.rank, false)?));
        if dora {
            let _sums = pass.ledger.tensor(Part::Gradients, &[self.d_out])?;
            pass.ledger.scratch(&column_sum::scratch(&pass.ledger.device, pass.tokens, self.d_out))?;
            grads.push(Some(pass.ledger.tensor(Part::Gradients, &[self.d_out])?));
        }
        Ok(grads)
    }
}

/// Layers that read the same x: `run_all` of `nn/train.rs`, recorded.
pub(super) fn record_all<'a, const N: usize>(
    layers: [&'a Linear; N],
    pass: &'a Pass<'a>,
    tape: &mut Tape<'a, Bytes>,
    x: &Var<Bytes>,
) -> Result<[Var<Bytes>; N]> {
    let hs = layers.iter().map(|layer| layer.down_beside(pass)).collect::<Result<Vec<_>>>()?;
    let results = layers.iter().zip(hs).map(|(layer, h)| layer.run(pass, x.value(), h)).collect::<Result<Vec<_>>>()?;
    let need_dx = x.needs_grad();
    let mut results = results.into_iter().zip(layers);
    Ok(std::array::from_fn(|_| {
        let ((y, saved), layer) = results.next().unwrap_or_else(|| unreachable!("a result for each layer"));
        let mut inputs = vec![x.node()];
        inputs.extend(layer.adapter.iter().flat_map(Adapter::parameters).map(|tensor| tape.leaf(tensor)));
        tape.record(y, inputs, move |_, _| {
            let grads = layer.backward(pass, need_dx);
            drop(saved);
            grads
        })
    }))
}
