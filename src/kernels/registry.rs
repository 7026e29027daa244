//! All kernels, one entry each: shader, parameters, variants and CPU twin.

use super::attention::form::{Form, Pass};
use super::matrix::{dense_defines, quant_defines, wide};
use super::{attention, elementwise, lora, loss, matrix, optim, qmatmul, rows};
use crate::device::{Defines, Kernel, Tier};
use crate::quant::Codebook;

/// A kernel and the facts that tests need.
pub struct Entry {
    /// Its name, bindings and parameters.
    pub kernel: &'static Kernel,
    /// Text constants of every variant that a tier may run.
    pub variants: fn(Tier) -> Vec<Defines>,
    /// Path of the CPU twin that tests compare it with.
    pub twin: &'static str,
}

/// All kernels.
pub static KERNELS: &[Entry] = &[
    Entry {
        kernel: &optim::adamw::KERNEL,
        variants: |_| vec![elementwise::quads::defines()],
        twin: "adamw::reference",
    },
    Entry {
        kernel: &optim::adamw_several::KERNEL,
        variants: |_| vec![elementwise::quads::defines()],
        twin: "adamw::reference",
    },
    Entry {
        kernel: &elementwise::add::KERNEL,
        variants: |_| vec![elementwise::quads::defines()],
        twin: "add::reference",
    },
    Entry {
        kernel: &elementwise::add_assign::KERNEL,
        variants: |_| vec![elementwise::quads::defines()],
        twin: "add::reference",
    },
    Entry {
        kernel: &elementwise::append::KERNEL,
        variants: |_| vec![elementwise::quads::defines()],
        twin: "append::reference",
    },
    Entry { kernel: &attention::plain::KERNEL, variants: attention::plain::variants, twin: "attention::reference" },
    Entry {
        kernel: &attention::coop::KERNEL,
        variants: |tier| Form::variants(Pass::Forward, tier),
        twin: "attention::reference",
    },
    Entry {
        kernel: &attention::backward::delta::KERNEL,
        variants: |tier| vec![attention::backward::delta::defines(tier)],
        twin: "attention_delta::reference",
    },
    Entry {
        kernel: &attention::backward::dkv::KERNEL,
        variants: attention::backward::dkv::variants,
        twin: "attention_backward::reference",
    },
    Entry {
        kernel: &attention::backward::dkv_coop::KERNEL,
        variants: |tier| Form::variants(Pass::Dkv, tier),
        twin: "attention_backward::reference",
    },
    Entry {
        kernel: &attention::backward::dkv_lanes::KERNEL,
        variants: attention::backward::dkv_lanes::variants,
        twin: "attention_backward::reference",
    },
    Entry {
        kernel: &attention::backward::dkv_tile::KERNEL,
        variants: attention::backward::dkv_tile::variants,
        twin: "attention_backward::reference",
    },
    Entry {
        kernel: &attention::backward::dq::KERNEL,
        variants: attention::backward::dq::variants,
        twin: "attention_backward::reference",
    },
    Entry {
        kernel: &attention::backward::dq_coop::KERNEL,
        variants: |tier| Form::variants(Pass::Dq, tier),
        twin: "attention_backward::reference",
    },
    Entry {
        kernel: &attention::backward::dq_lanes::KERNEL,
        variants: attention::backward::dq_lanes::variants,
        twin: "attention_backward::reference",
    },
    Entry {
        kernel: &attention::backward::dq_tile::KERNEL,
        variants: attention::backward::dq_tile::variants,
        twin: "attention_backward::reference",
    },
    Entry { kernel: &attention::lanes::KERNEL, variants: attention::lanes::variants, twin: "attention::reference" },
    Entry { kernel: &attention::pack::KERNEL, variants: attention::pack::variants, twin: "attention_pack::reference" },
    Entry { kernel: &attention::tile::KERNEL, variants: attention::tile::variants, twin: "attention::reference" },
    Entry { kernel: &rows::column_sum::KERNEL, variants: rows::column_sum::variants, twin: "column_sum::reference" },
    Entry {
        kernel: &loss::cross_entropy::KERNEL,
        variants: loss::cross_entropy::variants,
        twin: "cross_entropy::reference",
    },
    Entry {
        kernel: &matrix::dequantize::KERNEL,
        variants: |_| matrix::dequantize::variants(&matrices()),
        twin: "host_matrix::dequantize_rows",
    },
    Entry {
        kernel: &lora::dora_norm::KERNEL,
        variants: |tier| lora::dora_norm::variants(&matrices(), tier),
        twin: "dora_norm::reference",
    },
    Entry {
        kernel: &elementwise::dropout_mix::KERNEL,
        variants: |_| elementwise::dropout_mix::variants(),
        twin: "dropout_mix::reference",
    },
    Entry {
        kernel: &rows::embedding::KERNEL,
        variants: |_| rows::embedding::variants(&matrices()),
        twin: "embedding::reference",
    },
    Entry {
        kernel: &optim::grad_norm::KERNEL,
        variants: |_| vec![optim::grad_norm::defines()],
        twin: "grad_norm::reference",
    },
    Entry { kernel: &lora::coop::KERNEL, variants: lora_coop_variants, twin: "lora_dw::reference" },
    Entry { kernel: &lora::dh::KERNEL, variants: lora::dh::variants, twin: "lora_dh::reference" },
    Entry { kernel: &lora::down::KERNEL, variants: lora::down::variants, twin: "lora_down::reference" },
    Entry { kernel: &lora::dw::KERNEL, variants: lora::dw::variants, twin: "lora_dw::reference" },
    Entry { kernel: &rows::pack_rows::KERNEL, variants: pack_rows_variants, twin: "row_factor::reference" },
    Entry { kernel: &qmatmul::coop::KERNEL, variants: coop_variants, twin: "qmatmul::reference" },
    Entry { kernel: &qmatmul::dx::coop::KERNEL, variants: dx_coop_variants, twin: "qmatmul_dx::reference" },
    Entry { kernel: &qmatmul::dx::lanes::KERNEL, variants: dx_lanes_variants, twin: "qmatmul_dx::reference" },
    Entry { kernel: &qmatmul::dx::tile::KERNEL, variants: dx_tile_variants, twin: "qmatmul_dx::reference" },
    Entry { kernel: &qmatmul::gemv::KERNEL, variants: gemv_variants, twin: "qmatmul::reference" },
    Entry { kernel: &qmatmul::lanes::KERNEL, variants: lanes_variants, twin: "qmatmul::reference" },
    Entry { kernel: &qmatmul::tile::KERNEL, variants: tile_variants, twin: "qmatmul::reference" },
    Entry { kernel: &rows::rms_norm::KERNEL, variants: rows::rms_norm::variants, twin: "rms_norm::reference" },
    Entry {
        kernel: &rows::rms_norm_backward::KERNEL,
        variants: rows::rms_norm_backward::variants,
        twin: "rms_norm_backward::reference",
    },
    Entry { kernel: &elementwise::rope::KERNEL, variants: |_| elementwise::rope::variants(), twin: "rope::reference" },
    Entry {
        kernel: &elementwise::rope_append::KERNEL,
        variants: |_| elementwise::rope::layouts(),
        twin: "rope_append::reference",
    },
    Entry {
        kernel: &rows::row_factor::KERNEL,
        variants: |_| rows::row_factor::variants(),
        twin: "row_factor::reference",
    },
    Entry { kernel: &loss::sample::KERNEL, variants: loss::sample::variants, twin: "sample::reference" },
    Entry {
        kernel: &elementwise::scale_columns::KERNEL,
        variants: |_| elementwise::scale_columns::variants(),
        twin: "scale_columns::reference",
    },
    Entry {
        kernel: &elementwise::silu_mul::KERNEL,
        variants: |_| vec![elementwise::quads::defines()],
        twin: "silu_mul::reference",
    },
    Entry {
        kernel: &elementwise::silu_mul_backward::KERNEL,
        variants: |_| vec![elementwise::quads::defines()],
        twin: "silu_mul_backward::reference",
    },
    Entry { kernel: &optim::square_sums::KERNEL, variants: optim::square_sums::variants, twin: "grad_norm::reference" },
    Entry { kernel: &rows::sum::KERNEL, variants: rows::sum::variants, twin: "sum::reference" },
];

