//! Passes of a linear layer in simulated memory: follows `nn/linear/pass.rs`, allocation by allocation.

use std::cell::OnceCell;
use std::rc::Rc;

use super::ledger::{Bytes, Ledger, Part};
use super::step::Pass;
use crate::autograd::{ParameterId, Tape, Var};
use crate::error::Result;
use crate::kernels::lora::coop;
use crate::kernels::lora::dh;
use crate::kernels::lora::dora_norm;
use crate::kernels::lora::down;
use crate::kernels::lora::dw;
use crate::kernels::qmatmul;
use crate::kernels::qmatmul::dx;
use crate::kernels::rows::column_sum;
use crate::kernels::rows::factors;
use crate::kernels::rows::pack_rows;

/// A linear layer [d_out, d_in].
pub(super) struct Linear {
    pub d_out: usize,
    pub d_in: usize,
    pub adapter: Option<Adapter>,
}

/// A [r, d_in], B [d_out, r] and, for DoRA, a magnitude `[d_out]` and its factor.
pub(super) struct Adapter {
    pub rank: usize,
    pub a: Bytes,
    pub b: Bytes,
    pub magnitude: Option<Bytes>,
    pub ids: [ParameterId; 3],
    pub factor: OnceCell<Factor>,
}

/// DoRA's n and m / n.
#[derive(Clone)]
pub(super) struct Factor {
    _norm: Bytes,
    _c: Bytes,
}

/// Row factors of a matrix and its packed rows, like the kernels' `RowFactors`.
#[derive(Clone, Default)]
pub(super) struct Factors {
    factors: Rc<OnceCell<Bytes>>,
    packed: Rc<OnceCell<Bytes>>,
}

impl Factors {
    /// Allocates what a product finds for its input: row factors and packed rows of `k` values, if
    /// it stages rows.
    pub fn find(&self, ledger: &Rc<Ledger>, [rows, k]: [usize; 2], stages: bool) -> Result<()> {
        let packs = stages && self.factors.get().is_none() && factors::packs(&ledger.device);
        self.find_alone(ledger, rows, stages)?;
        if packs {
            let packed = ledger.tensor(Part::Activations, &[pack_rows::words(rows, k)])?;
            self.packed.get_or_init(|| packed);
        }
        Ok(())
    }

    /// Allocates what other kernels find: row factors only.
    fn find_alone(&self, ledger: &Rc<Ledger>, rows: usize, stages: bool) -> Result<()> {
        if stages && self.factors.get().is_none() {
            let factors = ledger.tensor(Part::Activations, &[rows])?;
            self.factors.get_or_init(|| factors);
        }
        Ok(())
    }

    fn without_rows(&self) -> Factors {
        Factors { factors: self.factors.clone(), ..Factors::default() }
    }
}

/// Values that the backward pass needs; dropped with it.
struct Saved {
    _x: Bytes,
    x_factors: Factors,
    _h: Bytes,
    _dora: Option<(Factor, Bytes)>,
}

impl Adapter {
    /// Trained tensors, in the order of
    /// [`LoraAdapter::parameters`](crate::nn::LoraAdapter::parameters).
    pub fn parameters(&self) -> impl Iterator<Item = &Bytes> {
        [&self.a, &self.b].into_iter().chain(&self.magnitude)
    }
}

