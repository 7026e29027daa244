//! The list of all kernels, for tests and tools. `kernel!` enters each kernel.

pub use crate::device::shader::{Defines, Kernel, compose};
#[cfg(test)]
use crate::device::{Device, Tier, dispatched};

/// A kernel in the list.
pub(crate) struct Entry {
    pub kernel: &'static Kernel,
    /// Runs the kernel on a device and compares it with its CPU twin.
    #[cfg(test)]
    pub twin: fn(&Device),
}

inventory::collect!(Entry);

/// All kernels, sorted by name.
pub fn kernels() -> Vec<&'static Kernel> {
    let mut all: Vec<_> = inventory::iter::<Entry>().map(|entry| entry.kernel).collect();
    all.sort_by_key(|kernel| kernel.name);
    all
}

/// Compares a kernel with its twin, on every device in every tier that has it. A device may choose
/// another form for the twin's shapes, so one that runs the kernel is enough.
///
/// # Panics
/// If a result is wrong, or if no device ran the kernel although one should.
#[cfg(test)]
pub(crate) fn compare(kernel: &Kernel) {
    use crate::kernels::qmatmul::lanes::one_subgroup;
    use crate::testing;

    let entry = inventory::iter::<Entry>().find(|entry| std::ptr::eq(entry.kernel, kernel)).unwrap();
    let (mut able, mut ran) = (Vec::new(), false);
    for device in testing::devices() {
        if let Device::Gpu(gpu) = &device {
            // A variant whose lanes share values needs workgroups of one subgroup.
            let runs = |variant: &Defines| !variant.flag("share") || one_subgroup(gpu);
            let variants = (kernel.variants)(gpu.tier());
            let binds = gpu.limits().max_storage_buffers as usize >= kernel.bindings.len();
            if !binds || !variants.iter().any(runs) {
                continue;
            }
            able.push(testing::name(&device));
        }
        dispatched::forget();
        (entry.twin)(&device);
        ran |= dispatched::has(kernel);
    }
    assert!(ran || able.is_empty(), "{} did not run on any of {able:?}", kernel.name);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use naga::back::{glsl, hlsl, msl, spv};
    use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
    use naga::{AddressSpace, Module, StorageAccess, TypeInner};
    use rayon::prelude::*;

    use super::*;
    use crate::device::Access;

    fn parse(kernel: &Kernel, defines: &Defines, immediates: bool) -> (String, Module, ModuleInfo) {
        let label = format!("{} {} immediates={immediates}", kernel.name, defines.label());
        let source = compose(kernel, defines, immediates).unwrap_or_else(|error| panic!("{label}: {error}"));
        let module = naga::front::wgsl::parse_str(&source)
            .unwrap_or_else(|error| panic!("{label}: {}", error.emit_to_string(&source)));
        let capabilities = Capabilities::IMMEDIATES
            | Capabilities::SUBGROUP
            | Capabilities::SUBGROUP_BARRIER
            | Capabilities::SHADER_FLOAT16
            | Capabilities::SHADER_FLOAT16_IN_FLOAT32
            | Capabilities::COOPERATIVE_MATRIX;
        let info = Validator::new(ValidationFlags::all(), capabilities)
            .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
            .subgroup_operations(naga::valid::SubgroupOperationSet::all())
            .validate(&module)
            .unwrap_or_else(|error| panic!("{label}: {}", error.emit_to_string(&source)));
        (label, module, info)
    }

    /// Each kernel's variants once.
    fn variants() -> Vec<(&'static Kernel, Defines)> {
        let mut all = Vec::new();
        for kernel in kernels() {
            let mut seen = BTreeSet::new();
            let of_tiers = Tier::ALL.into_iter().flat_map(kernel.variants);
            all.extend(of_tiers.filter(|defines| seen.insert(format!("{defines:?}"))).map(|defines| (kernel, defines)));
            assert!(!seen.is_empty(), "{} has variants", kernel.name);
        }
        all
    }

    fn struct_fields(module: &Module, name: &str) -> (u32, Vec<(String, usize)>) {
        let found = module.types.iter().find(|(_, ty)| ty.name.as_deref() == Some(name));
        let (_, ty) = found.unwrap_or_else(|| panic!("no struct {name}"));
        let TypeInner::Struct { members, span } = &ty.inner else { panic!("{name} is a struct") };
        let field = |member: &naga::StructMember| (member.name.clone().unwrap(), member.offset as usize);
        (*span, members.iter().map(field).collect())
    }

    fn same_fields(label: &str, module: &Module, name: &str, bytes: usize, fields: &[(&str, usize)]) {
        let (span, found) = struct_fields(module, name);
        assert_eq!(span as usize, bytes, "{label}: bytes of {name}");
        let wanted: Vec<_> = fields.iter().map(|(name, offset)| ((*name).to_owned(), *offset)).collect();
        assert_eq!(found, wanted, "{label}: fields of {name}");
    }

    /// One test, so that each variant is composed, parsed and validated once; on every core.
    #[test]
    fn every_variant_agrees_with_its_rust_side_and_translates_to_every_backend() {
        variants().into_par_iter().for_each(|(kernel, defines)| {
            for immediates in [true, false] {
                let (label, module, info) = parse(kernel, &defines, immediates);
                agrees(kernel, immediates, &label, &module);
                translates(&defines, &label, &module, &info);
            }
        });
    }

    fn agrees(kernel: &Kernel, immediates: bool, label: &str, module: &Module) {
        same_fields(label, module, "Params", kernel.params_bytes, kernel.params_fields);
        if module.types.iter().any(|(_, ty)| ty.name.as_deref() == Some("Matrix")) {
            use crate::kernels::matrix::packing::MatrixLayout;
            same_fields(label, module, "Matrix", size_of::<MatrixLayout>(), MatrixLayout::FIELDS);
        }
        assert_eq!(kernel.params_fields[..2], [("first_group", 0), ("groups", 4)], "{label}: the recorder's fields");
        let mut found = Vec::new();
        let (mut params, mut memory) = (0, 0);
        for (_, variable) in module.global_variables.iter() {
            match variable.space {
                AddressSpace::Storage { access } => {
                    let binding = variable.binding.as_ref().unwrap();
                    assert_eq!(binding.group, 0, "{label}");
                    let write = access.contains(StorageAccess::STORE);
                    let access = if write { Access::Write } else { Access::Read };
                    found.push((binding.binding, variable.name.clone().unwrap(), access));
                }
                AddressSpace::Immediate => params += usize::from(immediates),
                AddressSpace::Uniform => {
                    assert_eq!(variable.binding.as_ref().unwrap().binding as usize, kernel.bindings.len());
                    params += usize::from(!immediates);
                }
                AddressSpace::WorkGroup => memory += module.types[variable.ty].inner.size(module.to_ctx()),
                _ => {}
            }
        }
        // Every device has 16 KiB. Devices with 32 and 48 KiB run large tiles, or tiles with
        // two buffers, or both, and attention from workgroup memory.
        let held = label.contains(" held=") && !label.contains(" held=0");
        let more = [
            label.contains("side=128") || label.contains("tile_columns=128"),
            label.contains(" double "),
            label.contains(" staged"),
            held,
        ];
        let more = more.iter().filter(|&&more| more).count();
        let most = (16 << 10) * (1 + more as u32);
        assert!(memory <= most, "{label}: {memory} bytes of workgroup memory");
        assert_eq!(params, 1, "{label}: one variable holds the parameters");
        found.sort_by_key(|(binding, ..)| *binding);
        let wanted: Vec<_> = (0..)
            .zip(kernel.bindings)
            .map(|(binding, (name, access))| (binding, (*name).to_owned(), *access))
            .collect();
        assert_eq!(found, wanted, "{label}: bindings");
    }

    fn translates(defines: &Defines, label: &str, module: &Module, info: &ModuleInfo) {
        let fail = |backend: &str, error: &dyn std::fmt::Display| -> ! { panic!("{label}: {backend}: {error}") };
        if let Err(error) = spv::write_vec(module, info, &spv::Options::default(), None) {
            fail("SPIR-V", &error);
        }
        // Metal has cooperative matrices of 8 x 8; DX12 and GL have none.
        let (cooperative, large) = (label.contains("edge="), label.contains("edge=16"));
        let options = msl::Options { fake_missing_bindings: true, lang_version: (2, 4), ..Default::default() };
        let text = msl::write_string(module, info, &options, &msl::PipelineOptions::default());
        if let (Err(error), false) = (text, large) {
            fail("MSL", &error);
        }
        if cooperative {
            return;
        }
        let options = hlsl::Options {
            shader_model: hlsl::ShaderModel::V6_2,
            immediates_target: Some(hlsl::BindTarget::default()),
            fake_missing_bindings: true,
            ..Default::default()
        };
        let mut text = String::new();
        let pipeline = hlsl::PipelineOptions::default();
        if let Err(error) = hlsl::Writer::new(&mut text, &options, &pipeline).write(module, info, None) {
            fail("HLSL", &error);
        }
        // This GLSL version lacks f16 and suitable subgroups; the GL tiers do without.
        if !["f16", "subgroups", "share"].iter().any(|flag| defines.flag(flag)) {
            let options = glsl::Options { version: glsl::Version::new_gles(310), ..Default::default() };
            let pipeline = glsl::PipelineOptions {
                shader_stage: naga::ShaderStage::Compute,
                entry_point: "main".into(),
                multiview: None,
            };
            let mut text = String::new();
            let writer = glsl::Writer::new(
                &mut text,
                module,
                info,
                &options,
                &pipeline,
                naga::proc::BoundsCheckPolicies::default(),
            );
            if let Err(error) = writer.and_then(|mut writer| writer.write()) {
                fail("GLSL", &error);
            }
        }
    }

    #[test]
    fn no_macro_of_a_shader_hides_a_text_constant() {
        let shaders = Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
        for kernel in kernels() {
            let source = std::fs::read_to_string(shaders.join(kernel.path)).unwrap();
            let macros = source.split("{% macro ").skip(1).filter_map(|rest| rest.split('(').next());
            let given: BTreeSet<_> = Tier::ALL
                .into_iter()
                .flat_map(kernel.variants)
                .flat_map(|defines| defines.names().collect::<Vec<_>>())
                .collect();
            let hidden: Vec<_> = macros.filter(|name| given.contains(name)).collect();
            assert!(hidden.is_empty(), "shaders/{}: {hidden:?}", kernel.path);
        }
    }

    #[test]
    fn a_list_of_text_constants_has_room_for_every_variant() {
        for (kernel, defines) in variants() {
            let count = defines.names().count();
            assert!(count <= Defines::ROOM, "{} has {count}", kernel.name);
        }
    }

    /// Paths of all files under a folder with this extension, relative to it and without it.
    fn files(folder: &Path, extension: &str) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        for file in std::fs::read_dir(folder).unwrap() {
            let path = file.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            if path.is_dir() && name != "shared" {
                found.extend(files(&path, extension).into_iter().map(|below| format!("{name}/{below}")));
            } else if path.extension().is_some_and(|other| other == extension) {
                found.insert(name);
            }
        }
        found
    }

    #[test]
    fn paths_are_those_of_the_shaders_and_of_their_rust_files() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let registered: BTreeSet<String> =
            kernels().iter().map(|kernel| kernel.path.strip_suffix(".wgsl").unwrap().to_owned()).collect();
        assert_eq!(files(&root.join("shaders"), "wgsl"), registered, "every shader is registered");
        let rust = files(&root.join("src/kernels"), "rs");
        let missing: Vec<_> = registered.difference(&rust).collect();
        assert!(missing.is_empty(), "no Rust file for {missing:?}");
    }
}
