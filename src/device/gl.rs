//! Detects OpenGL drivers whose shading language is too old for compute shaders.
//!
//! wgpu asks for OpenGL 3.3. NVIDIA's driver gives exactly this version with compute shaders as an
//! extension, and wgpu reports that the GPU supports them. But the GLSL of that version doesn't,
//! and no kernel would compile.

/// Returns why a GPU can't run compute shaders, judged by the version text of its driver. `None`
/// if it can, or if the text isn't understood.
pub(super) fn too_old(version: &str) -> Option<String> {
    const EMBEDDED: &str = "OpenGL ES ";
    let (name, number, least) = match version.strip_prefix(EMBEDDED) {
        Some(number) => ("OpenGL ES", number, (3, 1)),
        None => ("OpenGL", version, (4, 3)),
    };
    let found = major_and_minor(number)?;
    let dotted = |(major, minor)| format!("{name} {major}.{minor}");
    (found < least).then(|| format!("it is {}; compute shaders need {}", dotted(found), dotted(least)))
}

/// Parses 4 and 6 from "4.6.0 NVIDIA 580.159.04".
fn major_and_minor(text: &str) -> Option<(u32, u32)> {
    let release = text.split(' ').next()?;
    let mut numbers = release.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use super::too_old;

    #[test]
    fn versions_without_compute_shaders_are_told() {
        for (version, found, least) in [
            ("3.3.0 NVIDIA 580.159.04", "OpenGL 3.3", "OpenGL 4.3"),
            ("4.2.0 NVIDIA 340.108", "OpenGL 4.2", "OpenGL 4.3"),
            ("3.3 (Core Profile) Mesa 22.3.6", "OpenGL 3.3", "OpenGL 4.3"),
            ("4.1 Metal - 88", "OpenGL 4.1", "OpenGL 4.3"),
            ("OpenGL ES 3.0 Mesa 22.3.6", "OpenGL ES 3.0", "OpenGL ES 3.1"),
            ("OpenGL ES 3.0.0 (ANGLE 2.1.1 git hash: 1a2b3c)", "OpenGL ES 3.0", "OpenGL ES 3.1"),
        ] {
            let why = too_old(version).unwrap_or_else(|| panic!("{version} is kept"));
            assert_eq!(why, format!("it is {found}; compute shaders need {least}"));
        }
    }

    #[test]
    fn versions_with_compute_shaders_and_unknown_ones_are_kept() {
        for version in [
            "4.6.0 NVIDIA 580.159.04",
            "4.3.0",
            "4.5 (Core Profile) Mesa 22.3.6",
            "4.6 (Compatibility Profile) Mesa 26.2.6-1",
            "4.10.0 a vendor of the future",
            "OpenGL ES 3.1 Mesa 20.3.5",
            "OpenGL ES 3.2 Mesa 22.3.6",
            "OpenGL ES 3.2 NVIDIA 580.159.04",
            "OpenGL ES 3.2 V@0502.0 (GIT@09fef447e8)",
            "",
            "OpenGL ES",
            "OpenGL ES-CM 1.1",
            "WebGL 2.0 (OpenGL ES 3.0 Chromium)",
            "3",
            "three.three",
        ] {
            assert_eq!(too_old(version), None, "{version}");
        }
    }
}
