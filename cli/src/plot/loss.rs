//! `loss.svg` and `loss.png`: a run's losses over its steps.

use std::ops::Range;
use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::train::metrics::Record;

use super::{COLORS, Drawn, Figure, GRID, TEXT, font};

/// Width and height in pixels.
const SIZE: (u32, u32) = (1000, 600);
const TRAINING: RGBColor = COLORS[0];
const EVALUATION: RGBColor = COLORS[1];
/// Training losses behind their mean. Halfway to white instead of transparent, as pieces of a
/// transparent line would be darker where they meet.
const PALE: RGBColor = RGBColor(128, 185, 217);

/// Losses are smoothed from this many steps on: single steps are then noise around the trend.
const SMOOTH_FROM: usize = 40;

/// Plots the losses of `records` into `folder`, replacing existing files. Omits losses that aren't
/// finite.
///
/// # Errors
/// [`Error::Invalid`] if no record has a loss; [`Error::Io`] if a file cannot be written.
pub(crate) fn write(folder: &Path, records: &[Record]) -> Result<()> {
    let plot = Plot::new(records)?;
    let svg = super::svg(&folder.join("loss.svg"), &plot)?;
    let png = super::png(&folder.join("loss.png"), &plot)?;
    svg.commit()?;
    png.commit()
}

type Points = Vec<(u32, f64)>;

struct Plot {
    training: Points,
    /// Number of steps that a smoothed point averages; 1: no smoothing.
    window: usize,
    smoothed: Points,
    evaluation: Points,
    last_step: u32,
    /// From the lowest loss to the highest, with some margin.
    losses: (f64, f64),
}

impl Plot {
    fn new(records: &[Record]) -> Result<Plot> {
        let finite = |of: fn(&Record) -> Option<f64>| -> Points {
            let point = |record: &Record| Some((record.step, of(record)?)).filter(|(_, loss)| loss.is_finite());
            records.iter().filter_map(point).collect()
        };
        let training = finite(|record| record.loss.map(f64::from));
        let evaluation = finite(|record| record.eval_loss);
        let window = if training.len() < SMOOTH_FROM { 1 } else { (training.len() / 10).min(100) | 1 };
        let all = || training.iter().chain(&evaluation);
        let Some(last_step) = all().map(|&(step, _)| step).max() else {
            return Err(Error::invalid("loss plot", "the number of losses", "0", "a run has one after its first step"));
        };
        let (low, high) = all().fold((f64::MAX, f64::MIN), |(low, high), &(_, loss)| (low.min(loss), high.max(loss)));
        // Leave a margin even if all losses are equal, however large.
        let room = (0.05 * (high - low)).max(1e-3 * high.abs()).max(1e-6);
        Ok(Plot {
            window,
            smoothed: if window > 1 { smooth(&training, window) } else { Points::new() },
            last_step: last_step.max(1),
            losses: (low - room, high + room),
            training,
            evaluation,
        })
    }
}

impl Figure for Plot {
    fn size(&self) -> (u32, u32) {
        SIZE
    }

    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>, scale: u32) -> Drawn<B> {
        let font = |size: u32| font(size * scale);
        let (low, high) = self.losses;
        let (ticks, digits) = ticks(low, high);
        let mut chart = ChartBuilder::on(area)
            .margin(16 * scale)
            .margin_right(32 * scale)
            .caption("Loss", font(26))
            .x_label_area_size(52 * scale)
            .y_label_area_size(76 * scale)
            .build_cartesian_2d(0..self.last_step, LossAxis { range: (low..high).into(), ticks })?;
        chart
            .configure_mesh()
            .x_desc("step")
            .y_desc("loss (nats per token)")
            .x_labels(10)
            .y_labels(10)
            .y_label_formatter(&|loss| format!("{loss:.digits$}"))
            .label_style(font(16))
            .axis_desc_style(font(18))
            .axis_style(TEXT.stroke_width(scale))
            .bold_line_style(GRID.stroke_width(scale))
            .light_line_style(TRANSPARENT)
            .set_all_tick_mark_size(5 * scale as i32)
            .draw()?;

        let sample = move |style: ShapeStyle| {
            move |(x, y): (i32, i32)| PathElement::new([(x, y), (x + 28 * scale as i32, y)], style)
        };
        let smooth = self.window > 1;
        let strong = TRAINING.stroke_width(2 * scale);
        let raw = if smooth { PALE.stroke_width(scale) } else { strong };
        if !self.training.is_empty() {
            // A line with one point would be invisible.
            if self.training.len() == 1 {
                chart.draw_series(dots(&self.training, raw, 4 * scale))?;
            }
            chart.draw_series(line(&self.training, raw, scale))?.label("training").legend(sample(raw));
        }
        if smooth {
            let label = format!("training, mean of {} steps", self.window);
            chart.draw_series(line(&self.smoothed, strong, scale))?.label(label).legend(sample(strong));
        }
        if !self.evaluation.is_empty() {
            let style = EVALUATION.stroke_width(2 * scale).filled();
            chart.draw_series(dots(&self.evaluation, style, 4 * scale))?;
            chart.draw_series(line(&self.evaluation, style, scale))?.label("evaluation").legend(sample(style));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .margin(12 * scale)
            .legend_area_size(40 * scale)
            .label_font(font(16))
            .background_style(WHITE.mix(0.85))
            .border_style(GRID.stroke_width(scale))
            .draw()
    }
}

