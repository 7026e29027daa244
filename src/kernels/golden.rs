//! Golden shaders: the composed text of some variants, so that a change of a snippet shows in
//! review as the shaders that run. `QLORA_UPDATE_SHADERS=1 cargo test --lib golden_shaders` writes
//! them.

use std::fs;
use std::path::PathBuf;

use crate::device::Tier;
use crate::kernels::registry::{compose, kernels};

/// A kernel, a name for one of its variants, and the variant's label. Together they show every
/// family and every kind of tier.
const VARIANTS: &[(&str, &str, &str)] = &[
    ("adamw", "quads", "threads=64"),
    ("attention", "plain", "rows=16 parts=4 quads=16 tile=4"),
    ("attention_coop", "staged", "edge=16 lanes=32 vectors head_dim=64 wide=64 strips=4 staged slice=64 kept=2 held=0"),
    ("attention_dkv_coop", "buffers", "edge=16 lanes=32 vectors head_dim=8 wide=16 strips=4"),
    ("attention_dkv_lanes", "share", "rows=4 head_dim=8 share"),
    ("attention_dkv_tile", "tall2", "tall=2 head_quads=32"),
    ("attention_pack", "backward", "wide=48 backward f16"),
    ("cross_entropy", "ragged", "threads=256 team=256 group_rows=1 ragged"),
    ("lora_coop", "dropout", "edge=16 lanes=32 vectors wide quads large=right dropout"),
    ("lora_dh", "share", "software share tokens=1 ranks=8 threads=8 parts=1"),
    ("lora_down", "subgroups", "dropout subgroups tokens=2 ranks=1 threads=256 parts=2"),
    (
        "qmatmul_coop",
        "double",
        "kind=quant decoder=select scales=plain mins=none wide chunked edge=16 lanes=32 vectors tile_rows=64 tile_columns=64 subgroups=4 double quads rank_quads",
    ),
    (
        "qmatmul_dx_lanes",
        "share",
        "kind=quant decoder=offset scales=double mins=double threads=8 tokens=2 words=2 share scale_sets=2 dropout",
    ),
    (
        "qmatmul_dx_tile",
        "f16",
        "kind=quant decoder=offset scales=double mins=double wide chunked f16 side=64 quads rank_quads dropout",
    ),
    (
        "qmatmul_gemv",
        "double_quantized",
        "kind=quant decoder=select scales=double mins=none wide chunked tokens=1 lanes=64 threads=128 rows=4",
    ),
    ("qmatmul_tile", "64", "kind=quant decoder=select scales=plain mins=none wide chunked side=64 quads rank_quads"),
    ("rms_norm", "tree", "threads=64 team=32 group_rows=4"),
    ("rope_append", "halves", "threads=64"),
    ("sample", "greedy", "threads=256 greedy"),
];

#[test]
fn golden_shaders() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/shaders");
    let update = std::env::var_os("QLORA_UPDATE_SHADERS").is_some_and(|value| value == "1");
    for (name, short, label) in VARIANTS {
        let kernel = kernels().into_iter().find(|kernel| kernel.name == *name);
        let kernel = kernel.unwrap_or_else(|| panic!("no kernel {name}"));
        let found = Tier::ALL.into_iter().flat_map(kernel.variants).find(|variant| variant.label() == *label);
        let variant = found.unwrap_or_else(|| panic!("{name} has no variant {label}"));
        let text = format!("// {name}: {label}\n\n{}", compose(kernel, &variant, true).unwrap());
        let path = folder.join(format!("{name}.{short}.wgsl"));
        if update {
            fs::create_dir_all(&folder).unwrap();
            fs::write(&path, &text).unwrap();
            continue;
        }
        let golden = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let line = golden.lines().zip(text.lines()).position(|(golden, now)| golden != now);
        let line = line.unwrap_or_else(|| golden.lines().count().min(text.lines().count())) + 1;
        assert!(golden == text, "{} differs from line {line} on; see src/kernels/golden.rs", path.display());
    }
    assert_eq!(fs::read_dir(&folder).unwrap().count(), VARIANTS.len(), "files in {}", folder.display());
}
