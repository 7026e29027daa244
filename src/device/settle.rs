//! Chooses the tier of a device: the best one whose results agree with the CPU's. The answer is
//! found once per driver version and kept beside the tuned choices. Nobody has tested every
//! driver, and nothing is worse than a wrong result that nobody notices.

use super::choices;
use super::cooperative::Cooperative;
use super::gpu::Gpu;
use super::options::GpuOptions;
use super::raw::{Wrap, device_name};
use super::tier::Tier;
use super::variables::checks;
use crate::error::{Error, Result};

/// Describes where a device's results differ from the CPU's, or returns `None`.
pub(crate) type Check = fn(&Gpu) -> Result<Option<String>>;

/// Recorded in place of lanes for a tier that failed.
const FAILED: usize = usize::MAX;

/// The wanted tier, and whether it is the only acceptable one.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub tier: Tier,
    pub forced: bool,
}

/// Properties of a GPU that decide which forms of the kernels it can run.
pub(super) struct Ability {
    pub features: wgpu::Features,
    /// Candidates, one for each possible subgroup size.
    pub cooperative: Vec<Cooperative>,
    /// Whether to skip the check. Software drivers are trusted, because every change is tested on
    /// them.
    pub trusted: bool,
}

/// Opens a device with the best tier that passes `check`.
///
/// # Errors
/// Errors of `open`; [`Error::Device`] if no tier passes.
pub(super) fn settle(
    info: &wgpu::AdapterInfo,
    ability: &Ability,
    wanted: Wanted,
    options: &GpuOptions,
    check: Check,
    open: impl Fn(Wrap) -> Result<Gpu>,
) -> Result<Gpu> {
    let any = ability.cooperative.first().copied();
    if ability.trusted || !checks() {
        return open(settings(options, wanted.tier, any));
    }
    let device = format!("{}, {} {}, {}", device_name(info), info.driver, info.driver_info, env!("CARGO_PKG_VERSION"));
    let file = options.tune.as_deref();
    let mut known = file.map(|file| choices::recall(file, &device)).unwrap_or_default();
    let mut faults = Vec::new();
    let fallbacks = wanted.tier.below(ability.features).filter(|_| !wanted.forced);
    for tier in std::iter::once(wanted.tier).chain(fallbacks) {
        let case = format!("agrees with the CPU as {tier}");
        let forms =
            if tier.cooperative() { ability.cooperative.iter().copied().map(Some).collect() } else { vec![any] };
        let lanes = |form: &Option<Cooperative>| form.map_or(0, |form| form.lanes as usize);
        match known.get(&case) {
            Some(&FAILED) if !wanted.forced => continue,
            Some(&FAILED) | None => {}
            Some(&passed) => {
                if let Some(form) = forms.iter().find(|form| lanes(form) == passed) {
                    return open(settings(options, tier, *form));
                }
            }
        }
        // If the GPU can't run the tier, `open` reports it.
        let none = [any];
        for form in if forms.is_empty() { &none[..] } else { &forms } {
            let gpu = open(settings(options, tier, *form))?;
            let fault = match check(&gpu) {
                Ok(None) => {
                    known.insert(case, lanes(form));
                    choices::keep(file, &device, &known);
                    return Ok(gpu);
                }
                Ok(Some(fault)) => fault,
                Err(error) => error.to_string(),
            };
            faults.push(format!("tier {tier}: {fault}"));
        }
        tracing::warn!(
            "{}: not using tier {tier}, because its results differ from the CPU's: {}",
            device_name(info),
            faults.join("; ")
        );
        known.insert(case, FAILED);
        choices::keep(file, &device, &known);
    }
    if faults.is_empty() {
        faults.push("no tier agreed when this driver was checked; remove tuned.json to check it again".into());
    }
    Err(Error::Device {
        device: device_name(info),
        op: "comparing its results with the CPU's".into(),
        message: faults.join("; "),
    })
}

fn settings(options: &GpuOptions, tier: Tier, cooperative: Option<Cooperative>) -> Wrap {
    Wrap {
        tier,
        cooperative,
        max_binding_bytes: options.max_binding_bytes,
        memory_limit: options.memory_limit,
        immediates: options.immediates,
        tune: options.tune.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::list;

    #[test]
    fn a_tier_that_is_wrong_is_left_and_not_tried_again() {
        if std::env::var("QLORA_TEST_DEVICES").is_ok_and(|wanted| wanted == "cpu") {
            return;
        }
        let only_plain: Check = |gpu| Ok((gpu.tier() != Tier::Plain).then(|| "y is off".into()));
        let never: Check = |_| unreachable!("a known tier is not checked again");
        for adapter in list::adapters() {
            let info = adapter.get_info();
            let features = adapter.features() & (wgpu::Features::SUBGROUP | wgpu::Features::SHADER_F16);
            let ability = Ability { features, cooperative: Vec::new(), trusted: false };
            let best = Tier::runnable(features).last().unwrap();
            let folder = tempfile::tempdir().unwrap();
            let options = GpuOptions { tune: Some(folder.path().join("tuned.json")), ..GpuOptions::default() };
            let open = |tier, forced, check| {
                let wanted = Wanted { tier, forced };
                settle(&info, &ability, wanted, &options, check, |wrap| pollster::block_on(Gpu::open(&adapter, wrap)))
            };
            assert_eq!(open(best, false, only_plain).unwrap().tier(), Tier::Plain);
            assert_eq!(open(best, false, never).unwrap().tier(), Tier::Plain);
            assert_eq!(open(Tier::Plain, true, never).unwrap().tier(), Tier::Plain);
            if best != Tier::Plain {
                // Forcing a tier that is wrong fails every time.
                for _ in 0..2 {
                    let error = open(best, true, only_plain).map(|gpu| gpu.tier()).unwrap_err().to_string();
                    assert!(error.contains(&format!("tier {best}: y is off")), "{error}");
                }
            }
            let always: Check = |_| Ok(Some("y is off".into()));
            let options = GpuOptions { tune: None, ..options.clone() };
            let wanted = Wanted { tier: best, forced: false };
            let error =
                settle(&info, &ability, wanted, &options, always, |wrap| pollster::block_on(Gpu::open(&adapter, wrap)));
            let error = error.map(|gpu| gpu.tier()).unwrap_err().to_string();
            assert!(error.contains("tier plain: y is off"), "{error}");
        }
    }
}
