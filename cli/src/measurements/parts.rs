//! Measures everything about a GPU, in parts that can't disturb each other: each is a process of
//! its own, with a time limit.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use qlora_wgpu::device::{DeviceInfo, Tier};
use qlora_wgpu::error::{Error, Result};
use serde::Serialize;
use serde_json::Value;

use super::report::Machine;

/// Contents of the report file: place, date and the parts in order.
#[derive(Clone, Debug, Serialize)]
pub struct HardwareReport {
    /// Version of this program.
    pub version: &'static str,
    /// Start of the run, for example `2026-01-31T12:00:00Z`.
    pub date: String,
    /// The computer, before the run.
    pub machine: Machine,
    /// The device as listed by `qlora devices --json`.
    pub device: DeviceInfo,
    /// Whether this was a quick run with small sizes.
    pub quick: bool,
    /// The measurements.
    pub parts: Vec<Part>,
}

/// One measurement, or the reason why there is none.
#[derive(Clone, Debug, Serialize)]
pub struct Part {
    /// "copy", "ceilings", "layer", "smollm2-step" or "7b-step".
    pub name: &'static str,
    /// Tier of the kernels, if it matters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tier: Option<String>,
    /// Rows of X, for a layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub m: Option<usize>,
    /// Duration, including preparation and checks.
    pub seconds: f64,
    /// Whether all results agree with the CPU's within rounding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agrees: Option<bool>,
    /// Output of the command: rows of `qlora bench --json`, copy rates, or a program's ceilings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
    /// Why there is no result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Why it was not tried.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
}

/// A part to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its name.
    pub name: &'static str,
    /// Value of `QLORA_TIER`.
    pub tier: Option<String>,
    /// Rows of X, for a layer.
    pub m: Option<usize>,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// The process is killed after this time.
    pub limit: Duration,
}

impl Plan {
    /// Runs the command, and takes the last JSON value that it prints on standard output. Failures
    /// become part of the result.
    pub fn run(&self) -> Part {
        let start = Instant::now();
        let done = self.output();
        let (result, error) = match done {
            Ok(value) => (Some(value), None),
            Err(message) => (None, Some(message)),
        };
        Part {
            name: self.name,
            tier: self.tier.clone(),
            m: self.m,
            seconds: start.elapsed().as_secs_f64(),
            agrees: result.as_ref().and_then(agrees),
            result,
            error,
            skipped: None,
        }
    }

    fn output(&self) -> Result<Value, String> {
        let failed = |error: std::io::Error| error.to_string();
        let folder = tempfile::tempdir().map_err(failed)?;
        let (out, log) = (folder.path().join("out"), folder.path().join("log"));
        let (program, arguments) = self.command.split_first().ok_or("there is no command")?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null());
        command.stdout(fs::File::create(&out).map_err(failed)?).stderr(fs::File::create(&log).map_err(failed)?);
        if let Some(tier) = &self.tier {
            command.env("QLORA_TIER", tier);
        }
        let mut child = command.spawn().map_err(|error| format!("{program} does not start: {error}"))?;
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().map_err(failed)? {
                break status;
            }
            if start.elapsed() > self.limit {
                // Fails if it has ended meanwhile.
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("timed out after {} s", self.limit.as_secs()));
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        if !status.success() {
            let said = String::from_utf8_lossy(&fs::read(&log).map_err(failed)?).into_owned();
            let last = said.trim_end().lines().next_back().unwrap_or_default();
            return Err(format!("{status}: {last}"));
        }
        read_json(&out)
    }
}

/// Reads the JSON value of a file, skipping lines before it.
fn read_json(path: &Path) -> Result<Value, String> {
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    let begins = text.match_indices(['{', '[']).map(|(at, _)| at).filter(|at| *at == 0 || text[..*at].ends_with('\n'));
    let value = begins.filter_map(|at| serde_json::from_str(&text[at..]).ok()).next();
    value.ok_or_else(|| format!("it prints no JSON, but {:.200?}", text.trim()))
}

/// Whether all rows agree with the CPU's results within rounding; `None` if the value isn't rows.
fn agrees(result: &Value) -> Option<bool> {
    let right = |row: &Value| {
        let tier: Option<Tier> = row["tier"].as_str().and_then(|tier| tier.parse().ok());
        let step = row["op"] == "step";
        // A NaN is null in JSON.
        row["max_rel_err_vs_cpu"].as_f64().is_some_and(|error| error <= allowed(tier, step))
    };
    Some(result.as_array()?.iter().all(right))
}

