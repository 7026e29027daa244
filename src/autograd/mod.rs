//! Reverse-mode differentiation over fused ops: a handful per decoder layer, not one per scalar.
//!
//! A [`Tape`] records, for each op that a [`Parameter`] reaches, how its gradient propagates to
//! its inputs. A value that depends on the frozen base alone is a plain value: it saves nothing
//! and gets no gradient. [`Tape::backward`] consumes the tape from its end, so that what an op has
//! saved is freed as soon as it has been used. [`Tape::checkpoint`] saves only the input of a
//! stretch and runs the stretch again on the way back: the same kernels on the same values, so the
//! same bits.

mod ops;
mod parameter;

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use crate::device::ledger::{Moment, Part};
use crate::error::{Error, Result};
use crate::kernels::elementwise::add_assign::add_assign;
use crate::tensor::Tensor;

pub use parameter::Parameter;
pub(crate) use parameter::ParameterId;

/// A value made by an op, and its node on the tape if it may get a gradient.
#[derive(Clone, Debug)]
pub struct Var {
    value: Tensor,
    node: Option<usize>,
}

impl Var {
    /// Its node on the tape, if it may get a gradient.
    pub(crate) fn node(&self) -> Option<usize> {
        self.node
    }

    /// The value.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Whether it depends on a parameter.
    pub(crate) fn needs_grad(&self) -> bool {
        self.node.is_some()
    }
}

/// Gradients of an op's inputs, in their order; `None` for inputs that need none.
pub(crate) type InputGrads = Vec<Option<Tensor>>;

/// Turns the gradients of an op's results, if they have any, into those of its inputs. It receives
/// the gradient accumulated so far for its first input, if it adds to that itself. It may also add
/// to the gradients of its own parameters (a recomputed stretch does).
type Backward<'a> = Box<dyn FnOnce(Vec<Option<Tensor>>, Option<Tensor>, &mut Gradients) -> Result<InputGrads> + 'a>;

enum Node<'a> {
    Leaf(ParameterId),
    /// The input of a stretch that runs again.
    Input,
    Op {
        inputs: Vec<Option<usize>>,
        /// Number of result nodes: this one and the [`Node::Further`] after it.
        results: usize,
        /// Whether it adds to the first input's gradient itself.
        adds: bool,
        backward: Backward<'a>,
    },
    /// A further result of an op.
    Further,
}

/// The ops computed so far, in order. The tape borrows the layers whose ops it has recorded.
pub struct Tape<'a> {
    nodes: Vec<Node<'a>>,
    inference: bool,
}

/// Gradients of parameters. Gradients of several tapes add up: micro-batches of one step.
#[derive(Debug, Default)]
pub struct Gradients {
    by_parameter: HashMap<ParameterId, Tensor>,
}

impl Gradients {
    /// Makes an empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// The gradient of a parameter, if it got one.
    pub fn get(&self, parameter: &Parameter) -> Option<&Tensor> {
        self.by_parameter.get(&parameter.id())
    }

    /// Adds to the gradient of a parameter.
    fn add(&mut self, id: ParameterId, gradient: Tensor) -> Result<()> {
        let sum = match self.by_parameter.entry(id) {
            Entry::Occupied(sum) => {
                let sum = sum.into_mut();
                add_assign(sum, &gradient)?;
                sum
            }
            Entry::Vacant(place) => place.insert(gradient),
        };
        sum.count_as(Part::Gradients);
        Ok(())
    }
}

impl Default for Tape<'_> {
    fn default() -> Self {
        Tape::new()
    }
}

impl<'a> Tape<'a> {
    /// Makes an empty tape that records.
    pub fn new() -> Self {
        Tape::empty(false)
    }

    /// Makes a tape that records nothing, for evaluation.
    pub fn inference() -> Self {
        Tape::empty(true)
    }

    /// Registers a parameter; [`Gradients::get`] returns its gradient.
    pub fn parameter(&mut self, parameter: &Parameter) -> Var {
        let node = self.leaf(parameter.id());
        Var { value: (**parameter).clone(), node }
    }

