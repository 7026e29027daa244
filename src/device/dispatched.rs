//! The kernels that a thread has dispatched, for tests.

use std::cell::RefCell;
use std::collections::BTreeSet;

use super::shader::Kernel;

thread_local! {
    static NAMES: RefCell<BTreeSet<&'static str>> = const { RefCell::new(BTreeSet::new()) };
}

/// Adds a kernel.
pub fn note(kernel: &Kernel) {
    NAMES.with_borrow_mut(|names| names.insert(kernel.name));
}

/// Whether this thread has dispatched the kernel since [`forget`].
pub fn has(kernel: &Kernel) -> bool {
    NAMES.with_borrow(|names| names.contains(kernel.name))
}

/// Starts again.
pub fn forget() {
    NAMES.with_borrow_mut(BTreeSet::clear);
}
