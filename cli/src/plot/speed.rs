//! Benchmark times as bars: a group per case, a bar per program, on a logarithmic axis.

use std::path::{Path, PathBuf};

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::internal::one_line;

use super::{COLORS, Drawn, Figure, GRID, font};
use crate::measurements::Measured;
use crate::measurements::report::Report;

/// Width in pixels.
const WIDTH: i32 = 1000;
const MARGIN: i32 = 20;
/// Height of a line of text.
const LINE: i32 = 24;
/// Where bars begin, and the room behind the longest one for its text.
const LEFT: i32 = 270;
const RIGHT: i32 = 170;
const BAR: i32 = 22;
/// Gap between cases.
const GAP: i32 = 14;

/// Parses the path of a plot, which must have a supported extension.
pub(crate) fn path(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match path.extension().and_then(|ending| ending.to_str()) {
        Some("svg" | "png") => Ok(path),
        _ => Err("must end in .svg or .png".into()),
    }
}

/// Plots a report's times, replacing an existing file.
///
/// # Errors
/// [`Error::Invalid`] if it has no rows; [`Error::Io`] if the file cannot be written.
pub(crate) fn write(path: &Path, report: &Report) -> Result<()> {
    let bars = Bars::new(report)?;
    match path.extension() {
        Some(ending) if ending == "svg" => super::svg(path, &bars)?.commit(),
        _ => super::png(path, &bars)?.commit(),
    }
}

struct Bars {
    /// Machine, device and date.
    subtitle: String,
    /// Program names, ours first.
    programs: Vec<String>,
    /// Each case's name, and the time of each program in milliseconds.
    cases: Vec<(String, Vec<Option<f64>>)>,
    /// Powers of ten that enclose all times.
    decades: (i32, i32),
}

impl Bars {
    fn new(report: &Report) -> Result<Bars> {
        let Report { version, date, machine, device, driver, rows } = report;
        let Some(first) = rows.first() else {
            return Err(Error::invalid("bench plot", "the number of cases", "0", "there must be at least one"));
        };
        let ours = match first.row.tier.as_str() {
            "" => format!("qlora {version}, CPU device"),
            tier => format!("qlora {version}, {device}, tier {tier}"),
        };
        let peers = first.peers.iter().map(|peer| peer.name.clone());
        let cases: Vec<_> = rows.iter().map(|measured| (measured.row.title(), times(measured))).collect();
        let all = || cases.iter().flat_map(|(_, times)| times.iter().flatten().copied());
        let decades = (all().fold(f64::MAX, f64::min).log10().floor(), all().fold(0.0, f64::max).log10().ceil());
        let day = date.split('T').next().unwrap_or_default();
        Ok(Bars {
            subtitle: format!("{}, {} cores, {}; {driver}; {day}", machine.cpu, machine.cores, machine.os),
            programs: std::iter::once(ours).chain(peers).collect(),
            cases,
            decades: (decades.0 as i32, (decades.1 as i32).max(decades.0 as i32 + 1)),
        })
    }

    /// Top of the first case.
    fn top(&self) -> i32 {
        MARGIN + 2 * LINE + LINE * self.programs.len() as i32 + GAP
    }

    /// Bottom of the last case.
    fn bottom(&self) -> i32 {
        self.top() + self.cases.len() as i32 * (BAR * self.programs.len() as i32 + GAP)
    }

    /// Where a bar for `ms` milliseconds ends.
    fn end(&self, ms: f64) -> i32 {
        let (low, high) = (f64::from(self.decades.0), f64::from(self.decades.1));
        LEFT + (f64::from(WIDTH - RIGHT - LEFT) * (ms.log10() - low) / (high - low)).round() as i32
    }
}

/// Our time, then the peers'.
fn times(Measured { row, peers }: &Measured) -> Vec<Option<f64>> {
    std::iter::once(Some(row.ms_median)).chain(peers.iter().map(|peer| peer.ms_median)).collect()
}

/// Formats a time with three digits.
fn duration(ms: f64) -> String {
    // Rounded first, because rounding may add a digit.
    let ms: f64 = format!("{ms:.2e}").parse().unwrap_or(ms);
    let (value, unit) = if ms >= 1e3 { (ms / 1e3, "s") } else { (ms, "ms") };
    let digits = (2.0 - value.log10().floor()).clamp(0.0, 3.0) as usize;
    format!("{value:.digits$} {unit}")
}

/// Label for a power of ten, in milliseconds.
fn tick(decade: i32) -> String {
    let (decade, unit) = if decade >= 3 { (decade - 3, "s") } else { (decade, "ms") };
    format!("{:.*} {unit}", (-decade).max(0) as usize, 10f64.powi(decade))
}

