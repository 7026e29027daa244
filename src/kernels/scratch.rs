//! What kernels allocate beside their results, as numbers: the kernel and the plan of a training run ask the same functions.

/// Buffers of f32 values that a kernel takes from its device's pool while it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Scratch {
    /// Values of each buffer that is there until the kernel has returned.
    pub kept: Vec<usize>,
    /// Values of a buffer of each task on the CPU; there are as many at a time as there are threads.
    pub tasks: Vec<usize>,
    /// Buffers that a task has of its size.
    pub of_task: usize,
}

impl Scratch {
    /// Of one buffer, or none.
    pub fn kept(values: impl IntoIterator<Item = usize>) -> Scratch {
        Scratch { kept: values.into_iter().collect(), ..Scratch::default() }
    }

    /// Of a buffer a task.
    pub fn tasks(values: impl IntoIterator<Item = usize>) -> Scratch {
        Scratch { tasks: values.into_iter().collect(), of_task: 1, ..Scratch::default() }
    }
}