/// Draws a line through points. For an image, the line is drawn in pieces: plotters draws each
/// sharp corner of a line as a spike, far longer than the line is wide.
fn line(points: &[(u32, f64)], style: ShapeStyle, scale: u32) -> impl Iterator<Item = PathElement<(u32, f64)>> {
    let length = if scale > 1 { 2 } else { points.len().max(1) };
    points.windows(length).map(move |piece| PathElement::new(piece.to_vec(), style))
}

fn dots(points: &[(u32, f64)], style: ShapeStyle, radius: u32) -> impl Iterator<Item = Circle<(u32, f64), u32>> {
    points.iter().map(move |&point| Circle::new(point, radius, style.filled()))
}

/// Moving mean over `window` points (an odd number), fewer at the ends.
fn smooth(points: &Points, window: usize) -> Points {
    let reach = window / 2;
    let mean = |at: usize| {
        let around = &points[at.saturating_sub(reach)..points.len().min(at + reach + 1)];
        (points[at].0, around.iter().map(|&(_, loss)| loss).sum::<f64>() / around.len() as f64)
    };
    (0..points.len()).map(mean).collect()
}

/// An axis with our own ticks.
struct LossAxis {
    range: RangedCoordf64,
    ticks: Vec<f64>,
}

impl Ranged for LossAxis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        self.range.map(value, limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.range()
    }
}