fn coop_variants(tier: Tier) -> Vec<Defines> {
    if tier.cooperative() { qmatmul::coop::variants(&wide_matrices()) } else { Vec::new() }
}

fn pack_rows_variants(tier: Tier) -> Vec<Defines> {
    if tier.cooperative() { rows::pack_rows::variants() } else { Vec::new() }
}

fn dx_coop_variants(tier: Tier) -> Vec<Defines> {
    if tier.cooperative() { qmatmul::dx::coop::variants(&wide_matrices()) } else { Vec::new() }
}

fn dx_lanes_variants(tier: Tier) -> Vec<Defines> {
    if tier == Tier::Software { qmatmul::dx::lanes::variants(&matrices()) } else { Vec::new() }
}

fn dx_tile_variants(tier: Tier) -> Vec<Defines> {
    if tier == Tier::Software { Vec::new() } else { qmatmul::dx::tile::variants(&wide_matrices(), tier.f16()) }
}

fn gemv_variants(tier: Tier) -> Vec<Defines> {
    if tier == Tier::Software { Vec::new() } else { qmatmul::gemv::variants(&wide_matrices()) }
}

fn lora_coop_variants(tier: Tier) -> Vec<Defines> {
    if tier.cooperative() { lora::coop::variants() } else { Vec::new() }
}

