//! The environment variables `QLORA_TIER`, `QLORA_TUNE` and `QLORA_CHECK`.

use super::tier::Tier;
use crate::error::{Error, Result};

/// The environment variables that switch something off, and a description of that.
const SWITCHES: [(&str, &str); 2] = [
    ("QLORA_TUNE", "do not measure variants of kernels"),
    ("QLORA_CHECK", "do not compare a new driver's results with the CPU's"),
];

/// Checks the values of these variables.
///
/// # Errors
/// [`Error::Invalid`] unless each is 0, 1, empty or unset.
pub(super) fn check_variables() -> Result<()> {
    for (what, off) in SWITCHES {
        match std::env::var_os(what) {
            Some(value) if !["", "0", "1"].iter().any(|known| value == **known) => {
                return Err(Error::invalid(
                    "the environment",
                    what,
                    value.to_string_lossy(),
                    format!("it must be 0 ({off}) or 1 (the default)"),
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Returns the tier that `QLORA_TIER` asks for.
pub(super) fn tier_variable() -> Result<Option<Tier>> {
    let Some(name) = std::env::var_os("QLORA_TIER").filter(|name| !name.is_empty()) else { return Ok(None) };
    let name = name.to_string_lossy();
    name.parse().map(Some).map_err(|error| match error {
        Error::Invalid { expected, .. } => Error::invalid("the environment", "QLORA_TIER", name, expected),
        error => error,
    })
}

/// Checks the environment variables that have few possible values, even if no device reads them.
///
/// # Errors
/// [`Error::Invalid`] if `QLORA_TIER`, `QLORA_TUNE` or `QLORA_CHECK` has an invalid value.
pub fn check_environment() -> Result<()> {
    tier_variable()?;
    check_variables()
}

/// Whether devices are checked: unless `QLORA_CHECK` is 0.
pub(super) fn checks() -> bool {
    !std::env::var("QLORA_CHECK").is_ok_and(|value| value == "0")
}