impl Linear {
    pub fn record<'a>(&'a self, pass: &'a Pass<'a>, tape: &mut Tape<'a, Bytes>, x: &Var<Bytes>) -> Result<Var<Bytes>> {
        let [y] = record_all([self], pass, tape, x, [None])?;
        Ok(y)
    }

    /// Adds a residual; `bias` says whether the layer has a bias.
    pub fn record_onto<'a>(
        &'a self,
        pass: &'a Pass<'a>,
        tape: &mut Tape<'a, Bytes>,
        x: &Var<Bytes>,
        residual: &Var<Bytes>,
        bias: bool,
    ) -> Result<Var<Bytes>> {
        if bias || self.adapter.as_ref().is_some_and(|adapter| adapter.magnitude.is_some()) {
            let y = self.record(pass, tape, x)?;
            return pass.add(tape, residual, &y, self.d_out);
        }
        let [y] = record_all([self], pass, tape, x, [Some(residual)])?;
        Ok(y)
    }

    /// X * W^T with its scratch memory.
    fn product(&self, pass: &Pass<'_>, x: &Factors) -> Result<Bytes> {
        let y = pass.tensor(self.d_out)?;
        x.find(pass.ledger, [pass.tokens, self.d_in], qmatmul::stages(&pass.ledger.device, pass.tokens))?;
        pass.ledger.scratch(&qmatmul::scratch(&pass.ledger.device, pass.tokens, self.d_out, self.d_in))?;
        Ok(y)
    }

    /// dY * W, added to `sum`, with its scratch memory.
    fn product_dx(&self, pass: &Pass<'_>, dy: &Factors, sum: Option<Bytes>) -> Result<Bytes> {
        let in_place = dx::adds_in_place(&pass.ledger.device);
        pass.gradient(sum, self.d_in, in_place, || {
            dy.find(pass.ledger, [pass.tokens, self.d_out], dx::stages(&pass.ledger.device))?;
            pass.ledger.scratch(&dx::scratch(&pass.ledger.device, [pass.tokens, self.d_out, self.d_in]))
        })
    }

    /// H, if it is computed together with that of other layers reading the same x. DoRA computes
    /// it alone.
    fn down_beside(&self, pass: &Pass<'_>, x: &Factors) -> Result<Option<Bytes>> {
        let adapter = self.adapter.as_ref().filter(|adapter| adapter.magnitude.is_none());
        adapter.map(|adapter| self.down(adapter, pass, x, pass.dropout)).transpose()
    }

    fn down(&self, adapter: &Adapter, pass: &Pass<'_>, x: &Factors, dropout: bool) -> Result<Bytes> {
        let h = pass.tensor(adapter.rank)?;
        x.find(pass.ledger, [pass.tokens, self.d_in], coop::stages(&pass.ledger.device, pass.tokens))?;
        let shape = [pass.tokens, self.d_in, adapter.rank];
        pass.ledger.scratch(&down::scratch(&pass.ledger.device, shape, dropout))?;
        Ok(h)
    }

    fn run(&self, pass: &Pass<'_>, x: &Bytes, x_factors: &Factors, h: Option<Bytes>) -> Result<(Bytes, Option<Saved>)> {
        let Some(adapter) = &self.adapter else { return Ok((self.product(pass, x_factors)?, None)) };
        let saved = |h, dora| Saved { _x: x.clone(), x_factors: x_factors.without_rows(), _h: h, _dora: dora };
        if let Some(h) = h {
            let y = self.product(pass, x_factors)?;
            return Ok((y, Some(saved(h, None))));
        }
        let factor = self.factor(adapter, pass)?;
        let own = Factors::default();
        let (_beside, xd_factors) = match pass.dropout {
            true => {
                let taken = pass.tensor(self.d_in)?;
                let beside = self.product(pass, &Factors::default())?;
                let kept = pass.tensor(self.d_in)?;
                drop(taken);
                (Some((beside, kept)), &own)
            }
            false => (None, x_factors),
        };
        let h = self.down(adapter, pass, xd_factors, false)?;
        let u = self.product(pass, xd_factors)?;
        let y = pass.tensor(self.d_out)?;
        Ok((y, Some(saved(h, Some((factor, u))))))
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

    fn backward(
        &self,
        pass: &Pass<'_>,
        sum: Option<Bytes>,
        saved: Option<&Saved>,
        need_dx: bool,
    ) -> Result<Vec<Option<Bytes>>> {
        let (Some(adapter), Some(Saved { x_factors, .. })) = (&self.adapter, saved) else {
            return Ok(vec![need_dx.then(|| self.product_dx(pass, &Factors::default(), sum)).transpose()?]);
        };
        let lora_stages = coop::stages(&pass.ledger.device, pass.tokens);
        let dora = adapter.magnitude.is_some();
        let _du = dora.then(|| pass.tensor(self.d_out)).transpose()?;
        let du_factors = Factors::default();
        let _g = pass.tensor(adapter.rank)?;
        du_factors.find(pass.ledger, [pass.tokens, self.d_out], lora_stages)?;
        pass.ledger.scratch(&dh::scratch(&pass.ledger.device, [pass.tokens, self.d_out, adapter.rank]))?;
        let dx = if !need_dx {
            None
        } else if dora && pass.dropout {
            let _both = (self.product_dx(pass, &du_factors, None)?, self.product_dx(pass, &Factors::default(), None)?);
            Some(pass.tensor(self.d_in)?.added_to(sum)?)
        } else {
            Some(self.product_dx(pass, &du_factors, sum)?)
        };
        let weight = |rows: usize, cols: usize, factors: &Factors, dropout: bool| {
            let gradient = pass.ledger.tensor(Part::Gradients, &[rows, cols])?;
            factors.find_alone(pass.ledger, pass.tokens, lora_stages)?;
            pass.ledger.scratch(&dw::scratch(&pass.ledger.device, pass.tokens, rows, cols, dropout))?;
            Ok(gradient)
        };
        let mut grads = vec![dx];
        grads.push(Some(weight(adapter.rank, self.d_in, x_factors, pass.dropout)?));
        grads.push(Some(weight(self.d_out, adapter.rank, &du_factors, false)?));
        if dora {
            let _sums = pass.ledger.tensor(Part::Gradients, &[self.d_out])?;
            pass.ledger.scratch(&column_sum::scratch(&pass.ledger.device, pass.tokens, self.d_out))?;
            grads.push(Some(pass.ledger.tensor(Part::Gradients, &[self.d_out])?));
        }
        Ok(grads)
    }
}

/// Records layers that read the same x, like `run_all` in `nn/linear/pass.rs`.
pub(super) fn record_all<'a, const N: usize>(
    layers: [&'a Linear; N],
    pass: &'a Pass<'a>,
    tape: &mut Tape<'a, Bytes>,
    x: &Var<Bytes>,
    residuals: [Option<&Var<Bytes>>; N],
) -> Result<[Var<Bytes>; N]> {
    let factors = Factors::default();
    let hs = layers.iter().map(|layer| layer.down_beside(pass, &factors)).collect::<Result<Vec<_>>>()?;
    let run = |(layer, h): (&&Linear, _)| layer.run(pass, x.value(), &factors, h);
    let results = layers.iter().zip(hs).map(run).collect::<Result<Vec<_>>>()?;
    let need_dx = x.needs_grad();
    let mut results = results.into_iter().zip(layers.into_iter().zip(residuals));
    Ok(std::array::from_fn(|_| {
        let ((y, saved), (layer, residual)) = results.next().unwrap_or_else(|| unreachable!("a result for each layer"));
        let mut inputs = vec![x.node()];
        inputs.extend(residual.map(Var::node));
        let has_residual = residual.is_some();
        inputs.extend(
            layer.adapter.iter().flat_map(|adapter| adapter.parameters().zip(adapter.ids)).map(|(_, id)| tape.leaf(id)),
        );
        tape.record_adding(y, inputs, move |dy, sum| {
            let mut grads = layer.backward(pass, sum, saved.as_ref(), need_dx)?;
            drop(saved);
            if has_residual {
                grads.insert(1, Some(dy.clone()));
            }
            Ok(grads)
        })
    }))
}