impl Figure for Bars {
    fn size(&self) -> (u32, u32) {
        (WIDTH as u32, (self.bottom() + LINE + MARGIN) as u32)
    }

    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>, scale: u32) -> Drawn<B> {
        let at = |x: i32, y: i32| (x * scale as i32, y * scale as i32);
        let text = |text: &str, (x, y): (i32, i32), size: u32, side: HPos| {
            let style = font(size * scale).pos(Pos::new(side, VPos::Center));
            area.draw(&Text::new(one_line(text).into_owned(), at(x, y), style))
        };
        let bar = |left: i32, top: i32, right: i32, height: i32, color: RGBColor| {
            area.draw(&Rectangle::new([at(left, top), at(right, top + height)], color.filled()))
        };
        let mut y = MARGIN + LINE / 2;
        text("Time of one run (logarithmic; shorter is better)", (MARGIN, y), 22, HPos::Left)?;
        y += LINE;
        text(&self.subtitle, (MARGIN, y), 14, HPos::Left)?;
        for (program, &color) in self.programs.iter().zip(COLORS.iter().cycle()) {
            y += LINE;
            bar(MARGIN, y - 7, MARGIN + 28, 14, color)?;
            text(program, (MARGIN + 38, y), 15, HPos::Left)?;
        }
        for decade in self.decades.0..=self.decades.1 {
            let ms = 10f64.powi(decade);
            let (x, bottom) = (self.end(ms), self.bottom());
            area.draw(&PathElement::new([at(x, self.top()), at(x, bottom)], GRID.stroke_width(scale)))?;
            text(&tick(decade), (x, bottom + LINE / 2), 14, HPos::Center)?;
        }
        let mut top = self.top() + GAP / 2;
        for (name, times) in &self.cases {
            let height = BAR * self.programs.len() as i32;
            text(name, (LEFT - 10, top + height / 2), 15, HPos::Right)?;
            for (i, (time, &color)) in times.iter().zip(COLORS.iter().cycle()).enumerate() {
                let top = top + BAR * i as i32;
                let Some(ms) = *time else {
                    text("not compared", (LEFT + 8, top + BAR / 2), 14, HPos::Left)?;
                    continue;
                };
                // A bar that ends at the axis would be invisible.
                let right = self.end(ms).max(LEFT + 2);
                bar(LEFT, top + 1, right, BAR - 2, color)?;
                let ratio = match times[0] {
                    Some(ours) if i > 0 => format!(", {:.2} times ours", ms / ours),
                    _ => String::new(),
                };
                text(&format!("{}{ratio}", duration(ms)), (right + 6, top + BAR / 2), 14, HPos::Left)?;
            }
            top += height + GAP;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{count, pixels};
    use super::*;
    use crate::measurements::peer::PeerTime;
    use crate::measurements::report::Machine;
    use qlora_wgpu::device::Device;
    use qlora_wgpu::internal::bench::Row;
    use qlora_wgpu::internal::bench::layer::{Case, Op, measure};
    use qlora_wgpu::quant::QuantOptions;

    /// Two cases of 4 and 40 ms. A peer takes ten times as long for the first one.
    fn report() -> Report {
        let row = |m: usize| {
            let case = Case { op: Op::Forward, m, n: 32, k: 64, rank: 0, quant: QuantOptions::nf4() };
            let row = measure(&case.operands().unwrap(), &Device::cpu(), false).unwrap();
            let ms_median = 4.0 * m as f64;
            let name = "a peer 1.0".to_owned();
            let skipped = (m > 1).then(|| "too large".to_owned());
            let time = (m == 1).then_some(10.0 * ms_median);
            let peer = PeerTime { name, ms_min: time, ms_median: time, ratio: time.map(|_| 10.0), skipped };
            Measured { row: Row { ms_median, ..row }, peers: vec![peer] }
        };
        Report::new(Machine::this(), &Device::cpu(), vec![row(1), row(10)])
    }

    #[test]
    fn every_case_has_a_bar_of_each_program() {
        let folder = tempfile::tempdir().unwrap();
        let report = report();
        let plot = folder.path().join("speed.svg");
        write(&plot, &report).unwrap();
        let svg = std::fs::read_to_string(&plot).unwrap();
        let texts = [
            "shorter is better",
            "CPU device",
            "a peer 1.0",
            "forward, M = 1, 32 x 64",
            "forward, M = 10, 32 x 64",
            "4.00 ms",
            "40.0 ms, 10.00 times ours",
            "not compared",
            &report.date[..10],
        ];
        for text in texts {
            assert!(svg.contains(text), "{text} in {svg}");
        }
        // The legend's colours, and bars: 4 and 40 ms for us, 40 ms for the peer.
        assert_eq!((svg.matches("#0072B2").count(), svg.matches("#D55E00").count()), (3, 2));

        let plot = folder.path().join("speed.png");
        write(&plot, &report).unwrap();
        let ((width, height), pixels) = pixels(&plot);
        assert_eq!((width, height), Bars::new(&report).unwrap().size());
        // All decades have the same width, so the peer's bar for 40 ms is as long as ours.
        let [ours, theirs] = [COLORS[0], COLORS[1]].map(|color| count(&pixels, color));
        assert!(theirs > 5000 && ours > theirs + 2000, "{ours} {theirs}");
    }

    #[test]
    fn a_plot_needs_rows_and_an_ending() {
        let error = Bars::new(&Report { rows: Vec::new(), ..report() }).err().unwrap().to_string();
        assert!(error.contains("number of cases"), "{error}");
        assert!(path("a.png").is_ok() && path("b.svg").is_ok());
        assert!(path("a.jpg").is_err() && path("png").is_err());
    }

    #[test]
    fn times_have_three_digits() {
        let texts = [0.00123, 0.0456, 1.234, 9.996, 45.67, 395.0, 999.4, 999.6, 15_420.0].map(duration);
        assert_eq!(
            texts,
            ["0.001 ms", "0.046 ms", "1.23 ms", "10.0 ms", "45.7 ms", "395 ms", "999 ms", "1.00 s", "15.4 s"]
        );
        assert_eq!([-2, 0, 2, 3, 4].map(tick), ["0.01 ms", "1 ms", "100 ms", "1 s", "10 s"]);
    }
}
