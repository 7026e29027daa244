//! Tolerances: the largest allowed differences from a reference. Tests take their bounds from here,
//! and the tables of docs/accuracy.md are written from here:
//! `QLORA_UPDATE_DOCS=1 cargo test --lib docs_accuracy`.

use qlora_wgpu::Device;

use super::devices::is_f16;

/// A bound: `relative` times what `text` says, and perhaps `absolute` more.
#[derive(Clone, Copy, PartialEq)]
pub struct Bound {
    pub relative: f64,
    pub absolute: f64,
    /// Its text in docs/accuracy.md, with `{}` for `relative` and `{+}` for `absolute`.
    text: &'static str,
}

const fn bound(relative: f64, text: &'static str) -> Bound {
    Bound { relative, absolute: 0.0, text }
}

impl Bound {
    const fn plus(self, absolute: f64) -> Bound {
        Bound { absolute, ..self }
    }

    /// The bound of each value, given its terms or its size. A little more lets subnormals be
    /// flushed.
    pub fn bounds(&self, terms: &[f64]) -> Vec<f64> {
        terms.iter().map(|terms| self.relative * terms.abs() + self.absolute + 1e-30).collect()
    }

    fn shown(&self) -> String {
        let number = |value: f64| if value < 0.1 { format!("{value:e}") } else { value.to_string() };
        self.text.replace("{}", &number(self.relative)).replace("{+}", &number(self.absolute))
    }
}

/// A row of docs/accuracy.md.
pub struct Tolerance {
    what: &'static str,
    /// The reference, in the tables that name it.
    with: &'static str,
    /// On the CPU device, and in the tiers without f16.
    pub f32: Bound,
    /// In the tiers with f16 operands.
    pub f16: Bound,
    /// The file of the tests.
    pub test: &'static str,
}

impl Tolerance {
    const fn against(self, with: &'static str) -> Tolerance {
        Tolerance { with, ..self }
    }

    /// The bound in f32 or with f16 operands.
    pub fn of(&self, f16: bool) -> Bound {
        if f16 { self.f16 } else { self.f32 }
    }

    /// The relative bound on a device.
    pub fn on(&self, device: &Device) -> f64 {
        self.of(is_f16(device)).relative
    }

    /// The cells of the row.
    pub fn row(&self) -> String {
        let f16 = if self.f16 == self.f32 { "the same".into() } else { self.f16.shown() };
        let with = if self.with.is_empty() { String::new() } else { format!(" {} |", self.with) };
        format!("| {} |{with} {} | {f16} | `{}` |", self.what, self.f32.shown(), self.test)
    }
}

const fn one(what: &'static str, bound: Bound, test: &'static str) -> Tolerance {
    two(what, bound, bound, test)
}

const fn two(what: &'static str, f32: Bound, f16: Bound, test: &'static str) -> Tolerance {
    Tolerance { what, with: "", f32, f16, test }
}

/// Defines the tolerances of a table and the table itself.
macro_rules! table {
    ($table:ident: $($name:ident = $tolerance:expr;)*) => {
        $(pub const $name: Tolerance = $tolerance;)*
        pub static $table: &[Tolerance] = &[$($name),*];
    };
}

/// The bound of a kernel without a row of its own.
pub const TERMS: Bound = bound(1e-5, "{} of the terms");
const VALUE: Bound = bound(1e-5, "{} of the value or its terms");

