//! A training step in simulated memory: follows `nn/decoder.rs`, `autograd/ops.rs` and
//! [`Trainer::step`](crate::train::Trainer::step) allocation by allocation, on the same tape that
//! a step records on.

use std::cell::OnceCell;
use std::rc::Rc;

use super::MicroBatches;
use super::ledger::{Bytes, Ledger, Moment, Part};
use super::linear::{Adapter, Factors, Linear, record_all};
use crate::autograd::{Gradients, ParameterId, Tape, Var};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::formats::peft::PeftConfig;
use crate::kernels::attention::backward;
use crate::kernels::attention::visibility::Visibility;
use crate::kernels::attention::{self, AttentionShape};
use crate::kernels::loss::linear_cross_entropy::chunk_rows;
use crate::kernels::optim::grad_norm::{self, EACH};
use crate::kernels::qmatmul;
use crate::kernels::qmatmul::dx;
use crate::nn::attach::targeted;
use crate::nn::{ModelConfig, ModelSpec};

/// Context shared by all ops of a micro-batch.
pub(super) struct Pass<'a> {
    pub ledger: &'a Rc<Ledger>,
    /// Number of tokens, M.
    pub tokens: usize,
    /// Whether the adapters use dropout.
    pub dropout: bool,
    heads: AttentionShape,
    /// Visibility without a window, and with one if some sequence is longer.
    visibility: &'a Visibility,
    windowed: Option<&'a Visibility>,
}

impl Pass<'_> {
    /// Allocates a tensor [M, `width`].
    pub fn tensor(&self, width: usize) -> Result<Bytes> {
        self.ledger.tensor(Part::Activations, &[self.tokens, width])
    }

    /// The gradient [M, `width`], added to `sum` either `in_place` or afterwards. `beside`
    /// allocates the kernel's other memory.
    pub fn gradient(
        &self,
        sum: Option<Bytes>,
        width: usize,
        in_place: bool,
        beside: impl FnOnce() -> Result<()>,
    ) -> Result<Bytes> {
        let (dx, later) = match sum {
            Some(mut sum) if in_place => {
                sum.unshare();
                (sum, None)
            }
            sum => (self.tensor(width)?, sum),
        };
        beside()?;
        dx.added_to(later)
    }

    fn rms_norm<'a>(&'a self, tape: &mut Tape<'a, Bytes>, x: &Var<Bytes>, width: usize) -> Result<Var<Bytes>> {
        let y = self.tensor(width)?;
        let saved = x.value().clone();
        Ok(tape.record_adding(y, vec![x.node()], move |_, sum| {
            let in_place = matches!(self.ledger.device, Device::Gpu(_));
            let dx = self.gradient(sum, width, in_place, || Ok(()))?;
            drop(saved);
            Ok(vec![Some(dx)])
        }))
    }

    fn rope<'a>(
        &'a self,
        tape: &mut Tape<'a, Bytes>,
        xs: [&Var<Bytes>; 2],
        widths: [usize; 2],
    ) -> Result<[Var<Bytes>; 2]> {
        let new = move || Ok([self.tensor(widths[0])?, self.tensor(widths[1])?]);
        let inputs = xs.map(Var::node).into();
        Ok(tape.record_several(new()?, inputs, move |_, _| Ok(new()?.map(Some).into())))
    }

    pub fn add<'a>(
        &'a self,
        tape: &mut Tape<'a, Bytes>,
        a: &Var<Bytes>,
        b: &Var<Bytes>,
        width: usize,
    ) -> Result<Var<Bytes>> {
        let y = self.tensor(width)?;
        let both = |dy: &Bytes, _: &mut Gradients<Bytes>| Ok(vec![Some(dy.clone()), Some(dy.clone())]);
        Ok(tape.record(y, vec![a.node(), b.node()], both))
    }

    fn silu_mul<'a>(
        &'a self,
        tape: &mut Tape<'a, Bytes>,
        gate: &Var<Bytes>,
        up: &Var<Bytes>,
        width: usize,
    ) -> Result<Var<Bytes>> {
        let y = self.tensor(width)?;
        let saved = [gate, up].map(|var| var.value().clone());
        Ok(tape.record(y, vec![gate.node(), up.node()], move |_, _| {
            let grads = vec![Some(self.tensor(width)?), Some(self.tensor(width)?)];
            drop(saved);
            Ok(grads)
        }))
    }

    fn attention<'a>(
        &'a self,
        tape: &mut Tape<'a, Bytes>,
        [q, k, v]: [&Var<Bytes>; 3],
        windowed: bool,
    ) -> Result<Var<Bytes>> {
        let visibility = self.windowed.filter(|_| windowed).unwrap_or(self.visibility);
        let heads = &self.heads;
        let (q_width, kv_width) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);
        let (o, lse) = (self.tensor(q_width)?, self.tensor(heads.heads)?);
        self.ledger.scratch(&attention::scratch(&self.ledger.device, heads, visibility))?;
        let saved = ([q, k, v].map(|var| var.value().clone()), o.clone(), lse);
        Ok(tape.record(o, vec![q.node(), k.node(), v.node()], move |_, _| {
            let grads = vec![Some(self.tensor(q_width)?), Some(self.tensor(kv_width)?), Some(self.tensor(kv_width)?)];
            self.ledger.scratch(&backward::scratch(&self.ledger.device, heads, visibility))?;
            drop(saved);
            Ok(grads)
        }))
    }

    /// The loss of `hidden` [M, K] with a head [V, K].
    fn loss<'a>(&'a self, tape: &mut Tape<'a, Bytes>, hidden: &Var<Bytes>, [v, k]: [usize; 2]) -> Result<Var<Bytes>> {
        let (m, ledger) = (self.tokens, self.ledger);
        let _token_losses = self.tensor(1)?;
        let mut d_hidden = self.tensor(k)?;
        let most = chunk_rows(&ledger.device, v);
        for first in (0..m).step_by(most) {
            let rows = most.min(m - first);
            let new = |part, width: usize| ledger.tensor(part, &[rows, width]);
            let chunk = if rows == m { hidden.value().clone() } else { new(Part::Activations, k)? };
            let _logits = new(Part::Logits, v)?;
            let factors = Factors::default();
            factors.find(ledger, [rows, k], qmatmul::stages(&ledger.device, rows))?;
            ledger.scratch(&qmatmul::scratch(&ledger.device, rows, v, k))?;
            drop((chunk, factors));
            let d_chunk = new(Part::Activations, k)?;
            let factors = Factors::default();
            factors.find(ledger, [rows, v], dx::stages(&ledger.device))?;
            ledger.scratch(&dx::scratch(&ledger.device, [rows, v, k]))?;
            drop(factors);
            if rows == m {
                d_hidden = d_chunk;
            }
        }
        let loss = ledger.tensor(Part::Activations, &[1])?;
        Ok(tape.record(loss, vec![hidden.node()], move |_, _| Ok(vec![Some(d_hidden)])))
    }
}

