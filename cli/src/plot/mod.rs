//! Plots as SVG and PNG: losses of a run, times of a benchmark.

pub(super) mod loss;
pub(super) mod speed;

use std::io::Write;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::internal::StagedFile;

/// Oversampling factor of the PNG, for smooth lines.
const OVERSAMPLING: u32 = 3;

/// Okabe and Ito's palette, whose colours differ for people with any colour vision; one colour for
/// text, one for lines in the background.
const COLORS: [RGBColor; 5] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(230, 159, 0),
    RGBColor(204, 121, 167),
];
const TEXT: RGBColor = RGBColor(51, 51, 51);
const GRID: RGBColor = RGBColor(224, 224, 224);

/// Font for the PNG. An SVG only names a family, and its viewer provides it.
static FONT: &[u8] = include_bytes!("../../assets/DejaVuSans-ascii.ttf");
const FAMILY: &str = "sans-serif";

type Drawn<B> = std::result::Result<(), DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

/// A figure that can be drawn in both formats.
trait Figure {
    /// Width and height in pixels.
    fn size(&self) -> (u32, u32);

    /// Draws on a white area, scaled by `scale`.
    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>, scale: u32) -> Drawn<B>;
}

/// Text style with this size in pixels.
fn font(size: u32) -> TextStyle<'static> {
    (FAMILY, size).into_font().color(&TEXT)
}

fn draw<B: DrawingBackend>(figure: &impl Figure, backend: B, scale: u32) -> std::result::Result<(), String> {
    // Registration fails only for an invalid font.
    let _ = register_font(FAMILY, FontStyle::Normal, FONT);
    let area = backend.into_drawing_area();
    let drawn = area.fill(&WHITE).and_then(|()| figure.draw(&area, scale)).and_then(|()| area.present());
    drawn.map_err(|error| error.to_string())
}

/// Draws the figure as an SVG file that `commit` moves into place.
fn svg(path: &Path, figure: &impl Figure) -> Result<StagedFile> {
    let mut text = String::new();
    draw(figure, SVGBackend::with_string(&mut text, figure.size()), 1)
        .map_err(|message| Error::File { path: path.into(), message })?;
    StagedFile::new(path, |out| out.write_all(text.as_bytes()).map_err(|e| Error::io(path, e)))
}

/// Draws the figure as a PNG file that `commit` moves into place.
fn png(path: &Path, figure: &impl Figure) -> Result<StagedFile> {
    let (width, height) = (figure.size().0 * OVERSAMPLING, figure.size().1 * OVERSAMPLING);
    let mut large = vec![0; (3 * width * height) as usize];
    draw(figure, BitMapBackend::with_buffer(&mut large, (width, height)), OVERSAMPLING)
        .map_err(|message| Error::File { path: path.into(), message })?;
    let pixels = scale_down(&large, figure.size(), OVERSAMPLING as usize);
    StagedFile::new(path, |out| encode(out, figure.size(), &pixels).map_err(|e| Error::io(path, e)))
}

/// Scales an image down to `size`: each pixel is the mean of `by` x `by` pixels. RGB, rows from
/// the top.
fn scale_down(large: &[u8], (width, height): (u32, u32), by: usize) -> Vec<u8> {
    let (width, height) = (width as usize, height as usize);
    let mut small = Vec::with_capacity(3 * width * height);
    for y in 0..height {
        for x in 0..width {
            for channel in 0..3 {
                let at = |dy: usize, dx: usize| large[3 * ((y * by + dy) * width * by + x * by + dx) + channel];
                let sum: usize = (0..by * by).map(|i| usize::from(at(i / by, i % by))).sum();
                small.push((sum / (by * by)) as u8);
            }
        }
    }
    small
}

fn encode(
    out: impl Write,
    (width, height): (u32, u32),
    pixels: &[u8],
) -> std::result::Result<(), ::png::EncodingError> {
    let mut encoder = ::png::Encoder::new(out, width, height);
    encoder.set_color(::png::ColorType::Rgb);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()
}

#[cfg(test)]
mod testing {
    use std::fs::File;
    use std::io::BufReader;
    use std::path::Path;

    use plotters::style::RGBColor;

    /// Reads a PNG's size and pixels.
    pub fn pixels(path: &Path) -> ((u32, u32), Vec<u8>) {
        let mut reader = ::png::Decoder::new(BufReader::new(File::open(path).unwrap())).read_info().unwrap();
        let size = (reader.info().width, reader.info().height);
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        (size, pixels)
    }

    /// Number of pixels with exactly this colour.
    pub fn count(pixels: &[u8], color: RGBColor) -> usize {
        pixels.chunks_exact(3).filter(|pixel| **pixel == [color.0, color.1, color.2]).count()
    }
}
