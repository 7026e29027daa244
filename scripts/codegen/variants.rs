//! The variants of kernels that hardware may run, and selecting among them.

use std::collections::{BTreeSet, HashMap};

use qlora_wgpu::Tier;
use qlora_wgpu::registry::{self, Defines, Kernel};

/// A variant of a kernel.
pub struct Variant {
    pub kernel: &'static Kernel,
    pub defines: Defines,
    /// The first tier that has it.
    pub tier: Tier,
    /// Its constants in one line, unique among the kernel's variants.
    pub label: String,
}

impl Variant {
    /// Whether it uses cooperative matrices.
    pub fn cooperative(&self) -> bool {
        number(&self.label, "edge").is_some()
    }
}

/// Value of a numeric constant in a variant's label, such as "edge=16 lanes=32".
pub fn number(label: &str, name: &str) -> Option<u32> {
    label.split(' ').find_map(|part| part.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
}

/// Word or number of a constant in a variant's label.
pub fn word<'a>(label: &'a str, name: &str) -> Option<&'a str> {
    label.split(' ').find_map(|part| part.strip_prefix(name)?.strip_prefix('='))
}

/// Returns the variants of kernels whose names contain one of these parts (all kernels, if there
/// are none), and whose labels contain all of these parts; "!PART" must not occur.
pub fn matching(kernels: &[String], labels: &[String]) -> Vec<Variant> {
    let mut seen = BTreeSet::new();
    let mut names: HashMap<String, usize> = HashMap::new();
    let mut found = Vec::new();
    for tier in Tier::ALL.into_iter().filter(|tier| *tier != Tier::Software) {
        for kernel in registry::kernels() {
            for defines in (kernel.variants)(tier) {
                let name = kernel.name;
                if !seen.insert(format!("{name} {defines:?}")) {
                    continue;
                }
                let mut label = defines.label();
                // Labels don't contain codebooks.
                let count = names.entry(format!("{name} {label}")).or_default();
                *count += 1;
                if *count > 1 {
                    label = format!("{label} #{count}");
                }
                let wanted = |part: &String| match part.strip_prefix('!') {
                    Some(part) => !label.contains(part),
                    None => label.contains(part.as_str()),
                };
                let named = kernels.is_empty() || kernels.iter().any(|part| name.contains(part.as_str()));
                if named && labels.iter().all(wanted) {
                    found.push(Variant { kernel, defines, tier, label });
                }
            }
        }
    }
    found
}
