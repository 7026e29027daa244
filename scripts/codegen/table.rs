//! Recorded figures of kernels: a sorted JSON object with one entry per line, in `table.json`
//! beside this file.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::PathBuf;

/// Allowed relative difference from the table's figure.
pub const SLACK: f64 = 0.1;

pub struct Table {
    path: PathBuf,
    /// Figures by GPU, kernel, variant and measure.
    figures: BTreeMap<String, f64>,
}

impl Table {
    pub fn load() -> Result<Table, Box<dyn Error>> {
        let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/codegen/table.json"));
        let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let figures = serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Table { path, figures })
    }

    pub fn get(&self, key: &str) -> Option<f64> {
        self.figures.get(key).copied()
    }

    /// Returns the keys that are not among these, and for which `meant` holds.
    pub fn others<'a>(
        &'a self,
        found: &'a BTreeMap<String, f64>,
        meant: impl Fn(&str) -> bool + 'a,
    ) -> impl Iterator<Item = &'a String> {
        self.figures.keys().filter(move |key| !found.contains_key(*key) && meant(key))
    }

    /// Replaces the figures for which `meant` holds by these, and writes the file.
    pub fn update(
        &mut self,
        found: &BTreeMap<String, f64>,
        meant: impl Fn(&str) -> bool,
    ) -> Result<(), Box<dyn Error>> {
        self.figures.retain(|key, _| !meant(key));
        self.figures.extend(found.iter().map(|(key, value)| (key.clone(), (value * 1e3).round() / 1e3)));
        let line = |(key, value): (&String, &f64)| Ok(format!("  {}: {value}", serde_json::to_string(key)?));
        let lines = self.figures.iter().map(line).collect::<Result<Vec<_>, serde_json::Error>>()?;
        Ok(fs::write(&self.path, format!("{{\n{}\n}}\n", lines.join(",\n")))?)
    }
}
