//! Memory that CPU kernels allocate beside their results, for plans. On a planned GPU, kernels
//! request their buffers themselves.

use crate::device::Cpu;
use crate::error::Result;
use crate::tensor::Tensor;

/// Buffers of f32 values that a CPU kernel takes from its device's pool while it runs.
#[derive(Default)]
pub(crate) struct Scratch {
    /// Sizes, in values, of the buffers that live until the kernel returns.
    pub kept: Vec<usize>,
    /// Size, in values, of each task's buffers. As many tasks run at a time as there are
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

    /// Allocates a result of this shape on a planned CPU, then this memory, and returns the memory.
    pub fn beside(&self, cpu: &Cpu, shape: &[usize]) -> Result<Tensor> {
        let result = Tensor::planned(cpu, shape)?;
        self.take(cpu);
        Ok(result)
    }

    /// Allocates this memory on a planned CPU, and returns it.
    pub fn take(&self, cpu: &Cpu) {
        let _kept: Vec<_> = self.kept.iter().map(|&values| cpu.reserve(values)).collect();
        let of_task = |&values: &usize| (0..self.of_task).map(|_| cpu.reserve(values)).collect::<Vec<_>>();
        let mut tasks = self.tasks.clone();
        tasks.sort_unstable_by(|a, b| b.cmp(a));
        let alive = tasks.len().min(rayon::current_num_threads());
        drop(tasks[..alive].iter().map(of_task).collect::<Vec<_>>());
        // The pool keeps buffers of every size.
        tasks.dedup();
        tasks.iter().for_each(|values| drop(of_task(values)));
    }
}
