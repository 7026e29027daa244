//! All kernels, one entry each: shader, parameters, variants and CPU twin.

use super::attention_form::{Form, Pass};
use super::matrix::{dense_defines, quant_defines, wide};
use super::{
    adamw, adamw_several, add, add_assign, append, attention, attention_coop, attention_delta, attention_dkv,
    attention_dkv_coop, attention_dkv_lanes, attention_dkv_tile, attention_dq, attention_dq_coop, attention_dq_lanes,
    attention_dq_tile, attention_lanes, attention_pack, attention_tile, column_sum, cross_entropy, dequantize,
    dora_norm, dropout_mix, embedding, grad_norm, lora_coop, lora_dh, lora_down, lora_dw, pack_rows, qmatmul_coop,
    qmatmul_dx_coop, qmatmul_dx_lanes, qmatmul_dx_tile, qmatmul_gemv, qmatmul_lanes, qmatmul_tile, quads, rms_norm,
    rms_norm_backward, rope, rope_append, row_factor, sample, scale_columns, silu_mul, silu_mul_backward, square_sums,
    sum,
};
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
    Entry { kernel: &adamw::KERNEL, variants: |_| vec![quads::defines()], twin: "adamw::reference" },
    Entry { kernel: &adamw_several::KERNEL, variants: |_| vec![quads::defines()], twin: "adamw::reference" },
    Entry { kernel: &add::KERNEL, variants: |_| vec![quads::defines()], twin: "add::reference" },
    Entry { kernel: &add_assign::KERNEL, variants: |_| vec![quads::defines()], twin: "add::reference" },
    Entry { kernel: &append::KERNEL, variants: |_| vec![quads::defines()], twin: "append::reference" },
    Entry { kernel: &attention::KERNEL, variants: attention::variants, twin: "attention::reference" },
    Entry {
        kernel: &attention_coop::KERNEL,
        variants: |tier| Form::variants(Pass::Forward, tier),
        twin: "attention::reference",
    },
    Entry {
        kernel: &attention_delta::KERNEL,
        variants: |tier| vec![attention_delta::defines(tier)],
        twin: "attention_delta::reference",
    },
    Entry { kernel: &attention_dkv::KERNEL, variants: attention_dkv::variants, twin: "attention_backward::reference" },
    Entry {
        kernel: &attention_dkv_coop::KERNEL,
        variants: |tier| Form::variants(Pass::Dkv, tier),
        twin: "attention_backward::reference",
    },
    Entry {
        kernel: &attention_dkv_lanes::KERNEL,
        variants: attention_dkv_lanes::variants,
        twin: "attention_backward::reference",
    },
    Entry {
        kernel: &attention_dkv_tile::KERNEL,
        variants: attention_dkv_tile::variants,
        twin: "attention_backward::reference",
    },
    Entry { kernel: &attention_dq::KERNEL, variants: attention_dq::variants, twin: "attention_backward::reference" },
    Entry {
        kernel: &attention_dq_coop::KERNEL,
        variants: |tier| Form::variants(Pass::Dq, tier),
        twin: "attention_backward::reference",
    },
    Entry {
        kernel: &attention_dq_lanes::KERNEL,
        variants: attention_dq_lanes::variants,
        twin: "attention_backward::reference",
    },
    Entry {
        kernel: &attention_dq_tile::KERNEL,
        variants: attention_dq_tile::variants,
        twin: "attention_backward::reference",
    },
    Entry { kernel: &attention_lanes::KERNEL, variants: attention_lanes::variants, twin: "attention::reference" },
    Entry { kernel: &attention_pack::KERNEL, variants: attention_pack::variants, twin: "attention_pack::reference" },
    Entry { kernel: &attention_tile::KERNEL, variants: attention_tile::variants, twin: "attention::reference" },
    Entry { kernel: &column_sum::KERNEL, variants: column_sum::variants, twin: "column_sum::reference" },
    Entry { kernel: &cross_entropy::KERNEL, variants: cross_entropy::variants, twin: "cross_entropy::reference" },
    Entry {
        kernel: &dequantize::KERNEL,
        variants: |_| dequantize::variants(&matrices()),
        twin: "host_matrix::dequantize_rows",
    },
    Entry {
        kernel: &dora_norm::KERNEL,
        variants: |tier| dora_norm::variants(&matrices(), tier),
        twin: "dora_norm::reference",
    },
    Entry { kernel: &dropout_mix::KERNEL, variants: |_| dropout_mix::variants(), twin: "dropout_mix::reference" },
    Entry { kernel: &embedding::KERNEL, variants: |_| embedding::variants(&matrices()), twin: "embedding::reference" },
    Entry { kernel: &grad_norm::KERNEL, variants: |_| vec![grad_norm::defines()], twin: "grad_norm::reference" },
    Entry { kernel: &lora_coop::KERNEL, variants: lora_coop_variants, twin: "lora_dw::reference" },
    Entry { kernel: &lora_dh::KERNEL, variants: lora_dh::variants, twin: "lora_dh::reference" },
    Entry { kernel: &lora_down::KERNEL, variants: lora_down::variants, twin: "lora_down::reference" },
    Entry { kernel: &lora_dw::KERNEL, variants: lora_dw::variants, twin: "lora_dw::reference" },
    Entry { kernel: &pack_rows::KERNEL, variants: pack_rows_variants, twin: "row_factor::reference" },
    Entry { kernel: &qmatmul_coop::KERNEL, variants: coop_variants, twin: "qmatmul::reference" },
    Entry { kernel: &qmatmul_dx_coop::KERNEL, variants: dx_coop_variants, twin: "qmatmul_dx::reference" },
    Entry { kernel: &qmatmul_dx_lanes::KERNEL, variants: dx_lanes_variants, twin: "qmatmul_dx::reference" },
    Entry { kernel: &qmatmul_dx_tile::KERNEL, variants: dx_tile_variants, twin: "qmatmul_dx::reference" },
    Entry { kernel: &qmatmul_gemv::KERNEL, variants: gemv_variants, twin: "qmatmul::reference" },
    Entry { kernel: &qmatmul_lanes::KERNEL, variants: lanes_variants, twin: "qmatmul::reference" },
    Entry { kernel: &qmatmul_tile::KERNEL, variants: tile_variants, twin: "qmatmul::reference" },
    Entry { kernel: &rms_norm::KERNEL, variants: rms_norm::variants, twin: "rms_norm::reference" },
    Entry {
        kernel: &rms_norm_backward::KERNEL,
        variants: rms_norm_backward::variants,
        twin: "rms_norm_backward::reference",
    },
    Entry { kernel: &rope::KERNEL, variants: |_| rope::variants(), twin: "rope::reference" },
    Entry { kernel: &rope_append::KERNEL, variants: |_| rope::layouts(), twin: "rope_append::reference" },
    Entry { kernel: &row_factor::KERNEL, variants: |_| row_factor::variants(), twin: "row_factor::reference" },
    Entry { kernel: &sample::KERNEL, variants: sample::variants, twin: "sample::reference" },
    Entry { kernel: &scale_columns::KERNEL, variants: |_| scale_columns::variants(), twin: "scale_columns::reference" },
    Entry { kernel: &silu_mul::KERNEL, variants: |_| vec![quads::defines()], twin: "silu_mul::reference" },
    Entry {
        kernel: &silu_mul_backward::KERNEL,
        variants: |_| vec![quads::defines()],
        twin: "silu_mul_backward::reference",
    },
    Entry { kernel: &square_sums::KERNEL, variants: square_sums::variants, twin: "grad_norm::reference" },
    Entry { kernel: &sum::KERNEL, variants: sum::variants, twin: "sum::reference" },
];