/// A model with adapters, and the optimizer's moments once they exist.
pub(super) struct Model {
    ledger: Rc<Ledger>,
    config: ModelConfig,
    /// Linear modules, layer by layer.
    linears: Vec<Linear>,
    dropout: bool,
    moments: Vec<Bytes>,
    _base: Vec<Bytes>,
}

impl Model {
    /// The model as loaded, with new adapters, for sequences of `tokens` tokens.
    pub fn new(ledger: &Rc<Ledger>, spec: &ModelSpec, adapter: &PeftConfig, tokens: usize) -> Result<Model> {
        let config = spec.config().clone();
        let mut base = vec![ledger.fixed(Part::Base, spec.matrix_bytes(&ledger.device)?)];
        for len in spec.vectors() {
            base.push(ledger.tensor(Part::Base, &[len])?);
        }
        let rope = |needed: usize| {
            let new = || ledger.tensor(Part::Base, &[config.rope_positions(needed), config.head_dim / 2]);
            Ok::<_, Error>([new()?, new()?])
        };
        let first = rope(0)?;
        let targeted = targeted(adapter, spec.linears().map(|(path, _)| path))?;
        let mut linears = Vec::new();
        for (path, matrix) in spec.linears() {
            let (d_out, d_in, rank) = (matrix.rows, matrix.cols, adapter.rank(&path));
            let new = |shape: &[usize]| ledger.tensor(Part::Adapters, shape);
            if rank == 0 {
                return Err(Error::invalid("plan", "the adapters' rank", 0, "it must be at least 1"));
            }
            let adapter = if targeted.contains(&path) {
                let (a, b) = (new(&[rank, d_in])?, new(&[d_out, rank])?);
                let magnitude = adapter.use_dora.then(|| new(&[d_out])).transpose()?;
                Some(Adapter {
                    rank,
                    a,
                    b,
                    magnitude,
                    factor: OnceCell::new(),
                    ids: std::array::from_fn(|_| ParameterId::new()),
                })
            } else {
                None
            };
            linears.push(Linear { d_out, d_in, adapter });
        }
        // A longer rotary table replaces the first one when a sequence needs it.
        let longer = config.rope_positions(tokens) > config.rope_positions(0);
        base.extend(if longer { rope(tokens)? } else { first });
        let dropout = adapter.lora_dropout > 0.0;
        Ok(Model { ledger: ledger.clone(), config, linears, dropout, moments: Vec::new(), _base: base })
    }

