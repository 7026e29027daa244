//! Host memory.

use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// Smaller requests aren't checked.
const SMALL: u64 = 256 << 20;

/// Bytes that the host can provide without swapping, within the process's cgroup limit.
pub(crate) fn available() -> Option<u64> {
    let refresh = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(refresh);
    // Only resident memory counts against the cgroup's limit: cached files make room when needed.
    let of_group = system.cgroup_limits().map(|group| group.total_memory.saturating_sub(group.rss));
    let available = system.available_memory();
    Some(of_group.map_or(available, |bytes| bytes.min(available))).filter(|&bytes| bytes > 0)
}

/// Checks that `bytes` fit into memory, because a failed allocation would abort the process.
pub fn check(bytes: u64) -> Result<(), String> {
    match available().filter(|&available| bytes > SMALL && bytes > available) {
        None => Ok(()),
        Some(available) => Err(format!("takes {bytes} bytes of memory, and the host has {available} left")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_an_error() {
        check(SMALL).unwrap();
        assert!(check(1 << 60).unwrap_err().contains("takes 1152921504606846976 bytes"));
    }
}