    /// Adds the gradients of `loss`, a single value, to those of the parameters that it depends on.
    ///
    /// # Errors
    /// [`Error::Shape`] if it is not a single value, [`Error::Invalid`] if it depends on no
    /// parameter, and errors of the kernels.
    pub fn backward(self, loss: &Var, gradients: &mut Gradients) -> Result<()> {
        if loss.value.len() != 1 {
            let got = format!("{:?}", loss.value.shape());
            return Err(Error::shape("backward", "the loss", "[1]", got));
        }
        loss.value.device().begin(Moment::Backward);
        let one = Tensor::from_slice(&loss.value.device(), loss.value.shape(), &[1.0])?;
        if !loss.needs_grad() {
            return Err(Error::invalid(
                "backward",
                "the loss",
                "independent of every trainable tensor",
                "activate an adapter first, and record on a tape that is not for inference",
            ));
        }
        self.run(loss, one, gradients, None).map(|_| ())
    }

    fn empty(inference: bool) -> Self {
        Tape { nodes: Vec::new(), inference }
    }

    /// Whether ops are recorded.
    pub(crate) fn is_recording(&self) -> bool {
        !self.inference
    }

    /// A value that gets no gradient.
    pub fn constant(&self, value: Tensor) -> Var {
        Var { value, node: None }
    }

    pub(crate) fn leaf(&mut self, id: ParameterId) -> Option<usize> {
        self.push(Node::Leaf(id))
    }

    fn push(&mut self, node: Node<'a>) -> Option<usize> {
        if self.inference {
            return None;
        }
        self.nodes.push(node);
        Some(self.nodes.len() - 1)
    }

    /// Returns the result of an op with these input nodes; records the op if an input needs a
    /// gradient. `backward` is only made then, so that nothing is saved in vain.
    pub(crate) fn record(
        &mut self,
        value: Tensor,
        inputs: Vec<Option<usize>>,
        backward: impl FnOnce(&Tensor, &mut Gradients) -> Result<InputGrads> + 'a,
    ) -> Var {
        let [var] = self.record_several([value], inputs, |[dy], gradients| match dy {
            Some(dy) => backward(&dy, gradients),
            None => Ok(Vec::new()),
        });
        var
    }

    /// Like [`Tape::record`], for an op with several results. `backward` takes the gradients of
    /// the results that were used.
    pub(crate) fn record_several<const N: usize>(
        &mut self,
        values: [Tensor; N],
        inputs: Vec<Option<usize>>,
        backward: impl FnOnce([Option<Tensor>; N], &mut Gradients) -> Result<InputGrads> + 'a,
    ) -> [Var; N] {
        self.push_op(values, inputs, false, |dys, _, gradients| backward(dys, gradients))
    }

    /// Like [`Tape::record`], for an op that itself adds to the gradient of its first input, which
    /// saves a dispatch. `backward` takes the gradient accumulated so far and returns the sum.
    pub(crate) fn record_adding(
        &mut self,
        value: Tensor,
        inputs: Vec<Option<usize>>,
        backward: impl FnOnce(&Tensor, Option<Tensor>) -> Result<InputGrads> + 'a,
    ) -> Var {
        let [var] = self.push_op([value], inputs, true, |[dy], sum, _| match dy {
            Some(dy) => backward(&dy, sum),
            None => Ok(vec![sum]),
        });
        var
    }

    fn push_op<const N: usize>(
        &mut self,
        values: [Tensor; N],
        inputs: Vec<Option<usize>>,
        adds: bool,
        backward: impl FnOnce([Option<Tensor>; N], Option<Tensor>, &mut Gradients) -> Result<InputGrads> + 'a,
    ) -> [Var; N] {
        if inputs.iter().all(Option::is_none) {
            return values.map(|value| Var { value, node: None });
        }
        let backward = Box::new(move |dys: Vec<Option<Tensor>>, sum: Option<Tensor>, gradients: &mut Gradients| {
            let mut dys = dys.into_iter();
            backward(std::array::from_fn(|_| dys.next().flatten()), sum, gradients)
        });
        let mut node = Some(Node::Op { inputs, results: N, adds, backward });
        values.map(|value| Var { value, node: self.push(node.take().unwrap_or(Node::Further)) })
    }