table! { KERNELS:
    QMATMUL = two(
        "`qmatmul`: the fused product",
        TERMS,
        bound(2e-3, "plus {} of ‖x‖‖w‖, for more than 8 rows"),
        "src/kernels/qmatmul/mod.rs",
    );
    QMATMUL_DX = two(
        "`qmatmul_dx`: its input gradient",
        TERMS,
        bound(2e-3, "plus {} of ‖dy‖‖w‖"),
        "src/kernels/qmatmul/dx/mod.rs",
    );
    LORA = two(
        "`lora_down`, `lora_dh`, `lora_dw`",
        TERMS,
        bound(2e-3, "{} of the terms, with cooperative matrices"),
        "src/kernels/lora/coop.rs",
    );
    ATTENTION = two(
        "attention",
        TERMS,
        bound(1.1e-3, "{} of the terms, with cooperative matrices"),
        "src/kernels/attention/mod.rs",
    );
    ATTENTION_GRADIENTS = two(
        "attention's gradients",
        TERMS,
        bound(3e-3, "{} of the terms, plus {+} of the largest, with cooperative matrices").plus(1e-8),
        "src/kernels/attention/backward/mod.rs",
    );
    CROSS_ENTROPY = one(
        "cross-entropy: loss",
        bound(1e-5, "{} of the terms, plus {+}").plus(1e-6),
        "src/kernels/loss/cross_entropy.rs",
    );
    SCALE_COLUMNS = one(
        "`scale_columns`",
        bound(1e-6, "{} of the terms"),
        "src/kernels/elementwise/scale_columns.rs",
    );
    COLUMN_SUMS = one("`column_sum`, `dora_norm`", bound(2e-6, "{} of the terms"), "src/kernels/rows/column_sum.rs");
    SUM = one("`sum`", bound(1e-7, "{} of the terms"), "src/kernels/rows/sum.rs");
    EMBEDDING = one("`embedding`", bound(2.5e-7, "{} of the largest value"), "src/kernels/rows/embedding.rs");
    ROWS = one("`rms_norm`, `silu_mul` and their gradients", VALUE, "src/kernels/rows/rms_norm.rs");
    ROPE = one("`rope`", bound(1e-6, "{}"), "src/kernels/elementwise/rope.rs");
    ADAMW = one("`adamw`: parameter", bound(2e-6, "{}"), "src/kernels/optim/adamw.rs");
    GRAD_NORM = one("`grad_norm`", bound(1e-6, "{} of the value"), "src/kernels/optim/grad_norm.rs");
    MERGE = one("`dequantize`, with an adapter added", TERMS, "src/kernels/matrix/dequantize.rs");
    GGUF_BLOCKS = one(
        "GGUF blocks on a device",
        bound(2.0, "{} f32 epsilons of the largest value"),
        "src/formats/gguf/blocks.rs",
    );
}

table! { MODELS:
    LAYER = two(
        "an adapted layer: output and all gradients",
        bound(2e-6, "{} of the largest value"),
        bound(2e-3, "{} of the largest value"),
        "tests/layers/backward.rs",
    ).against("finite differences in f64");
    SEED_LAYER = one(
        "an int4 layer, forward, one row",
        bound(3e-6, "{} of the largest value"),
        "tests/layers/seed_parity.rs",
    ).against("recorded outputs of entrenar 0.7.13");
    LOGITS = two(
        "logits of Llama, Qwen2 and Qwen3, dense and 4-bit; with LoRA, rsLoRA, DoRA and patterns",
        bound(2e-5, "{}"),
        bound(1e-2, "{}"),
        "tests/model/golden.rs",
    ).against("transformers, PEFT");
    SMOLLM2_LOGITS = two(
        "logits of SmolLM2-135M from its Q4_1 file",
        bound(5e-4, "{}"),
        bound(0.2, "{}"),
        "tests/model/smollm2.rs",
    ).against("transformers");
    SMOLLM2_LOSS = two(
        "mean loss of SmolLM2-135M",
        bound(1e-4, "{}"),
        bound(1e-2, "{}"),
        "tests/model/smollm2.rs",
    ).against("transformers");
    MERGED = one("merged weights", bound(1e-6, "{}"), "tests/model/export.rs").against("PEFT");
}

table! { TRAINING:
    LOSS = two(
        "loss and gradient norm of each step",
        bound(1e-5, "{}, relative"),
        bound(5e-3, "{}, relative"),
        "tests/train/golden.rs",
    );
    FIRST_GRADIENTS = two(
        "each gradient tensor of the first step",
        bound(1e-5, "{} of its norm"),
        bound(1e-2, "{} of its norm"),
        "tests/train/golden.rs",
    );
    FINAL_ADAPTER = two(
        "each tensor of the final adapter",
        bound(1e-4, "{} of its norm"),
        bound(5e-2, "{} of its norm"),
        "tests/train/golden.rs",
    );
    LEARNING_RATE = one("learning rate", bound(1e-7, "{}, relative"), "tests/train/golden.rs");
    SMOLLM2_TRAINING = two(
        "SmolLM2-135M: loss and gradient norm over six steps (two on a GPU)",
        bound(1e-4, "{}, relative"),
        bound(1e-2, "{}, relative"),
        "tests/model/smollm2.rs",
    );
}