    /// A step over `batches`, which are already on the device.
    pub fn step(&mut self, batches: &MicroBatches, checkpoint: bool) -> Result<()> {
        let found = self.gradients(batches, checkpoint)?;
        self.ledger.begin(Moment::Update);
        for adapter in self.linears.iter_mut().filter_map(|linear| linear.adapter.as_mut()) {
            adapter.factor = OnceCell::new();
        }
        let parameters =
            || self.linears.iter().filter_map(|linear| linear.adapter.as_ref()).flat_map(Adapter::parameters);
        let count = parameters().count();
        let new = |len: usize| self.ledger.tensor(Part::Activations, &[len]);
        let _norms = new(EACH + count)?;
        self.ledger.scratch(&grad_norm::scratch(&self.ledger.device, count))?;
        if self.moments.is_empty() {
            let moments = parameters().flat_map(|parameter| [parameter; 2]);
            self.moments = moments.map(|parameter| parameter.another(Part::Optimizer)).collect();
        }
        drop(found);
        Ok(())
    }

    /// The loss and the gradients.
    fn gradients(&self, batches: &MicroBatches, checkpoint: bool) -> Result<(Option<Bytes>, Gradients<Bytes>)> {
        let &MicroBatches { count, rows, tokens } = batches;
        let config = &self.config;
        let heads =
            AttentionShape { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim, scale: 1.0 };
        heads.check("plan")?;
        let segments = vec![1; rows * tokens];
        let visibility = |window| Visibility::causal(&Device::cpu(), &segments, tokens, window);
        let window = config.sliding_window().filter(|&window| window < tokens);
        let (whole, windowed) = (visibility(None)?, window.map(|window| visibility(Some(window))).transpose()?);
        let pass = Pass {
            ledger: &self.ledger,
            tokens: rows * tokens,
            dropout: self.dropout,
            heads,
            visibility: &whole,
            windowed: windowed.as_ref(),
        };
        let (mut total, mut gradients) = (None, Gradients::default());
        // From the third micro-batch on, everything is as in the second.
        for _ in 0..count.min(2) {
            let mut tape = Tape::empty(false);
            self.ledger.begin(Moment::Forward);
            let hidden = self.hidden(&pass, &mut tape, checkpoint)?;
            self.ledger.begin(Moment::Loss);
            let loss = pass.loss(&mut tape, &hidden, [config.vocab_size, config.hidden_size])?;
            drop(hidden);
            self.ledger.begin(Moment::Backward);
            let one = self.ledger.tensor(Part::Activations, &[1])?;
            tape.run(&loss, one, &mut gradients, None)?;
            total.get_or_insert(loss.value().clone());
        }
        Ok((total, gradients))
    }

    fn hidden<'a>(&'a self, pass: &'a Pass<'a>, tape: &mut Tape<'a, Bytes>, checkpoint: bool) -> Result<Var<Bytes>> {
        let width = self.config.hidden_size;
        let mut h = tape.constant(pass.tensor(width)?);
        for (index, linears) in self.linears.as_chunks::<7>().0.iter().enumerate() {
            let windowed = self.config.window(index).is_some();
            let stretch =
                move |tape: &mut Tape<'a, Bytes>, h: &Var<Bytes>| layer(linears, &self.config, pass, tape, h, windowed);
            h = if checkpoint { tape.checkpoint(&h, stretch)? } else { stretch(tape, &h)? };
        }
        pass.rms_norm(tape, &h, width)
    }
}

/// Like `DecoderLayer::forward`. What stays alive until its end does so here too.
fn layer<'a>(
    [q, k, v, o, gate, up, down]: &'a [Linear; 7],
    config: &ModelConfig,
    pass: &'a Pass<'a>,
    tape: &mut Tape<'a, Bytes>,
    x: &Var<Bytes>,
    windowed: bool,
) -> Result<Var<Bytes>> {
    let (hidden, inner, q_width, k_width) = (q.d_in, down.d_in, q.d_out, k.d_out);
    let normed = pass.rms_norm(tape, x, hidden)?;
    let [mut q, mut k, v] = record_all([q, k, v], pass, tape, &normed, [None; 3])?;
    drop(normed);
    if config.qk_norm {
        q = pass.rms_norm(tape, &q, q_width)?;
        k = pass.rms_norm(tape, &k, k_width)?;
    }
    let [q, k] = pass.rope(tape, [&q, &k], [q_width, k_width])?;
    let roped = [q, k, v];
    let attended = pass.attention(tape, roped.each_ref(), windowed)?;
    drop(roped);
    let h = o.record_onto(pass, tape, &attended, x, config.o_bias)?;
    drop(attended);

    let normed = pass.rms_norm(tape, &h, hidden)?;
    let [gate, up] = record_all([gate, up], pass, tape, &normed, [None; 2])?;
    drop(normed);
    let product = pass.silu_mul(tape, &gate, &up, inner)?;
    drop((gate, up));
    down.record_onto(pass, tape, &product, &h, config.mlp_bias)
}