fn lanes_variants(tier: Tier) -> Vec<Defines> {
    if tier == Tier::Software { qmatmul::lanes::variants(&matrices()) } else { Vec::new() }
}

fn tile_variants(tier: Tier) -> Vec<Defines> {
    if tier == Tier::Software { Vec::new() } else { qmatmul::tile::variants(&wide_matrices(), tier.f16()) }
}

/// Every way in which `shared/matrix.wgsl` can read a matrix.
fn matrices() -> Vec<Defines> {
    let count_up = Codebook(std::array::from_fn(|i| i as f32 - 8.0));
    let mut all = Vec::new();
    for ragged in [false, true] {
        for codebook in [&Codebook::NF4, &Codebook::INT4, &count_up] {
            all.push(quant_defines(codebook, "plain", "none", ragged));
        }
        all.push(quant_defines(&Codebook::FP4, "double", "none", ragged));
        all.push(quant_defines(&count_up, "plain", "plain", ragged));
        all.push(quant_defines(&count_up, "double", "double", ragged));
        all.extend(["f32", "f16", "bf16"].map(|kind| dense_defines(kind, ragged)));
    }
    all.push(dense_defines("q8_0", false));
    all
}

/// Every way in which hardware reads a matrix.
fn wide_matrices() -> Vec<Defines> {
    let chunks = |matrix: &Defines| matrix.label().starts_with("kind=quant") && !matrix.flag("ragged");
    let mut all: Vec<_> = matrices().into_iter().map(|matrix| (chunks(&matrix), matrix)).collect();
    // Rows of whole words, with blocks that cut the chunks of 32.
    all.extend(
        all.iter().filter(|(chunked, _)| *chunked).map(|(_, matrix)| (false, matrix.clone())).collect::<Vec<_>>(),
    );
    all.into_iter().map(|(chunked, matrix)| wide(matrix, chunked)).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use naga::back::{glsl, hlsl, msl, spv};
    use naga::valid::{Capabilities, ValidationFlags, Validator};
    use naga::{AddressSpace, Module, StorageAccess, TypeInner};

    use super::*;
    use crate::device::{Access, compose};

    fn parse(kernel: &Kernel, defines: &Defines, immediates: bool) -> (String, Module, naga::valid::ModuleInfo) {
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

    /// Each kernel's variants once, with the tiers that run them.
    fn each(mut check: impl FnMut(&Entry, &Defines, bool)) {
        for entry in KERNELS {
            let mut seen = BTreeSet::new();
            for tier in Tier::ALL {
                for defines in (entry.variants)(tier) {
                    for immediates in [true, false] {
                        if seen.insert((format!("{defines:?}"), immediates)) {
                            check(entry, &defines, immediates);
                        }
                    }
                }
            }
            assert!(!seen.is_empty(), "{} has variants", entry.kernel.name);
        }
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

    #[test]
    fn every_variant_agrees_with_its_rust_side() {
        each(|entry, defines, immediates| {
            let kernel = entry.kernel;
            let (label, module, _) = parse(kernel, defines, immediates);
            same_fields(&label, &module, "Params", kernel.params_bytes, kernel.params_fields);
            if module.types.iter().any(|(_, ty)| ty.name.as_deref() == Some("Matrix")) {
                use crate::kernels::matrix::packing::MatrixLayout;
                same_fields(&label, &module, "Matrix", size_of::<MatrixLayout>(), MatrixLayout::FIELDS);
            }
            assert_eq!(
                kernel.params_fields[..2],
                [("first_group", 0), ("groups", 4)],
                "{label}: the recorder's fields"
            );
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
        });
    }

    #[test]
    fn every_variant_translates_to_every_backend() {
        each(|entry, defines, immediates| {
            let (label, module, info) = parse(entry.kernel, defines, immediates);
            let fail = |backend: &str, error: &dyn std::fmt::Display| -> ! { panic!("{label}: {backend}: {error}") };
            if let Err(error) = spv::write_vec(&module, &info, &spv::Options::default(), None) {
                fail("SPIR-V", &error);
            }
            // Metal has cooperative matrices of 8 x 8; DX12 and GL have none.
            let (cooperative, large) = (label.contains("edge="), label.contains("edge=16"));
            let options = msl::Options { fake_missing_bindings: true, lang_version: (2, 4), ..Default::default() };
            let text = msl::write_string(&module, &info, &options, &msl::PipelineOptions::default());
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
            if let Err(error) = hlsl::Writer::new(&mut text, &options, &pipeline).write(&module, &info, None) {
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
                    &module,
                    &info,
                    &options,
                    &pipeline,
                    naga::proc::BoundsCheckPolicies::default(),
                );
                if let Err(error) = writer.and_then(|mut writer| writer.write()) {
                    fail("GLSL", &error);
                }
            }
        });
    }

    #[test]
    fn no_macro_of_a_shader_hides_a_text_constant() {
        let shaders = Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
        for entry in KERNELS {
            let source = std::fs::read_to_string(shaders.join(entry.kernel.path)).unwrap();
            let macros = source.split("{% macro ").skip(1).filter_map(|rest| rest.split('(').next());
            let given: BTreeSet<_> = Tier::ALL
                .into_iter()
                .flat_map(entry.variants)
                .flat_map(|defines| defines.names().collect::<Vec<_>>())
                .collect();
            let hidden: Vec<_> = macros.filter(|name| given.contains(name)).collect();
            assert!(hidden.is_empty(), "shaders/{}: {hidden:?}", entry.kernel.path);
        }
    }

    #[test]
    fn a_list_of_text_constants_has_room_for_every_variant() {
        each(|entry, defines, _| {
            let count = defines.names().count();
            assert!(count <= Defines::ROOM, "{} has {count}", entry.kernel.name);
        });
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
            KERNELS.iter().map(|entry| entry.kernel.path.strip_suffix(".wgsl").unwrap().to_owned()).collect();
        assert_eq!(files(&root.join("shaders"), "wgsl"), registered, "every shader is registered");
        let rust = files(&root.join("src/kernels"), "rs");
        let missing: Vec<_> = registered.difference(&rust).collect();
        assert!(missing.is_empty(), "no Rust file for {missing:?}");
    }
}
