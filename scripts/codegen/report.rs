//! Prints the results.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::Run;
use crate::listing::Counts;
use crate::rules::{Broken, Record};
use crate::table::Table;

/// Prints broken rules, worst first, and the number that hold. Returns whether all hold.
pub fn verdict<'a>(
    runs: &[Run],
    table: &Table,
    left_over: impl Iterator<Item = &'a String>,
    all: bool,
    elapsed: Duration,
) -> bool {
    let (mut right, mut broken) = (0, 0);
    // Faults by rule, GPU and kernel.
    let mut groups = BTreeMap::new();
    for run in runs {
        for record in &run.records {
            let (holding, failing) = record.judge(run.gpu, table);
            (right, broken) = (right + holding, broken + failing.len());
            for fault in failing {
                let key = (fault.rule, run.gpu.name, record.kernel.as_str());
                groups.entry(key).or_insert_with(Vec::<(&Record, Broken)>::new).push((record, fault));
            }
        }
    }
    let mut lines = Vec::new();
    for ((rule, gpu, kernel), mut faults) in groups {
        faults.sort_by(|(_, a), (_, b)| b.excess.total_cmp(&a.excess));
        let shown = if all { faults.len() } else { 1 };
        for (record, fault) in &faults[..shown] {
            let more = match faults.len() - shown {
                0 => String::new(),
                more => format!(" (and {more} more of its variants)"),
            };
            let line = format!("{rule:10} {gpu:8} {kernel} [{}]: {}{more}", record.label, fault.found);
            lines.push((fault.excess, line));
        }
    }
    lines.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    lines.iter().for_each(|(_, line)| println!("{line}"));
    let mut stale = 0;
    for key in left_over {
        println!("table      {key}: no variant has this measure any more; --update removes it");
        stale += 1;
    }
    for run in runs {
        println!("{:8} {}: {} variants", run.gpu.name, run.name, run.records.len());
    }
    println!("{right} rules hold, {} broken; {} s", broken + stale, elapsed.as_secs());
    broken + stale == 0
}

/// Prints a Markdown table with a line per kernel and GPU, without `ragged` variants: the most
/// registers, the fewest subgroups, and the range of the measure.
pub fn families(runs: &[Run]) {
    println!("| kernel | GPU | variants | registers | subgroups | spills | measure |\n|---|---|---|---|---|---|---|");
    let mut lines = BTreeMap::new();
    for run in runs {
        for record in run.records.iter().filter(|record| record.error.is_none()) {
            lines.entry((record.kernel.as_str(), run.gpu.name)).or_insert_with(Vec::new).push(record);
        }
    }
    for ((kernel, gpu), records) in lines {
        let whole = |values: &mut dyn Iterator<Item = f64>, pick: fn(f64, f64) -> f64| {
            values.reduce(pick).map_or("-".into(), |value| value.to_string())
        };
        let registers = whole(&mut records.iter().filter_map(|record| record.registers()), f64::max);
        let subgroups = whole(&mut records.iter().filter_map(|record| record.occupancy()), f64::min);
        let spills: f64 = records.iter().map(|record| record.spills()).sum();
        let measures: Vec<_> = records.iter().filter_map(|record| record.measure()).collect();
        let least = measures.iter().map(|measure| measure.value).fold(f64::INFINITY, f64::min);
        let most = measures.iter().map(|measure| measure.value).fold(0.0, f64::max);
        let measure = measures.first().map_or("".into(), |it| format!("{} {least:.2} to {most:.2}", it.name));
        println!("| {kernel} | {gpu} | {} | {registers} | {subgroups} | {spills} | {measure} |", records.len());
    }
    println!();
}

/// Prints statistics and loops of every variant.
pub fn show(runs: &[Run]) {
    for run in runs {
        for record in &run.records {
            println!("=== {} {} [{}], tier {}", run.gpu.name, record.kernel, record.label, record.tier);
            if let Some(error) = &record.error {
                println!("    {error}");
                continue;
            }
            let measure = record.measure().map_or(String::new(), |it| format!("{} {:.3}; ", it.name, it.value));
            let wanted =
                record.statistics.iter().filter(|(name, _)| !["Hash", "Combined"].iter().any(|it| name.contains(it)));
            let statistics: Vec<_> = wanted.map(|(name, value)| format!("{name} {value}")).collect();
            println!("    {measure}subgroup {}; {}", record.subgroup, statistics.join(", "));
            let Some(summary) = &record.summary else { continue };
            println!("    whole: {}", mix(&summary.whole));
            for (at, it) in summary.loops.iter().enumerate() {
                let hot = if summary.is_hot(at) { " (hot)" } else { "" };
                let around = it.around.map_or(String::new(), |around| format!(" in {}", summary.loops[around].head));
                println!("    loop {}{around}, {} blocks{hot}: {}", it.head, it.blocks, mix(&it.counts));
                let memory: Vec<_> = it.counts.memory.iter().map(|(name, count)| format!("{name} {count}")).collect();
                if !memory.is_empty() {
                    println!("        {}", memory.join(", "));
                }
            }
        }
    }
}

/// "fma 64, select 120, global_load 4".
fn mix(counts: &Counts) -> String {
    let mut classes: Vec<_> = counts.classes.iter().collect();
    classes.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let name =
        |class| serde_json::to_value(class).ok().and_then(|name| Some(name.as_str()?.to_owned())).unwrap_or_default();
    let classes: Vec<_> = classes.into_iter().map(|(class, count)| format!("{} {count}", name(class))).collect();
    classes.join(", ")
}
