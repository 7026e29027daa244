//! Chooses the fastest variant of a kernel on a GPU, among variants that give the same bits. Each
//! case is measured once.
//!
//! `QLORA_TUNE=0` always takes the first variant in the kernel's table. Variants with another
//! order of sums are never chosen here: the result of a run must not depend on timing.

use std::hash::{BuildHasher, Hash};

use super::gpu::Gpu;
use crate::error::Result;
use crate::hash::QuickState;

/// Minimum and maximum rounds of timed runs, each with one run per variant, and the total seconds
/// after which no more rounds are started.
const ROUNDS: (usize, usize, f64) = (3, 10, 0.01);

impl Gpu {
    /// Returns the fastest of several variants for a case. `case` names the kernel and everything
    /// its time depends on; `key` is the same without text. `run` records one variant. It may be
    /// called many times and must have the same effect every time. Nothing is measured while
    /// profiling or planning.
    pub(crate) fn tuned(
        &self,
        key: impl Hash,
        case: impl FnOnce() -> String,
        variants: usize,
        run: impl Fn(usize) -> Result<()>,
    ) -> Result<usize> {
        let tuner = self.tuner();
        if variants < 2 || tuner.file.is_none() {
            return Ok(0);
        }
        let key = QuickState::default().hash_one(key);
        let quick = tuner.quick().get(&key).copied();
        if let Some(choice) = quick.filter(|&choice| choice < variants) {
            return Ok(choice);
        }
        let case = case();
        let known = tuner.known().get(&case).copied();
        if let Some(choice) = known.filter(|&choice| choice < variants) {
            tuner.quick().insert(key, choice);
            return Ok(choice);
        }
        if self.is_profiling() || self.is_planned() {
            return Ok(0);
        }
        let _span = tracing::trace_span!("tuning kernels").entered();
        // The first run of a variant compiles it.
        (0..variants).try_for_each(&run)?;
        let times = shortest(variants, |variant| {
            let before = self.recorded_flops();
            let time = self.time(|| run(variant))?.as_secs_f64();
            tuner.note_speed(self.recorded_flops() - before, time);
            Ok(time)
        })?;
        let best = (0..variants).min_by(|&one, &other| times[one].total_cmp(&times[other])).unwrap_or_default();
        let ms: Vec<String> = times.iter().map(|time| format!("{:.4}", time * 1e3)).collect();
        tracing::debug!("tuned {case}: variant {best} of [{}] ms", ms.join(", "));
        tuner.set(&case, best);
        tuner.quick().insert(key, best);
        Ok(best)
    }
}

/// Returns the shortest time of each variant. Variants take turns, so that a rising clock affects
/// all of them. Short runs are repeated more often, because their times vary more.
fn shortest(variants: usize, mut time: impl FnMut(usize) -> Result<f64>) -> Result<Vec<f64>> {
    let (fewest, most, enough) = ROUNDS;
    let mut shortest = vec![f64::INFINITY; variants];
    let (mut round, mut total) = (0, 0.0);
    while round < fewest || (round < most && total < enough) {
        for (variant, shortest) in shortest.iter_mut().enumerate() {
            let time = time(variant)?;
            *shortest = shortest.min(time);
            total += time;
        }
        round += 1;
    }
    Ok(shortest)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::device::{Device, GpuOptions};
    use crate::kernels::elementwise::add::add;
    use crate::tensor::Tensor;
    use crate::testing;

    #[test]
    fn variants_take_turns_and_short_ones_more_of_them() {
        for (seconds, rounds) in [(1.0, 3), (0.000_6, 5), (0.000_02, 10)] {
            let mut runs = Vec::new();
            let times = shortest(2, |variant| {
                // A clock that rises during the whole first round.
                let slow = if runs.len() < 2 { 5.0 } else { 1.0 };
                runs.push(variant);
                Ok(seconds * slow * if variant == 0 { 1.0 } else { 0.9 })
            })
            .unwrap();
            assert_eq!(times, [seconds, seconds * 0.9]);
            assert_eq!(runs, [0, 1].repeat(rounds), "{seconds}");
        }
    }

    #[test]
    fn the_fastest_variant_is_measured_once() {
        let folder = tempfile::tempdir().unwrap();
        for (index, device) in testing::gpus_with(|options| {
            options.tune = Some(folder.path().join("tuned.json"));
        })
        .into_iter()
        .enumerate()
        {
            let Device::Gpu(gpu) = &device else { unreachable!("only GPUs were asked for") };
            let x = Tensor::from_slice(&device, &[1 << 18], &testing::values(1, 1 << 18, 1.0)).unwrap();
            let runs = RefCell::new(Vec::new());
            let run = |variant: usize| {
                runs.borrow_mut().push(variant);
                (0..[40, 1, 40][variant]).try_for_each(|_| add(&x, &x).map(drop))
            };
            let case = || format!("case {index}");
            assert_eq!(gpu.tuned(index, case, 3, run).unwrap(), 1, "{}", testing::name(&device));
            let measured = runs.borrow().clone();
            assert!(measured.chunks(3).all(|round| round == [0, 1, 2]), "they take turns: {measured:?}");
            assert!((3 * (1 + ROUNDS.0)..=3 * (1 + ROUNDS.1)).contains(&measured.len()), "{measured:?}");
            for key in [index, index + 100] {
                assert_eq!(gpu.tuned(key, case, 3, run).unwrap(), 1);
                assert_eq!(runs.borrow().len(), measured.len(), "it is known");
            }
            // A choice that no longer exists is made again.
            assert_eq!(gpu.tuned(index, case, 1, run).unwrap(), 0);
        }
        let plain = Device::gpu(&GpuOptions { tune: None, ..GpuOptions::default() });
        if let Ok(Device::Gpu(gpu)) = plain {
            assert_eq!(gpu.tuned(0, || "case".into(), 3, |_| panic!("nothing is measured")).unwrap(), 0);
        }
    }
}
