//! Capability tiers: which form of each kernel a device runs.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// The form of the kernels that a device runs, chosen once per device, best first.
///
/// `QLORA_TIER` or [`GpuOptions::tier`](super::GpuOptions::tier) forces one, so that every form
/// that a driver can run is tested on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// Software drivers (`DeviceType::Cpu`): no workgroup memory and no barriers, which cost more
    /// there than they save.
    Software,
    /// Plain WGSL: register tiles fed from workgroup memory, reductions as trees in workgroup
    /// memory.
    Plain,
    /// Like `Plain`, with subgroup reductions.
    Subgroup,
    /// Like `Plain`, with operands staged as f16 (sums stay f32).
    F16,
    /// Subgroup reductions and f16 staging.
    SubgroupF16,
    /// Like `SubgroupF16`, with the large products by cooperative matrices (tensor cores): f16
    /// operands, f32 sums, 16 x 16 or 8 x 8 as the GPU supports.
    CooperativeMatrix,
}

impl Tier {
    /// Every tier, least capable first.
    pub const ALL: [Tier; 6] =
        [Tier::Software, Tier::Plain, Tier::Subgroup, Tier::F16, Tier::SubgroupF16, Tier::CooperativeMatrix];

    /// Whether reductions use subgroup operations.
    pub(crate) fn subgroups(self) -> bool {
        matches!(self, Tier::Subgroup | Tier::SubgroupF16 | Tier::CooperativeMatrix)
    }

    /// Whether operands are staged as f16, so that results contain f16 rounding of the operands.
    pub fn f16(self) -> bool {
        matches!(self, Tier::F16 | Tier::SubgroupF16 | Tier::CooperativeMatrix)
    }

    /// Whether large products use cooperative matrices.
    pub(crate) fn cooperative(self) -> bool {
        self == Tier::CooperativeMatrix
    }

    /// The wgpu features that this tier needs.
    pub fn features(self) -> wgpu::Features {
        let mut features = wgpu::Features::empty();
        features.set(wgpu::Features::SUBGROUP, self.subgroups());
        features.set(wgpu::Features::SHADER_F16, self.f16());
        features.set(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX, self.cooperative());
        features
    }

    /// Returns the best tier for a GPU of this type and these features.
    pub(crate) fn best(device_type: wgpu::DeviceType, features: wgpu::Features) -> Tier {
        if device_type == wgpu::DeviceType::Cpu {
            return Tier::Software;
        }
        Tier::runnable(features).last().unwrap_or(Tier::Plain)
    }

    /// Fallbacks if this tier's results are wrong: the hardware tiers below it, most capable
    /// first.
    pub(super) fn below(self, features: wgpu::Features) -> impl Iterator<Item = Tier> {
        let lower = move |tier: &Tier| *tier < self && *tier != Tier::Software && features.contains(tier.features());
        Tier::ALL.into_iter().rev().filter(lower)
    }

    /// Tiers that a device with these features can run, least capable first.
    pub(crate) fn runnable(features: wgpu::Features) -> impl Iterator<Item = Tier> {
        Tier::ALL.into_iter().filter(move |tier| features.contains(tier.features()))
    }

    fn name(self) -> &'static str {
        match self {
            Tier::Software => "software",
            Tier::Plain => "plain",
            Tier::Subgroup => "subgroup",
            Tier::F16 => "f16",
            Tier::SubgroupF16 => "subgroup-f16",
            Tier::CooperativeMatrix => "cooperative-matrix",
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Tier {
    type Err = Error;

    fn from_str(text: &str) -> Result<Tier> {
        Tier::ALL.into_iter().find(|tier| tier.name() == text).ok_or_else(|| {
            Error::invalid(
                "tier",
                "the name",
                format!("{text:?}"),
                format!("it must be one of {}", Tier::ALL.map(Tier::name).join(", ")),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_bad_ones_are_refused() {
        for tier in Tier::ALL {
            assert_eq!(tier.to_string().parse::<Tier>().unwrap(), tier);
        }
        let error = "fast".parse::<Tier>().unwrap_err().to_string();
        assert_eq!(
            error,
            "tier: the name is \"fast\"; it must be one of software, plain, subgroup, f16, subgroup-f16, \
             cooperative-matrix"
        );
    }

    #[test]
    fn the_best_tier_follows_type_and_features() {
        use wgpu::{DeviceType, Features};
        let all = Features::SUBGROUP | Features::SHADER_F16;
        assert_eq!(Tier::best(DeviceType::Cpu, all), Tier::Software);
        assert_eq!(Tier::best(DeviceType::DiscreteGpu, all), Tier::SubgroupF16);
        let cooperative = all | Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
        assert_eq!(Tier::best(DeviceType::DiscreteGpu, cooperative), Tier::CooperativeMatrix);
        assert_eq!(Tier::best(DeviceType::Cpu, cooperative), Tier::Software);
        assert_eq!(Tier::runnable(cooperative).last(), Some(Tier::CooperativeMatrix));
        assert_eq!(Tier::runnable(all).last(), Some(Tier::SubgroupF16));
        let below: Vec<_> = Tier::CooperativeMatrix.below(all).collect();
        assert_eq!(below, [Tier::SubgroupF16, Tier::F16, Tier::Subgroup, Tier::Plain]);
        assert_eq!(Tier::Subgroup.below(all).collect::<Vec<_>>(), [Tier::Plain]);
        assert_eq!(Tier::best(DeviceType::DiscreteGpu, Features::SHADER_F16), Tier::F16);
        assert_eq!(Tier::best(DeviceType::IntegratedGpu, Features::SUBGROUP), Tier::Subgroup);
        assert_eq!(Tier::best(DeviceType::Other, Features::empty()), Tier::Plain);
    }
}
