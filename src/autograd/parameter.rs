//! Trained tensors.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::tensor::Tensor;

/// A trained tensor. Gradients and an optimizer's moments belong to its id, which stays the same
/// while its values are updated or replaced. A clone is another parameter with the same values.
#[derive(Debug)]
pub struct Parameter {
    id: ParameterId,
    tensor: Tensor,
}

/// Identifies a [`Parameter`]; no other one in this process has the same id. Ids are in the order
/// in which the parameters were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParameterId(u64);

impl Parameter {
    /// Makes a parameter with these values.
    pub fn new(tensor: Tensor) -> Parameter {
        Parameter { id: ParameterId::new(), tensor }
    }

    /// Its id.
    pub(crate) fn id(&self) -> ParameterId {
        self.id
    }
}

impl ParameterId {
    pub(crate) fn new() -> ParameterId {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        ParameterId(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl Clone for Parameter {
    fn clone(&self) -> Parameter {
        Parameter::new(self.tensor.clone())
    }
}

impl Deref for Parameter {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        &self.tensor
    }
}

impl DerefMut for Parameter {
    fn deref_mut(&mut self) -> &mut Tensor {
        &mut self.tensor
    }
}