fn coop_variants(tier: Tier) -> Vec<Defines> {
    if tier.cooperative() { qmatmul_coop::variants(&wide_matrices()) } else { Vec::new() }
}

fn pack_rows_variants(tier: Tier) -> Vec<Defines> {
    if tier.cooperative() { pack_rows::variants() } else { Vec::new() }
}

fn dx_coop_variants(tier: Tier) -> Vec<Defines> {
    if tier.cooperative() { qmatmul_dx_coop::variants(&wide_matrices()) } else { Vec::new() }
}

fn dx_lanes_variants(tier: Tier) -> Vec<Defines> {
    if tier == Tier::Software { qmatmul_dx_lanes::variants(&matrices()) } else { Vec::new() }
}

fn dx_tile_variants(tier: Tier) -> Vec<Defines> {
    if tier == Tier::Software { Vec::new() } else { qmatmul_dx_tile::variants(&wide_matrices(), tier.f16()) }
}

fn gemv_variants(tier: Tier) -> Vec<Defines> {
    if tier == Tier::Software { Vec::new() } else { qmatmul_gemv::variants(&wide_matrices()) }
}

fn lora_coop_variants(tier: Tier) -> Vec<Defines> {
    if tier.cooperative() { lora_coop::variants() } else { Vec::new() }
}

fn lanes_variants(tier: Tier) -> Vec<Defines> {
    if tier == Tier::Software { qmatmul_lanes::variants(&matrices()) } else { Vec::new() }
}

fn tile_variants(tier: Tier) -> Vec<Defines> {
    if tier == Tier::Software { Vec::new() } else { qmatmul_tile::variants(&wide_matrices(), tier.f16()) }
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
                use crate::kernels::packing::MatrixLayout;
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
        let macros = |source: &'static str| source.split("{% macro ").skip(1).filter_map(|rest| rest.split('(').next());
        each(|entry, defines, _| {
            let hidden: Vec<_> =
                macros(entry.kernel.source).filter(|name| defines.names().any(|given| given == *name)).collect();
            assert!(hidden.is_empty(), "shaders/{}.wgsl: {hidden:?}", entry.kernel.name);
        });
    }

    #[test]
    fn a_list_of_text_constants_has_room_for_every_variant() {
        each(|entry, defines, _| {
            let count = defines.names().count();
            assert!(count <= Defines::ROOM, "{} has {count}", entry.kernel.name);
        });
    }

    #[test]
    fn names_are_those_of_the_shaders_and_of_their_rust_files() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let shaders = std::fs::read_dir(root.join("shaders")).unwrap().filter_map(|file| {
            let path = file.unwrap().path();
            (path.extension()? == "wgsl").then(|| path.file_stem().unwrap().to_str().unwrap().to_owned())
        });
        let registered: BTreeSet<String> = KERNELS.iter().map(|entry| entry.kernel.name.to_owned()).collect();
        assert_eq!(shaders.collect::<BTreeSet<_>>(), registered, "every shader is registered");
        for name in registered {
            assert!(root.join(format!("src/kernels/{name}.rs")).exists(), "src/kernels/{name}.rs");
        }
        for entry in KERNELS {
            // "module::function" in this folder.
            let (module, function) = entry.twin.split_once("::").unwrap();
            let source = std::fs::read_to_string(root.join(format!("src/kernels/{module}.rs"))).unwrap();
            assert!(source.contains(&format!("fn {function}")), "{}: its twin is {}", entry.kernel.name, entry.twin);
        }
    }
}