/// Ticks from `low` to `high`, at most ten: multiples of 1, 2 or 5 times a power of ten. Also
/// returns the decimal places they need. plotters' own choice omits some.
fn ticks(low: f64, high: f64) -> (Vec<f64>, usize) {
    let least = (high - low) / 9.0;
    let power = 10f64.powf(least.log10().floor());
    let step =
        [1.0, 2.0, 5.0, 10.0].map(|times| times * power).into_iter().find(|step| *step >= least).unwrap_or(least);
    // Tolerance, because quotients aren't exact.
    let multiples = (low / step - 1e-9).ceil() as i64..=(high / step + 1e-9).floor() as i64;
    let digits = (-(step * 1.001).log10().floor()).clamp(0.0, 8.0) as usize;
    (multiples.map(|multiple| multiple as f64 * step).collect(), digits)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::testing::{count, pixels};
    use super::*;

    /// Records with a falling, noisy loss, evaluated before the first step and every `every`
    /// steps.
    fn records(steps: u32, every: Option<u32>) -> Vec<Record> {
        let loss = |step: u32| 3.5 + 0.5 * (-f64::from(step) / 30.0).exp();
        let record = |step: u32| Record {
            step,
            loss: (step > 0).then(|| (loss(step) + 0.4 * f64::from(step * 7919 % 13) / 13.0 - 0.2) as f32),
            eval_loss: every.filter(|every| step.is_multiple_of(*every)).map(|_| loss(step)),
            ..Record::default()
        };
        (0..=steps).map(record).collect()
    }

    /// Plots, checks both files, and returns the SVG and the PNG's pixels.
    fn drawn(records: &[Record]) -> (String, Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), records).unwrap();
        let (size, pixels) = pixels(&folder.path().join("loss.png"));
        assert_eq!(size, SIZE);
        let svg = fs::read_to_string(folder.path().join("loss.svg")).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        assert!(svg.trim_end().ends_with("</svg>") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        (svg, pixels)
    }

    #[test]
    fn both_series_are_there() {
        let (svg, pixels) = drawn(&records(30, Some(10)));
        for text in ["Loss", "step", "loss (nats per token)", "training", "evaluation", "#0072B2", "#D55E00"] {
            assert!(svg.contains(text), "{text} in {svg}");
        }
        // Four evaluations.
        assert_eq!(svg.matches("<circle").count(), 4);
        assert!(!svg.contains("mean of"));
        assert!(count(&pixels, TRAINING) > 200 && count(&pixels, EVALUATION) > 200);
        assert_eq!(pixels[..3], [255; 3]);
    }

    #[test]
    fn many_steps_are_smoothed_too() {
        let (svg, _) = drawn(&records(200, Some(50)));
        assert!(svg.contains("mean of 21 steps"), "{svg}");
        let (svg, pixels) = drawn(&records(10_000, None));
        assert!(svg.contains("mean of 101 steps") && !svg.contains("evaluation"));
        assert!(count(&pixels, EVALUATION) == 0);
    }

    #[test]
    fn a_line_stays_between_its_points() {
        // With this many steps, the line turns sharply at every pixel. Two evaluations mark where
        // 7 and 0 are.
        let record = |step: u32| Record {
            step,
            loss: Some(3.0 + (step * 7919 % 1013) as f32 / 1013.0),
            eval_loss: [(1, 7.0), (3000, 0.0)].into_iter().find(|(at, _)| *at == step).map(|(_, loss)| loss),
            ..Record::default()
        };
        let (_, pixels) = drawn(&(1..=3000).map(record).collect::<Vec<_>>());
        // Rows that contain a colour, left of the legend.
        let rows = |color: RGBColor| -> Vec<f64> {
            let has = |x: usize, y: usize| pixels[3 * (y * SIZE.0 as usize + x)..][..3] == [color.0, color.1, color.2];
            (0..SIZE.1 as usize).filter(|&y| (0..650).any(|x| has(x, y))).map(|y| y as f64).collect()
        };
        let (evaluation, training) = (rows(EVALUATION), rows(PALE));
        // The dot at 7 has a radius of 4. The axis ends below 0 by 5 % of the range, at -0.35.
        let svg_row = |loss: f64| {
            let (top, bottom) = (evaluation[0] + 4.0, 532.0);
            let low = -0.35;
            top + (7.0 - loss) / (7.0 - low) * (bottom - top)
        };
        assert!(training.len() > 50, "{training:?}");
        assert!(training[0] > svg_row(4.0) - 4.0 && training[training.len() - 1] < svg_row(3.0) + 4.0, "{training:?}");
    }

    #[test]
    fn one_step_or_one_evaluation_is_a_dot() {
        let (svg, pixels) = drawn(&records(1, None));
        assert_eq!(svg.matches("<circle").count(), 1);
        assert!(count(&pixels, TRAINING) > 20);
        let (svg, _) = drawn(&records(1, Some(5))[..1]);
        assert!(svg.contains("evaluation") && !svg.contains("training"), "{svg}");
    }

    #[test]
    fn what_is_not_finite_is_left_out_and_equal_losses_have_an_axis() {
        let record = |step, loss| Record { step, loss: Some(loss), ..Record::default() };
        drawn(&[record(1, 2.0), record(2, f32::NAN), record(3, f32::INFINITY), record(4, 2.0)]);
        drawn(&[record(1, 0.0), record(2, 0.0)]);
        let folder = tempfile::tempdir().unwrap();
        let error = write(folder.path(), &[record(1, f32::NAN)]).unwrap_err().to_string();
        assert!(error.contains("number of losses"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn ticks_are_round_and_all_there() {
        let rounded = |low, high| {
            let (ticks, digits) = ticks(low, high);
            ticks.iter().map(|tick| format!("{tick:.digits$}")).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(rounded(3.88, 4.61), "3.9 4.0 4.1 4.2 4.3 4.4 4.5 4.6");
        assert_eq!(rounded(1.99, 2.01), "1.990 1.995 2.000 2.005 2.010");
        assert_eq!(rounded(-3.0, 40.0), "0 5 10 15 20 25 30 35 40");
        assert_eq!(rounded(0.5, 8.7), "1 2 3 4 5 6 7 8");
    }

    #[test]
    fn smoothing_takes_the_mean_around() {
        let points = [1.0, 2.0, 6.0, 4.0, 5.0].map(|loss| (loss as u32, loss)).to_vec();
        assert_eq!(smooth(&points, 3), [(1, 1.5), (2, 3.0), (6, 4.0), (4, 5.0), (5, 4.5)]);
    }
}
