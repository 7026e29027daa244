//! The rules, applied to a driver's statistics for a variant and to its listing.
//!
//! Loads are counted in the loop that loads the operands of the hot loop
//! (`Summary::loading_counts`). All must have 16 bytes, except loads of scales. A block of weights
//! takes one of these, three if scales are double-quantized, and the same again with minima. A
//! matrix-vector product has a block of each of its rows per iteration. Tiles stage equal numbers
//! of rows of W and X. There, 32 weights (at least a block) and 32 values of X take 9 loads of 16
//! bytes: one block for 9 loads, two if tiles are not square. `qmatmul_dx_coop` takes words
//! instead of chunks, of two rows of W, so that it can stage pairs, and loads the scales of two
//! blocks.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::gpus::Gpu;
use crate::listing::{Class, Counts, Summary};
use crate::table::{SLACK, Table};
use crate::variants::{number, word};

/// Minimum subgroups that must fit on a unit at once: AMD's SIMDs and NVIDIA's SMs.
const OCCUPANCY: [(&str, &str, f64); 2] =
    [("Subgroups per SIMD", "waves per SIMD", 6.0), ("Max warps/SM", "warps per SM", 12.0)];

/// Drivers' names for spilled registers, or for memory of single threads.
const SPILLS: [&str; 5] = ["Spilled VGPRs", "Spilled SGPRs", "Spills to memory", "Spills", "STP Count"];

/// A compiled variant, or the error.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    pub kernel: String,
    pub tier: String,
    pub label: String,
    pub error: Option<String>,
    pub subgroup: u32,
    pub statistics: BTreeMap<String, f64>,
    /// Set if listings are parsed.
    pub summary: Option<Summary>,
}

/// A broken rule.
pub struct Broken {
    pub rule: &'static str,
    /// Description, with the figure.
    pub found: String,
    /// The figure divided by what is allowed.
    pub excess: f64,
}

/// A measure of a variant, kept in the table.
pub struct Measure {
    pub name: &'static str,
    pub value: f64,
    more_is_better: bool,
}

impl Record {
    fn statistic(&self, names: &[&str]) -> Option<f64> {
        names.iter().find_map(|name| self.statistics.get(*name).copied())
    }

    /// Registers per thread.
    pub fn registers(&self) -> Option<f64> {
        self.statistic(&["VGPRs", "Number of GPRs", "GPRs", "Registers used"])
    }

    /// Subgroups (for Apple's GPUs, threads) that fit on a unit at once.
    pub fn occupancy(&self) -> Option<f64> {
        self.statistic(&["Subgroups per SIMD", "Max warps/SM", "Max Waves Per Core", "Threads"])
    }

    pub fn spills(&self) -> f64 {
        SPILLS.iter().filter_map(|name| self.statistics.get(*name)).sum()
    }

    fn cooperative(&self) -> bool {
        number(&self.label, "edge").is_some()
    }

    fn product(&self) -> bool {
        ["qmatmul", "lora"].iter().any(|start| self.kernel.starts_with(start))
    }

    fn flag(&self, name: &str) -> bool {
        self.label.split(' ').any(|part| part == name)
    }

    /// Rows of W that a thread of a matrix-vector product has at a time.
    fn rows(&self) -> u32 {
        number(&self.label, "rows").unwrap_or(1)
    }

    /// Weights that a thread of a matrix-vector product decodes per iteration of the hot loop:
    /// eight of each row, or the 32 of a 16-byte load if that loop loads them itself.
    fn weights_a_turn(&self, hot: &Counts) -> u32 {
        let loads = hot.loads.contains_key(&16);
        self.rows() * if self.flag("chunked") && loads { 32 } else { 8 }
    }

    /// Key of a measure in the table.
    pub fn key(&self, gpu: &Gpu, measure: &Measure) -> String {
        format!("{} {} {} [{}]", self.kernel, gpu.name, measure.name, self.label)
    }

    /// The measure for its kind of kernel. `ragged` variants have none, because they are for odd
    /// shapes.
    pub fn measure(&self) -> Option<Measure> {
        let counts = self.summary.as_ref().filter(|_| !self.flag("ragged"))?.hot_counts();
        let vector = f64::from(counts.vector());
        if self.cooperative() {
            let matrix = counts.of(Class::Matrix);
            let value = vector / f64::from(matrix);
            return (matrix > 0).then_some(Measure { name: "vector/matrix", value, more_is_better: false });
        }
        if self.kernel.contains("gemv") {
            let value = vector / f64::from(self.weights_a_turn(counts));
            return Some(Measure { name: "vector/weight", value, more_is_better: false });
        }
        if self.kernel.contains("_tile") {
            let value = f64::from(counts.of(Class::Fma)) / (vector + f64::from(counts.memory_accesses()));
            return Some(Measure { name: "FMA-share", value, more_is_better: true });
        }
        None
    }