/// Allowed difference from the CPU's results, relative to the largest value: f32 sums in another
/// order, or f16 operands. For a step, it applies to the loss and the gradient norm, each relative
/// to the CPU's.
pub fn allowed(tier: Option<Tier>, step: bool) -> f64 {
    match (tier.is_some_and(Tier::f16), step) {
        (false, false) => 1e-5,
        (false, true) => 1e-4,
        (true, false) => 2e-3,
        (true, true) => 1e-2,
    }
}

impl HardwareReport {
    /// Checks all parts.
    ///
    /// # Errors
    /// [`Error::Device`] that lists the parts that have failed or are wrong.
    pub fn verdict(&self) -> Result<()> {
        let bad = self.parts.iter().filter_map(|part| {
            let what = match (&part.error, part.agrees) {
                (Some(error), _) => error.clone(),
                (None, Some(false)) => "differs from the CPU".into(),
                _ => return None,
            };
            Some(format!("{}: {what}", part.title()))
        });
        let bad: Vec<String> = bad.collect();
        if bad.is_empty() {
            return Ok(());
        }
        Err(Error::Device { device: self.device.name.clone(), op: "bench".into(), message: bad.join("; ") })
    }

    /// Speed of a copy, in 10^9 bytes per second: the better of the two.
    fn copy(&self) -> Option<f64> {
        let result = self.parts.iter().find(|part| part.name == "copy")?.result.as_ref()?;
        let rates = ["buffer_gb_per_s", "kernel_gb_per_s"].map(|name| result[name].as_f64());
        rates.into_iter().flatten().reduce(f64::max)
    }

    /// Speed of the other program's product in bf16 for this many rows, in TFLOP/s.
    fn ceiling(&self, m: usize, op: &str) -> Option<f64> {
        let ceilings = self.parts.iter().find(|part| part.name == "ceilings")?.result.as_ref()?;
        let row = ceilings["bf16"].as_array()?.iter().find(|row| row["m"].as_u64() == Some(m as u64))?;
        row[if op == "forward" { "forward_tflops" } else { "dx_tflops" }].as_f64()
    }

    /// Tables in Markdown, for readers and `docs/performance.md`: passes of a layer by tier and
    /// rows, and steps.
    pub fn markdown(&self) -> String {
        let number =
            |value: Option<f64>, unit: &str| value.map_or("unknown".into(), |value| format!("{value:.0} {unit}"));
        let ceilings = self.parts.iter().find(|part| part.name == "ceilings").and_then(|part| part.result.as_ref());
        let program =
            ceilings.and_then(|ceilings| ceilings["name"].as_str()).map_or(String::new(), |name| format!(", {name}"));
        let date = self.date.get(..10).unwrap_or_default();
        let mut text = format!(
            "{}, {}, qlora {}, {}, {date}; a copy reaches {}{program}:\n",
            self.device.name,
            self.device.driver,
            self.version,
            self.machine.os,
            number(self.copy(), "GB/s"),
        );
        let layers: Vec<&Part> = self.parts.iter().filter(|part| part.name == "layer").collect();
        let mut sizes: Vec<usize> = layers.iter().filter_map(|part| part.m).collect();
        sizes.sort_unstable();
        sizes.dedup();
        let heads: Vec<String> = sizes.iter().map(|m| format!("M = {m}")).collect();
        text += &format!("\n| tier | pass | {} |\n|---|---|{}\n", heads.join(" | "), "---|".repeat(sizes.len()));
        let mut tiers: Vec<&String> = layers.iter().filter_map(|part| part.tier.as_ref()).collect();
        tiers.dedup();
        for tier in tiers {
            for op in ["forward", "backward"] {
                let cell = |m: &usize| {
                    let part = layers.iter().find(|part| part.tier.as_ref() == Some(tier) && part.m == Some(*m));
                    part.map_or("-".into(), |part| self.cell(part, *m, op))
                };
                let cells: Vec<String> = sizes.iter().map(cell).collect();
                text += &format!("| {tier} | {op} | {} |\n", cells.join(" | "));
            }
        }
        text + &self.steps()
    }

