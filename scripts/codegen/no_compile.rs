//! Replaces `compile.rs` on systems without mesa-drm-shim.

use std::collections::BTreeMap;
use std::error::Error;

use crate::variants::Variant;

pub struct Compiled {
    pub subgroup: u32,
    pub statistics: BTreeMap<String, f64>,
    pub texts: Vec<(String, String)>,
}

pub struct Driver {
    pub name: String,
}

impl Driver {
    pub fn open(_robust: bool) -> Result<Driver, Box<dyn Error>> {
        Err("mesa-drm-shim runs only on Linux, and so does this program".into())
    }

    pub fn runs(&self, variant: &Variant) -> bool {
        variant.cooperative()
    }

    pub fn compile(&self, variant: &Variant) -> Result<Compiled, Box<dyn Error>> {
        Err(format!("nothing compiles {} {:?} here", variant.kernel.name, variant.defines).into())
    }
}