    /// Returns the number of rules that hold, and the broken ones.
    pub fn judge(&self, gpu: &Gpu, table: &Table) -> (usize, Vec<Broken>) {
        let mut court = Court::default();
        if let Some(error) = &self.error {
            court.rule("compiles", false, f64::INFINITY, || error.clone());
            return (0, court.broken);
        }
        let spills = self.spills();
        court.rule("spills", spills == 0.0, 1.0 + spills, || format!("{spills} spilled"));
        if self.product() || self.kernel.starts_with("attention") {
            for (name, unit, least) in OCCUPANCY {
                if let Some(&value) = self.statistics.get(name) {
                    court.rule("occupancy", value >= least, least / value.max(0.5), || {
                        format!("{value} {unit}, needs {least}")
                    });
                }
            }
        }
        if let Some(summary) = &self.summary {
            self.matrices(&summary.whole, &mut court);
            if self.loads_fit() {
                self.loads(summary.loading_counts(), &mut court);
            }
        }
        if let Some(measure) = self.measure() {
            self.compare(&measure, table.get(&self.key(gpu, &measure)), &mut court);
        }
        (court.right, court.broken)
    }

    /// Whether this is a product with loops whose shapes fit loads of 16 bytes. `ragged` variants
    /// and rows without whole chunks or quads are exempt, and so is Q8_0, which has 8 weights in 8
    /// bytes.
    fn loads_fit(&self) -> bool {
        let gemv = self.kernel.contains("gemv");
        let looped = gemv || self.cooperative() || self.kernel.contains("_tile");
        let fits = match word(&self.label, "kind") {
            Some("quant") => self.flag("chunked"),
            Some("q8_0") => false,
            _ => !self.flag("ragged"),
        };
        self.product() && looped && fits && (gemv || self.flag("quads"))
    }

    fn matrices(&self, whole: &Counts, court: &mut Court) {
        if !self.cooperative() {
            return;
        }
        let matrix = whole.of(Class::Matrix);
        court.rule("matrices", matrix > 0, f64::INFINITY, || "no matrix instruction".into());
        for (name, what, count) in
            [("gathers", "gathers of 16 bits", whole.gathers), ("transposes", "transposes", whole.transposes)]
        {
            let excess = f64::from(count) / f64::from(matrix.max(1));
            court.rule(name, count <= matrix, excess, || format!("{count} {what} for {matrix} matrix instructions"));
        }
    }

    fn loads(&self, counts: &Counts, court: &mut Court) {
        let of = |name| match word(&self.label, name) {
            Some("plain") => 1,
            Some("double") => 3,
            _ => 0,
        };
        let a_block = match word(&self.label, "kind") {
            Some("quant") => of("scales") + of("mins"),
            Some("q8_0") => 1,
            _ => 0,
        };
        let wide = counts.loads.get(&16).copied().unwrap_or(0);
        let narrow: u32 = counts.loads.iter().filter(|(bytes, _)| **bytes < 16).map(|(_, count)| count).sum();
        let (blocks, others) = match self.kernel.as_str() {
            "qmatmul_gemv" => (self.rows(), 0),
            "qmatmul_dx_coop" => (2, 4),
            _ => ((2 * wide).div_ceil(9), 0),
        };
        let allowed = a_block * blocks + others;
        court.rule("loads", narrow <= allowed, f64::from(narrow) / f64::from(allowed.max(1)), || {
            format!("{narrow} loads under 16 bytes beside {wide} of 16, and {allowed} are allowed")
        });
    }

    fn compare(&self, measure: &Measure, known: Option<f64>, court: &mut Court) {
        let &Measure { name, value, more_is_better } = measure;
        let Some(known) = known else {
            return court
                .rule("table", false, 1.0, || format!("{name} {value:.3} is not in the table; --update adds it"));
        };
        let worse = if more_is_better { known / value } else { value / known };
        let same = (value - known).abs() <= SLACK * known;
        let (rule, what) = if worse > 1.0 {
            ("worse", "if there is a good reason, say it in the commit with the table that --update writes")
        } else {
            ("better", "keep it with --update, which writes the table")
        };
        court.rule(rule, same, worse.max(1.0), || format!("{name} {value:.3}, {known} in the table: {what}"));
    }
}

#[derive(Default)]
struct Court {
    right: usize,
    broken: Vec<Broken>,
}

impl Court {
    fn rule(&mut self, rule: &'static str, holds: bool, excess: f64, found: impl FnOnce() -> String) {
        if holds {
            self.right += 1;
        } else {
            self.broken.push(Broken { rule, found: found(), excess });
        }
    }
}
