//! The GPUs to compile for, and the setup that runs their drivers without hardware.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::listing::Listing;

/// A GPU that mesa-drm-shim can simulate.
pub struct Gpu {
    /// Its name in options and in the table.
    pub name: &'static str,
    /// The shim's name: "amdgpu" stands for libamdgpu_noop_drm_shim.so.
    shim: &'static str,
    /// The driver's name: "radeon" stands for libvulkan_radeon.so.
    driver: &'static str,
    /// Selects the GPU within the driver.
    id: &'static str,
    /// Whether bounds of buffers are checked, as wgpu requests for every pipeline.
    pub robust: bool,
    /// Parser for its listings. For other drivers, only the statistics are judged.
    pub parse: Option<fn(&str) -> Listing>,
}

/// All GPUs, slowest to compile first.
pub const ALL: [Gpu; 6] = [
    // Without the checks that wgpu asks for. NVK implements them in the shader, at a price
    // (attention at D = 64: 2169 instructions and 152 spills instead of 709 and none) that
    // NVIDIA's own driver doesn't pay, and that says nothing about the kernels.
    Gpu {
        name: "ampere",
        shim: "nouveau",
        driver: "nouveau",
        id: "172",
        robust: false,
        parse: Some(crate::nak::parse),
    },
    amd("navi31"),
    amd("gfx1201"),
    Gpu { name: "adreno", shim: "freedreno", driver: "freedreno", id: "740", robust: true, parse: None },
    amd("navi21"),
    Gpu { name: "m1", shim: "asahi", driver: "asahi", id: "", robust: true, parse: None },
];

const fn amd(name: &'static str) -> Gpu {
    Gpu { name, shim: "amdgpu", driver: "radeon", id: name, robust: true, parse: Some(crate::amd::parse) }
}

impl Gpu {
    /// Finds a GPU by name.
    pub fn named(name: &str) -> Result<&'static Gpu, String> {
        let names = || ALL.iter().map(|gpu| gpu.name).collect::<Vec<_>>().join(", ");
        ALL.iter().find(|gpu| gpu.name == name).ok_or_else(|| format!("must be one of {}", names()))
    }

    /// Returns the command that runs this program on the GPU's driver, with Mesa's packages
    /// unpacked in `mesa` and the shims' in `shims`, through the dynamic linker that comes with
    /// them. `scratch` is a folder for the driver's manifest.
    pub fn command(&self, mesa: &Path, shims: &Path, scratch: &Path) -> Result<Command, Box<dyn Error>> {
        let find = |root: &Path, name: &str| -> Result<PathBuf, Box<dyn Error>> {
            // Absolute paths, because relative ones count from the manifest's folder.
            let root = fs::canonicalize(root).map_err(|error| format!("{}: {error}", root.display()))?;
            let folders = fs::read_dir(root.join("usr/lib")).map_err(|error| format!("{}: {error}", root.display()))?;
            let mut paths = folders.filter_map(|folder| Some(folder.ok()?.path().join(name)));
            Ok(paths.find(|path| path.exists()).ok_or_else(|| format!("{} has no {name}", root.display()))?)
        };
        let library = find(mesa, &format!("libvulkan_{}.so", self.driver))?;
        let libraries = library.parent().unwrap_or(mesa);
        let is_linker =
            |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ld-linux"));
        let linker = fs::read_dir(libraries)?.filter_map(|file| Some(file.ok()?.path())).find(is_linker);
        let manifest = scratch.join(format!("{}.json", self.name));
        let icd = serde_json::json!({"library_path": library, "api_version": "1.4.0"});
        fs::write(&manifest, serde_json::json!({"file_format_version": "1.0.0", "ICD": icd}).to_string())?;

        let mut command = Command::new(linker.ok_or_else(|| format!("{} has no dynamic linker", mesa.display()))?);
        command.arg("--preload").arg(find(shims, &format!("lib{}_noop_drm_shim.so", self.shim))?);
        command.arg("--library-path").arg(libraries).arg(std::env::current_exe()?);
        for name in ["VK_ICD_FILENAMES", "VK_ADD_DRIVER_FILES", "WGPU_BACKEND", "LD_LIBRARY_PATH", "LD_PRELOAD"] {
            command.env_remove(name);
        }
        command.env("VK_DRIVER_FILES", manifest).env("MESA_SHADER_CACHE_DISABLE", "1").env("NODEVICE_SELECT", "1");
        command.env("AMDGPU_GPU_ID", self.id).env("NOUVEAU_CHIPSET", self.id).env("FD_GPU_ID", self.id);
        Ok(command)
    }
}