    /// The time of a pass, and its share of the upper bound: a copy for few rows, a product in
    /// bf16 for many.
    fn cell(&self, part: &Part, m: usize, op: &str) -> String {
        let rows = part.result.as_ref().and_then(Value::as_array);
        let Some(row) = rows.and_then(|rows| rows.iter().find(|row| row["op"] == op)) else { return "failed".into() };
        let of = |name: &str| row[name].as_f64().unwrap_or(f64::NAN);
        let share = |value: f64, most: Option<f64>, what: &str| {
            most.map_or(String::new(), |most| format!(", {:.0} % of {what}", value / most * 100.0))
        };
        // A backward pass multiplies with W once, like a forward pass.
        let more = if m <= 8 {
            share(of("weight_gb_per_s"), self.copy(), "a copy")
        } else {
            let tflops = of("gflops") / 1e3;
            let rate =
                if tflops < 1.0 { format!("{:.1} GFLOP/s", tflops * 1e3) } else { format!("{tflops:.1} TFLOP/s") };
            format!(", {rate}{}", share(tflops, self.ceiling(m, op), "bf16"))
        };
        let wrong = if part.agrees == Some(false) {
            format!(", WRONG by {:.1e}", of("max_rel_err_vs_cpu"))
        } else {
            String::new()
        };
        format!("{:.3} ms{more}{wrong}", of("ms_median"))
    }

    fn steps(&self) -> String {
        let mut text =
            "\n| step | tier | ms | tokens/s | peak MiB | outside kernels |\n|---|---|---|---|---|---|\n".to_owned();
        for part in self.parts.iter().filter(|part| part.name.ends_with("-step")) {
            let tier = part.tier.as_deref().unwrap_or_default();
            let Some(row) = part.result.as_ref().and_then(|rows| rows.get(0)) else {
                text += &format!("| {} | {tier} | failed | | | |\n", part.name);
                continue;
            };
            let of = |name: &str| row[name].as_f64().unwrap_or(f64::NAN);
            let outside =
                row["profile"]["outside_kernels"].as_f64().map_or("-".into(), |it| format!("{:.0} %", it * 100.0));
            text += &format!(
                "| {} of {} tokens | {tier} | {:.1}{} | {:.0} | {:.0} | {outside} |\n",
                part.name,
                row["tokens"],
                of("ms_median"),
                if part.agrees == Some(false) { ", WRONG" } else { "" },
                of("tokens_per_second"),
                of("peak_bytes") / f64::from(1 << 20),
            );
        }
        text
    }
}

impl Part {
    /// A part that is not tried.
    pub fn skipped(name: &'static str, why: &str) -> Part {
        let skipped = Some(why.to_owned());
        Part { name, tier: None, m: None, seconds: 0.0, agrees: None, result: None, error: None, skipped }
    }

    /// Title, for example "layer of 8 rows, tier f16".
    pub fn title(&self) -> String {
        let rows = self.m.map_or(String::new(), |m| format!(" of {m} rows"));
        let tier = self.tier.as_ref().map_or(String::new(), |tier| format!(", tier {tier}"));
        format!("{}{rows}{tier}", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    fn plan(script: &str, seconds: u64) -> Plan {
        let command = ["sh", "-c", script].map(str::to_owned).to_vec();
        Plan { name: "layer", tier: Some("f16".into()), m: Some(8), command, limit: Duration::from_secs(seconds) }
    }

    #[cfg(unix)]
    #[test]
    fn a_part_has_a_result_or_says_why_not() {
        let rows = r#"[{"op": "forward", "tier": "f16", "max_rel_err_vs_cpu": 1e-3}]"#;
        let part = plan(&format!("echo some words; echo '{rows}'"), 60).run();
        assert_eq!((part.agrees, &part.error), (Some(true), &None), "{part:?}");
        let part = plan(&format!("test $QLORA_TIER = f16 && echo '{rows}' | sed s/1e-3/1e-2/"), 60).run();
        assert_eq!((part.agrees, part.error), (Some(false), None));
        let part = plan(&format!("echo '{rows}' | sed s/1e-3/null/"), 60).run();
        assert_eq!(part.agrees, Some(false), "a NaN doesn't agree");
        for (script, seconds, reason) in [
            ("echo first; echo last >&2; exit 3", 60, "exit status: 3: last"),
            ("sleep 60", 0, "timed out after 0 s"),
            ("echo nothing", 60, "it prints no JSON, but \"nothing\""),
        ] {
            let part = plan(script, seconds).run();
            assert_eq!((part.result, part.error.as_deref()), (None, Some(reason)));
        }
        let none = Plan { command: vec!["/no/such/program".into()], ..plan("", 1) };
        assert!(none.run().error.unwrap().starts_with("/no/such/program does not start"));
    }
}
