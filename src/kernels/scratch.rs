//! Memory that kernels allocate beside their results, as numbers. Kernels and the plan of a
//! training run call the same functions.

/// Buffers of f32 values that a kernel takes from its device's pool while it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Scratch {
    /// Sizes, in values, of the buffers that live until the kernel returns.
    pub kept: Vec<usize>,
    /// Size, in values, of each CPU task's buffers. As many tasks run at a time as there are
    /// threads.
    pub tasks: Vec<usize>,
    /// Number of such buffers per task.
    pub of_task: usize,
}

impl Scratch {
    /// One buffer, or none.
    pub fn kept(values: impl IntoIterator<Item = usize>) -> Scratch {
        Scratch { kept: values.into_iter().collect(), ..Scratch::default() }
    }

    /// One buffer per task.
    pub fn tasks(values: impl IntoIterator<Item = usize>) -> Scratch {
        Scratch { tasks: values.into_iter().collect(), of_task: 1, ..Scratch::default() }
    }
}