    /// Runs `stretch` on `x` and saves only `x`; the backward pass runs the stretch again. It must
    /// do the same each time. Dropout does, given the same seed.
    ///
    /// # Errors
    /// Errors of the stretch.
    pub fn checkpoint(&mut self, x: &Var, stretch: impl Fn(&mut Tape<'a>, &Var) -> Result<Var> + 'a) -> Result<Var> {
        if self.inference {
            return stretch(self, x);
        }
        let y = stretch(&mut Tape::empty(true), &Var { value: x.value.clone(), node: None })?;
        let (saved, wanted) = (x.value.clone(), x.needs_grad());
        // The stretch's own parameters are known only when it runs again, so it always
        // counts as trainable.
        let node = self.push(Node::Op {
            inputs: vec![x.node],
            results: 1,
            adds: false,
            backward: Box::new(move |dys, _, gradients| {
                let mut tape = Tape::empty(false);
                let node = if wanted { tape.push(Node::Input) } else { None };
                let y = stretch(&mut tape, &Var { value: saved, node })?;
                let dy = dys.into_iter().flatten().next();
                Ok(vec![dy.map(|dy| tape.run(&y, dy, gradients, node)).transpose()?.flatten()])
            }),
        });
        Ok(Var { value: y.value, node })
    }

    /// Runs backward from `y` to the start; returns the gradient of the node `wanted`.
    pub(crate) fn run(
        self,
        y: &Var,
        dy: Tensor,
        gradients: &mut Gradients,
        wanted: Option<usize>,
    ) -> Result<Option<Tensor>> {
        let Some(last) = y.node else { return Ok(None) };
        let mut pending: Vec<Option<Tensor>> = vec![None; self.nodes.len()];
        pending[last] = Some(dy);
        let mut answer = None;
        for (index, node) in self.nodes.into_iter().enumerate().rev() {
            match node {
                // The op's main node comes next and takes it.
                Node::Further => {}
                Node::Leaf(id) => pending[index].take().map_or(Ok(()), |gradient| gradients.add(id, gradient))?,
                Node::Input => {
                    if wanted == Some(index) {
                        answer = pending[index].take();
                    }
                }
                Node::Op { inputs, results, adds, backward } => {
                    let dys: Vec<_> = pending[index..index + results].iter_mut().map(Option::take).collect();
                    if dys.iter().all(Option::is_none) {
                        continue;
                    }
                    let sum = if adds { inputs[0].and_then(|input| pending[input].take()) } else { None };
                    let found = backward(dys, sum, gradients)?;
                    for (input, gradient) in inputs.into_iter().zip(found) {
                        let (Some(input), Some(gradient)) = (input, gradient) else { continue };
                        match &mut pending[input] {
                            Some(sum) => add_assign(sum, &gradient)?,
                            none => *none = Some(gradient),
                        }
                    }
                }
            }
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::indices::Indices;
    use crate::kernels::DeviceMatrix;
    use crate::quant::HostMatrix;
    use crate::quant::{DenseData, DenseMatrix};
    use crate::testing;

    /// A small graph: h = silu(x) * x + x, y = norm(h) + h, loss(norm(silu(y) * y + norm(y))). The
    /// sum that the first norm adds to shares memory with its own gradient; the second norm's sum
    /// is unshared.
    struct Graph {
        weight: Tensor,
        head: DeviceMatrix,
        labels: Indices,
    }

    const SHAPE: [usize; 2] = [3, 8];

    impl Graph {
        fn new(device: &Device) -> Graph {
            let head = DenseMatrix::new(5, 8, DenseData::F32(testing::values(2, 40, 1.0))).unwrap();
            Graph {
                weight: Tensor::from_slice(device, &[8], &testing::values(3, 8, 1.0)).unwrap(),
                head: DeviceMatrix::new(device, HostMatrix::from(head)).unwrap(),
                labels: Indices::from_slice(device, &[1, 4, 0]).unwrap(),
            }
        }

        fn body<'a>(&'a self, tape: &mut Tape<'a>, x: &Var) -> Result<Var> {
            let h = tape.silu_mul(x, x)?;
            let h = tape.add(&h, x)?;
            let normed = tape.rms_norm(&h, &self.weight, 1e-5)?;
            let y = tape.add(&normed, &h)?;
            let normed = tape.rms_norm(&y, &self.weight, 1e-5)?;
            let product = tape.silu_mul(&y, &y)?;
            let sum = tape.add(&product, &normed)?;
            tape.rms_norm(&sum, &self.weight, 1e-5)
        }

        fn loss<'a>(&'a self, tape: &mut Tape<'a>, x: &Var, checkpoint: bool) -> Var {
            let h = if checkpoint {
                tape.checkpoint(x, |tape, x| self.body(tape, x)).unwrap()
            } else {
                self.body(tape, x).unwrap()
            };
            tape.linear_cross_entropy(&h, &self.head, &self.labels, 0.5).unwrap().0
        }

        fn value(&self, device: &Device, x: &[f32]) -> f64 {
            let mut tape = Tape::inference();
            let x = tape.constant(Tensor::from_slice(device, &SHAPE, x).unwrap());
            f64::from(self.loss(&mut tape, &x, false).value().to_vec().unwrap()[0])
        }

        fn gradient(&self, x: &Parameter, checkpoint: bool) -> Vec<f32> {
            let mut tape = Tape::new();
            let var = tape.parameter(x);
            let loss = self.loss(&mut tape, &var, checkpoint);
            let mut gradients = Gradients::new();
            tape.backward(&loss, &mut gradients).unwrap();
            gradients.get(x).unwrap().to_vec().unwrap()
        }
    }

    fn parameter(device: &Device, values: &[f32]) -> Parameter {
        Parameter::new(Tensor::from_slice(device, &SHAPE, values).unwrap())
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let device = Device::cpu();
        let graph = Graph::new(&device);
        let x = testing::values(1, 24, 1.0);
        let got = graph.gradient(&parameter(&device, &x), false);
        for at in 0..x.len() {
            let shifted = |by: f32| {
                let mut x = x.clone();
                x[at] += by;
                graph.value(&device, &x)
            };
            let wanted = (shifted(1e-2) - shifted(-1e-2)) / 2e-2;
            assert!((f64::from(got[at]) - wanted).abs() < 1e-3, "[{at}] {} {wanted}", got[at]);
        }
    }

    #[test]
    fn a_checkpointed_stretch_has_the_same_gradients_to_the_bit() {
        for device in testing::devices() {
            let graph = Graph::new(&device);
            let x = parameter(&device, &testing::values(1, 24, 1.0));
            let plain = graph.gradient(&x, false);
            assert!(plain.iter().any(|&value| value != 0.0));
            assert_eq!(plain, graph.gradient(&x, true), "{}", testing::name(&device));
        }
    }

    #[test]
    fn gradients_of_several_tapes_add_up() {
        let device = Device::cpu();
        let graph = Graph::new(&device);
        let x = parameter(&device, &testing::values(1, 24, 1.0));
        let once = graph.gradient(&x, false);
        let mut gradients = Gradients::new();
        for _ in 0..2 {
            let mut tape = Tape::new();
            let var = tape.parameter(&x);
            let loss = graph.loss(&mut tape, &var, false);
            tape.backward(&loss, &mut gradients).unwrap();
        }
        let twice: Vec<f32> = once.iter().map(|value| 2.0 * value).collect();
        assert_eq!(gradients.get(&x).unwrap().to_vec().unwrap(), twice);
    }

    #[test]
    fn a_loss_that_nothing_trainable_has_made_is_an_error() {
        let device = Device::cpu();
        let graph = Graph::new(&device);
        let mut tape = Tape::new();
        let x = tape.constant(Tensor::zeros(&device, &SHAPE).unwrap());
        let loss = graph.loss(&mut tape, &x, false);
        assert!(!loss.needs_grad());
        let error = tape.backward(&loss, &mut Gradients::new()).unwrap_err().to_string();
        assert_eq!(
            error,
            "backward: the loss is independent of every trainable tensor; activate an adapter first, and record on \
             a tape that is not for inference"
        );
        let tape = Tape::new();
        let error = tape.backward(&x, &mut Gradients::new()).unwrap_err().to_string();
        assert_eq!(error, "backward: the loss: expected [1], got [3, 8]");
    }
}
