//! Pictures of rasters: PNG with title, colour bar, scale bar, coordinates, and sites on top.
//!
//! Colours: viridis and magma (van der Walt & Smith 2015, perceptually uniform) and the diverging
//! blue-red of ColorBrewer (Harrower & Brewer 2003), each from a few control points.

use std::{path::Path, sync::Once};

use ndarray::{Array2, Axis};
use plotters::{
    backend::BitMapBackend,
    prelude::{DrawingBackend, FontStyle, IntoFont, RGBColor, TextStyle},
    style::{
        register_font,
        text_anchor::{HPos, VPos},
    },
};

use crate::{
    error::{Error, Result},
    geo::{crs::Crs, grid::Grid},
};

pub mod curves;
pub mod panels;
pub mod series;

/// Width and height of the map itself, pixels, at most.
const LARGEST: [f64; 2] = [900.0, 780.0];
/// Room around the map, pixels: left, top, right, bottom.
const MARGIN: [usize; 4] = [84, 92, 132, 92];

type Rgb = [u8; 3];
const WHITE: Rgb = [255, 255, 255];
const INK: Rgb = [38, 38, 44];
const GREY: Rgb = [120, 120, 128];
const NO_DATA: Rgb = [229, 229, 231];
const COAST: Rgb = [150, 150, 156];

/// How values become colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Palette {
    /// Viridis: levels.
    Level,
    /// Magma: spreads, dark where sure.
    Spread,
    /// Blue to red through white at the middle: probabilities around one half.
    Diverging,
}

const VIRIDIS: &[u32] =
    &[0x440154, 0x472d7b, 0x3b528b, 0x2c728e, 0x21918c, 0x28ae80, 0x5ec962, 0xaddc30, 0xfde725];
const MAGMA: &[u32] =
    &[0x000004, 0x1c1044, 0x4f127b, 0x812581, 0xb5367a, 0xe55964, 0xfb8761, 0xfec287, 0xfcfdbf];
const BLUE_RED: &[u32] = &[
    0x053061, 0x2166ac, 0x4393c3, 0x92c5de, 0xd1e5f0, 0xf7f7f7, 0xfddbc7, 0xf4a582, 0xd6604d,
    0xb2182b, 0x67001f,
];

impl Palette {
    /// The colour at `t` in [0, 1]; clamped outside.
    ///
    /// ```
    /// use isopleth::picture::Palette;
    /// assert_eq!(Palette::Level.colour(0.0), [0x44, 0x01, 0x54]);
    /// assert_eq!(Palette::Level.colour(7.0), [0xfd, 0xe7, 0x25]);
    /// assert_eq!(Palette::Diverging.colour(0.5), [0xf7, 0xf7, 0xf7]);
    /// ```
    pub fn colour(self, t: f64) -> [u8; 3] {
        let stops = match self {
            Palette::Level => VIRIDIS,
            Palette::Spread => MAGMA,
            Palette::Diverging => BLUE_RED,
        };
        let place = t.clamp(0.0, 1.0) * (stops.len() - 1) as f64;
        let below = (place as usize).min(stops.len() - 2);
        let [a, b] = [stops[below], stops[below + 1]].map(|c| [c >> 16, c >> 8 & 255, c & 255]);
        std::array::from_fn(|i| {
            let (a, b) = (f64::from(a[i]), f64::from(b[i]));
            (a + (b - a) * (place - below as f64)).round() as u8
        })
    }
}

/// A survey site on a picture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mark {
    /// Place across the map, 0 = left edge, 1 = right edge.
    pub x: f64,
    /// Place down the map, 0 = top edge, 1 = bottom edge.
    pub y: f64,
    /// What was observed, for its colour; a hollow circle without.
    pub value: Option<f64>,
}

/// A raster with all that is drawn around it.
#[derive(Debug, Clone, PartialEq)]
pub struct Picture {
    /// First line.
    pub title: String,
    /// Second line, small.
    pub subtitle: String,
    /// `[row, column]` from the top left; NaN without data.
    pub values: Array2<f64>,
    /// Height over width of the whole raster, on the ground.
    pub aspect: f64,
    /// Colours.
    pub palette: Palette,
    /// Values at the ends of the colour bar; taken from the raster if `None`.
    pub range: Option<[f64; 2]>,
    /// Metres from the left edge to the right one, for a scale bar.
    pub metres_across: Option<f64>,
    /// Labels along the bottom: place across the map in [0, 1], and text.
    pub across: Vec<(f64, String)>,
    /// Labels along the left: place down the map in [0, 1], and text.
    pub down: Vec<(f64, String)>,
    /// Sites on top.
    pub marks: Vec<Mark>,
    /// What the marks are, beside one of them below the map.
    pub legend: String,
}

impl Picture {
    /// A picture of values on their own: no coordinates, scale or sites.
    pub fn new(title: impl Into<String>, values: Array2<f64>) -> Self {
        let (rows, cols) = values.dim();
        Picture {
            title: title.into(),
            subtitle: String::new(),
            values,
            aspect: rows as f64 / cols.max(1) as f64,
            palette: Palette::Level,
            range: None,
            metres_across: None,
            across: Vec::new(),
            down: Vec::new(),
            marks: Vec::new(),
            legend: String::new(),
        }
    }

    /// Takes shape, scale and coordinates from the grid that the values cover, row by row from its
    /// first one.
    pub fn on(mut self, grid: &Grid) -> Self {
        if grid.pixel[1] > 0.0 {
            self.values.invert_axis(Axis(0)); // south first on file
        }
        let [width, height] = grid.pixel_metres();
        self.metres_across = Some(width * grid.cols as f64);
        self.aspect = height * grid.rows as f64 / (width * grid.cols as f64);
        (self.across, self.down) = graticule(grid);
        self
    }

    /// Puts sites on top, given in the grid's own coordinates; those outside it are left out.
    pub fn with_sites(mut self, grid: &Grid, x: &[f64], y: &[f64], values: Option<&[f64]>) -> Self {
        let place =
            |v: f64, origin: f64, pixel: f64, count: usize| (v - origin) / (pixel * count as f64);
        for i in 0..x.len().min(y.len()) {
            let down = place(y[i], grid.origin[1], grid.pixel[1], grid.rows);
            let mark = Mark {
                x: place(x[i], grid.origin[0], grid.pixel[0], grid.cols),
                y: if grid.pixel[1] > 0.0 { 1.0 - down } else { down },
                value: values.map(|v| v[i]),
            };
            if (0.0..=1.0).contains(&mark.x) && (0.0..=1.0).contains(&mark.y) {
                self.marks.push(mark);
            }
        }
        self
    }

    /// Draws the picture and writes it as PNG, to a temporary name first.
    ///
    /// # Errors
    /// [`Error::Axis`] if there are no values; [`Error::Input`] or [`Error::Io`] if the disk
    /// refuses.
    pub fn save(&self, path: &Path) -> Result<()> {
        if self.values.is_empty() {
            return Err(Error::axis("values of a picture", 0, "at least one"));
        }
        self.draw()?.save(path)
    }

    fn draw(&self) -> Result<Canvas> {
        let [left, top, right, bottom] = MARGIN;
        let aspect = self.aspect.clamp(0.1, 10.0);
        let wide = LARGEST[0].min(LARGEST[1] / aspect);
        let (width, height) = ((wide as usize).max(360), ((wide * aspect) as usize).max(90));
        let mut canvas = Canvas::new(left + width + right, top + height + bottom);
        let range = self.range.unwrap_or_else(|| range(self.values.iter().copied()));
        let colour = |v: f64| self.palette.colour((v - range[0]) / (range[1] - range[0]));

        let at = |i: usize, size: usize| (i as f64 + 0.5) / size as f64;
        let seen = |x: usize, y: usize| !self.sample(at(x, width), at(y, height)).is_nan();
        for y in 0..height {
            for x in 0..width {
                let v = self.sample(at(x, width), at(y, height));
                // A thin line around what has data: the coast.
                let coast = || {
                    (x.saturating_sub(1)..(x + 2).min(width)).any(|x| seen(x, y))
                        || (y.saturating_sub(1)..(y + 2).min(height)).any(|y| seen(x, y))
                };
                let colour = match v.is_nan() {
                    false => colour(v),
                    true if coast() => COAST,
                    true => NO_DATA,
                };
                canvas.put(left + x, top + y, colour, 1.0);
            }
        }
        self.draw_marks(&mut canvas, (width, height), &colour);
        canvas.frame(left, top, width, height);

        canvas.text(&self.title, (left as i32, 24), 27.0, INK, HPos::Left, VPos::Top)?;
        canvas.text(&self.subtitle, (left as i32, 60), 16.0, GREY, HPos::Left, VPos::Top)?;
        for (at, label) in &self.across {
            let x = left + (at * width as f64).round() as usize;
            canvas.fill(x, top + height, 1, 6, GREY);
            let place = (x as i32, (top + height + 10) as i32);
            canvas.text(label, place, 15.0, INK, HPos::Center, VPos::Top)?;
        }
        for (at, label) in &self.down {
            let y = top + (at * height as f64).round() as usize;
            canvas.fill(left - 6, y, 6, 1, GREY);
            let place = (left as i32 - 10, y as i32);
            canvas.text(label, place, 15.0, INK, HPos::Right, VPos::Center)?;
        }
        self.draw_bar(&mut canvas, (left + width + 28, top, height), range)?;
        let foot = top + height + 56;
        if let Some(metres) = self.metres_across {
            draw_scale(&mut canvas, (left, foot), width, metres)?;
        }
        if !self.marks.is_empty() && !self.legend.is_empty() {
            let (x, y) = (left + width, foot + 2);
            let wide = canvas.text(
                &self.legend,
                (x as i32, y as i32),
                15.0,
                INK,
                HPos::Right,
                VPos::Center,
            )?;
            let centre = (x as f64 - wide as f64 - 14.0, y as f64 + 0.5);
            let filled = self.marks[0].value.is_some();
            mark(&mut canvas, centre, 5.0, filled.then(|| self.palette.colour(0.6)));
        }
        Ok(canvas)
    }

    /// The value at a place in [0, 1]², nearest pixel.
    fn sample(&self, x: f64, y: f64) -> f64 {
        let (rows, cols) = self.values.dim();
        let col = ((x * cols as f64) as usize).min(cols - 1);
        let row = ((y * rows as f64) as usize).min(rows - 1);
        self.values[[row, col]]
    }

    fn draw_marks(&self, canvas: &mut Canvas, size: (usize, usize), colour: &dyn Fn(f64) -> Rgb) {
        let radius = match self.marks.len() {
            0..=300 => 5.0,
            301..=1500 => 3.6,
            _ => 2.6,
        };
        for m in &self.marks {
            let x = MARGIN[0] as f64 + m.x * size.0 as f64;
            let y = MARGIN[1] as f64 + m.y * size.1 as f64;
            let fill = m.value.map(colour);
            mark(canvas, (x, y), if fill.is_some() { radius } else { 0.7 * radius }, fill);
        }
    }

    fn draw_bar(
        &self,
        canvas: &mut Canvas,
        (x, top, height): (usize, usize, usize),
        range: [f64; 2],
    ) -> Result<()> {
        let (wide, tall) = (20, height.min(560));
        let top = top + (height - tall) / 2;
        for y in 0..tall {
            let t = 1.0 - (y as f64 + 0.5) / tall as f64;
            canvas.fill(x, top + y, wide, 1, self.palette.colour(t));
        }
        canvas.frame(x, top, wide, tall);
        let step = nice((range[1] - range[0]) / 5.0);
        let first = (range[0] / step - 1e-9).ceil() as i64;
        let last = (range[1] / step + 1e-9).floor() as i64;
        for k in first..=last {
            let value = k as f64 * step;
            let t = (value - range[0]) / (range[1] - range[0]);
            let y = top + ((1.0 - t) * (tall - 1) as f64).round() as usize;
            canvas.fill(x + wide, y, 5, 1, GREY);
            let place = ((x + wide + 10) as i32, y as i32);
            canvas.text(&label(value, step), place, 15.0, INK, HPos::Left, VPos::Center)?;
        }
        Ok(())
    }
}

/// A site: a disc in a thin dark and a thin light ring, or hollow.
fn mark(canvas: &mut Canvas, centre: (f64, f64), radius: f64, fill: Option<Rgb>) {
    match fill {
        Some(fill) => {
            canvas.disc(centre, radius + 1.1, WHITE, 0.9);
            canvas.disc(centre, radius, INK, 1.0);
            canvas.disc(centre, radius - 1.1, fill, 1.0);
        }
        None => {
            canvas.ring(centre, radius, 2.6, WHITE, 0.75);
            canvas.ring(centre, radius, 1.2, INK, 1.0);
        }
    }
}

fn draw_scale(canvas: &mut Canvas, at: (usize, usize), width: usize, metres: f64) -> Result<()> {
    let (x, y) = at;
    let length = floor_nice(0.3 * metres);
    let pixels = (length / metres * width as f64).round() as usize;
    if pixels == 0 {
        return Ok(());
    }
    for (i, colour) in [INK, WHITE, INK, WHITE].into_iter().enumerate() {
        let (a, b) = (i * pixels / 4, (i + 1) * pixels / 4);
        canvas.fill(x + a, y, b - a, 6, colour);
    }
    canvas.frame(x, y, pixels, 6);
    let text = if length >= 1000.0 {
        format!("{} km", label(length / 1000.0, length / 1000.0))
    } else {
        format!("{} m", label(length, length))
    };
    let place = ((x + pixels + 10) as i32, (y + 3) as i32);
    canvas.text(&text, place, 15.0, INK, HPos::Left, VPos::Center)?;
    Ok(())
}

/// Ends of a colour bar: the values rounded outwards to tenths of their range, zero kept as an end
/// where it is near, so that maps of positive things start at zero.
fn range(values: impl Iterator<Item = f64>) -> [f64; 2] {
    let seen = values.filter(|v| v.is_finite());
    let (low, high) =
        seen.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
    if low > high {
        return [0.0, 1.0];
    }
    if high - low <= 1e-9 * high.abs().max(low.abs()) {
        let half = if high == 0.0 { 1.0 } else { 0.1 * high.abs() };
        return [low - half, high + half];
    }
    let step = nice((high - low) / 20.0);
    let mut ends = [(low / step).floor() * step, (high / step).ceil() * step];
    if ends[0] > 0.0 && ends[0] < 0.35 * ends[1] {
        ends[0] = 0.0;
    }
    ends
}

/// The smallest 1, 2 or 5 × 10ⁿ that is at least `step`.
fn nice(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let up = [1.0, 2.0, 5.0, 10.0].into_iter().find(|m| m * power >= step * (1.0 - 1e-9));
    up.unwrap_or(10.0) * power
}

/// The largest 1, 2 or 5 × 10ⁿ that is at most `length`.
fn floor_nice(length: f64) -> f64 {
    let power = 10f64.powf(length.log10().floor());
    let down = [5.0, 2.0, 1.0].into_iter().find(|m| m * power <= length * (1.0 + 1e-9));
    down.unwrap_or(1.0) * power
}

/// A number with the decimals that steps of `step` need.
fn label(value: f64, step: f64) -> String {
    let decimals = (-step.log10().floor()).clamp(0.0, 9.0) as usize;
    let text = format!("{value:.decimals$}");
    if text.trim_start_matches('-').chars().all(|c| c == '0' || c == '.') {
        return "0".into();
    }
    text.replace('-', "−")
}

type Labels = Vec<(f64, String)>;

/// Where meridians cross the lower edge and parallels the left one; on a local plane, kilometres.
fn graticule(grid: &Grid) -> (Labels, Labels) {
    const STEPS: usize = 400;
    let extent = grid.extent();
    let along = |i: usize| i as f64 / STEPS as f64;
    let lonlat = Crs::from_user("EPSG:4326").ok();
    let edge = |across: bool| -> Option<Vec<f64>> {
        let mut x: Vec<f64> = Vec::with_capacity(STEPS + 1);
        let mut y = Vec::with_capacity(STEPS + 1);
        for i in 0..=STEPS {
            let t = along(i);
            x.push(if across { extent.west + t * extent.width() } else { extent.west });
            y.push(if across { extent.south } else { extent.north - t * extent.height() });
        }
        if grid.crs.is_local() {
            let km = grid.crs.metres_per_unit() / 1000.0;
            x.iter_mut().chain(&mut y).for_each(|v| *v *= km);
        } else {
            grid.crs.transform(lonlat.as_ref()?, &mut x, &mut y).ok()?;
        }
        Some(if across { x } else { y })
    };
    let local = grid.crs.is_local();
    let labels = |values: Vec<f64>, hemispheres: [&str; 2]| {
        let (low, high) = values
            .iter()
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), &v| (a.min(v), b.max(v)));
        let step = nice((high - low) / 6.0);
        let mut labels: Labels = Vec::new();
        for i in 1..values.len() {
            let (a, b) = (values[i - 1] / step, values[i] / step);
            let crossed = a.floor().max(b.floor());
            if a.floor() == b.floor() || (a - b).abs() > 1.0 {
                continue; // no multiple between, or the date line
            }
            let at = along(i - 1) + (crossed - a) / (b - a) / STEPS as f64;
            let value = crossed * step;
            let text = if local {
                format!("{} km", label(value, step))
            } else {
                let side = if crossed == 0.0 { "" } else { hemispheres[usize::from(value < 0.0)] };
                format!("{}° {side}", label(value.abs(), step)).trim_end().to_string()
            };
            labels.push((at, text));
        }
        labels
    };
    (
        edge(true).map(|v| labels(v, ["E", "W"])).unwrap_or_default(),
        edge(false).map(|v| labels(v, ["N", "S"])).unwrap_or_default(),
    )
}

/// An RGB image that is drawn on.
struct Canvas {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl Canvas {
    fn new(width: usize, height: usize) -> Self {
        Canvas { width, height, pixels: vec![255; 3 * width * height] }
    }

    /// Writes the image as PNG, to a temporary name first.
    fn save(&self, path: &Path) -> Result<()> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let partial = path.with_file_name(format!(".partial-{}-{name}", std::process::id()));
        let size = (self.width as u32, self.height as u32);
        let written = (|| {
            let mut png = BitMapBackend::new(&partial, size);
            png.blit_bitmap((0, 0), size, &self.pixels)?;
            png.present()
        })();
        if let Err(error) = written {
            let _ = std::fs::remove_file(&partial);
            return Err(Error::input("a picture could not be written")
                .fact("file", path.display())
                .fact("reason", error)
                .try_this("see whether the folder exists and that disk has room"));
        }
        std::fs::rename(&partial, path).map_err(|e| Error::io("rename to", path, e))
    }

    fn put(&mut self, x: usize, y: usize, colour: Rgb, alpha: f64) {
        if x >= self.width || y >= self.height {
            return;
        }
        let at = 3 * (y * self.width + x);
        for (old, new) in self.pixels[at..at + 3].iter_mut().zip(colour) {
            *old = (f64::from(*old) * (1.0 - alpha) + f64::from(new) * alpha).round() as u8;
        }
    }

    fn fill(&mut self, x: usize, y: usize, width: usize, height: usize, colour: Rgb) {
        for row in y..y + height {
            for col in x..x + width {
                self.put(col, row, colour, 1.0);
            }
        }
    }

    /// A thin line just outside a rectangle.
    fn frame(&mut self, x: usize, y: usize, width: usize, height: usize) {
        self.fill(x - 1, y - 1, width + 2, 1, GREY);
        self.fill(x - 1, y + height, width + 2, 1, GREY);
        self.fill(x - 1, y, 1, height, GREY);
        self.fill(x + width, y, 1, height, GREY);
    }

    /// Colours each pixel near `centre` by `cover`, the share covered at a distance.
    fn stamp(&mut self, centre: (f64, f64), reach: f64, colour: Rgb, cover: impl Fn(f64) -> f64) {
        let from = |v: f64| (v - reach - 1.0).max(0.0) as usize;
        let to = |v: f64| (v + reach + 2.0).max(0.0) as usize;
        for y in from(centre.1)..to(centre.1) {
            for x in from(centre.0)..to(centre.0) {
                let distance = (x as f64 + 0.5 - centre.0).hypot(y as f64 + 0.5 - centre.1);
                self.put(x, y, colour, cover(distance).clamp(0.0, 1.0));
            }
        }
    }

    fn disc(&mut self, centre: (f64, f64), radius: f64, colour: Rgb, alpha: f64) {
        self.stamp(centre, radius, colour, |d| alpha * (radius + 0.5 - d).clamp(0.0, 1.0));
    }

    fn ring(&mut self, centre: (f64, f64), radius: f64, width: f64, colour: Rgb, alpha: f64) {
        self.stamp(centre, radius + width, colour, |d| {
            alpha * (0.5 * width + 0.5 - (d - radius).abs()).clamp(0.0, 1.0)
        });
    }

    /// Writes text and returns its width in pixels. `at` is its left, middle or right end, and the
    /// top or the middle of its capitals.
    fn text(
        &mut self,
        text: &str,
        at: (i32, i32),
        size: f64,
        colour: Rgb,
        h: HPos,
        v: VPos,
    ) -> Result<usize> {
        if text.is_empty() {
            return Ok(0);
        }
        let (ink, capital) = (Ink::of(text, size)?, Ink::of("0", size)?);
        let wide = ink.right - ink.left;
        let x = match h {
            HPos::Left => at.0 as f64,
            HPos::Center => at.0 as f64 - 0.5 * wide,
            HPos::Right => at.0 as f64 - wide,
        };
        let y = match v {
            VPos::Center => at.1 as f64 + 0.5 - 0.5 * (capital.bottom - capital.top),
            _ => at.1 as f64,
        };
        // Whole pixels, so that a row of labels has one baseline and one weight.
        let (x, y) = ((x - ink.left).round(), (y - capital.top).round());
        for (i, &cover) in ink.cover.iter().enumerate().filter(|(_, c)| **c > 0.0) {
            let (col, row) = (x + (i % ink.width) as f64, y + (i / ink.width) as f64);
            if col >= 0.0 && row >= 0.0 {
                // The one font at hand is a light one: lift its thin strokes.
                self.put(col as usize, row as usize, colour, cover.powf(0.75));
            }
        }
        Ok(wide.round() as usize)
    }
}

/// The pixels that a text covers.
///
/// plotters sets glyphs on whole pixels, which spaces small text badly: we let it draw large and
/// average down.
struct Ink {
    width: usize,
    /// Share covered, row-major.
    cover: Vec<f64>,
    /// Edges of what is covered, pixels.
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

impl Ink {
    const FINE: usize = 6;

    fn of(text: &str, size: f64) -> Result<Self> {
        static FONT: Once = Once::new();
        FONT.call_once(|| {
            // The bytes are compiled in; a font that does not parse shows as an error below.
            let _ = register_font("label", FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT);
        });
        let broken = |e: &dyn std::fmt::Display| {
            Error::input("text could not be drawn on a picture").fact("reason", e)
        };
        let fine = Self::FINE;
        let font = ("label", size * fine as f64).into_font();
        let (wide, _) = font.box_size(text).map_err(|e| broken(&e))?;
        let (width, height) = (wide as usize / fine + 8, (2.5 * size) as usize + 4);
        let mut pixels = vec![255; 3 * width * height * fine * fine];
        let dimensions = ((width * fine) as u32, (height * fine) as u32);
        let style = TextStyle::from(font).color(&RGBColor(0, 0, 0));
        let mut backend = BitMapBackend::with_buffer(&mut pixels, dimensions);
        // Glyphs reach above the corner that they are given.
        let corner = (2 * fine as i32, (0.6 * size * fine as f64) as i32);
        backend.draw_text(text, &style, corner).map_err(|e| broken(&e))?;
        backend.present().map_err(|e| broken(&e))?;
        drop(backend);
        let mut ink = Ink {
            width,
            cover: vec![0.0; width * height],
            left: f64::INFINITY,
            right: 0.0,
            top: f64::INFINITY,
            bottom: 0.0,
        };
        for (i, pixel) in pixels.chunks_exact(3).enumerate() {
            let (x, y) = (i % (width * fine), i / (width * fine));
            let cover = f64::from(255 - pixel[0]) / 255.0;
            ink.cover[y / fine * width + x / fine] += cover / (fine * fine) as f64;
            if cover > 0.3 {
                let (x, y) = (x as f64 / fine as f64, y as f64 / fine as f64);
                ink.left = ink.left.min(x);
                ink.right = ink.right.max(x);
                ink.top = ink.top.min(y);
                ink.bottom = ink.bottom.max(y);
            }
        }
        if ink.left > ink.right {
            (ink.left, ink.top) = (0.0, 0.0); // blanks only
        }
        Ok(ink)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_and_labels_are_round() {
        assert_eq!([nice(0.013), nice(0.2), nice(3.1), nice(70.0)], [0.02, 0.2, 5.0, 100.0]);
        assert_eq!([floor_nice(0.13), floor_nice(49.0), floor_nice(50.0)], [0.1, 20.0, 50.0]);
        assert_eq!(label(0.30000000000000004, 0.1), "0.3");
        assert_eq!(label(-20.0, 20.0), "−20");
        assert_eq!(label(-0.0, 0.1), "0");
    }

    #[test]
    fn values_no_data_and_sites_have_their_colours() {
        let mut picture = Picture::new("Title", ndarray::array![[0.0, 1.0], [f64::NAN, 0.5]]);
        picture.marks = vec![Mark { x: 0.25, y: 0.25, value: Some(1.0) }];
        let canvas = picture.draw().unwrap();
        let (width, height) =
            (canvas.width - MARGIN[0] - MARGIN[2], canvas.height - MARGIN[1] - MARGIN[3]);
        let at = |x: f64, y: f64| -> Rgb {
            let x = MARGIN[0] + (x * width as f64) as usize;
            let y = MARGIN[1] + (y * height as f64) as usize;
            canvas.pixels[3 * (y * canvas.width + x)..][..3].try_into().unwrap()
        };
        assert_eq!(at(0.1, 0.1), Palette::Level.colour(0.0));
        assert_eq!(at(0.75, 0.25), Palette::Level.colour(1.0));
        assert_eq!(at(0.25, 0.75), NO_DATA);
        assert_eq!(at(0.75, 0.75), Palette::Level.colour(0.5));
        assert_eq!(at(0.25, 0.25), Palette::Level.colour(1.0), "the site, not the map under it");
        assert_eq!(at(0.1, 0.5005), COAST);
    }

    #[test]
    fn meridians_and_parallels_are_where_they_belong() {
        let local = Crs::from_user("local:km").unwrap();
        let extent = crate::geo::grid::Extent { west: 0.0, south: 0.0, east: 60.0, north: 30.0 };
        let grid = Grid::cover(extent, &local, None).unwrap();
        let (across, down) = graticule(&grid);
        let at = |labels: &Labels, text: &str| labels.iter().find(|l| l.1 == text).unwrap().0;
        assert!((at(&across, "20 km") - 1.0 / 3.0).abs() < 1e-9);
        assert!((at(&down, "10 km") - 2.0 / 3.0).abs() < 1e-9, "down from the north");
    }

    #[test]
    fn colour_bars_hold_the_values() {
        for values in
            [vec![0.02, 0.41], vec![-3.0, 8.0], vec![5.0, 5.0], vec![0.0], vec![1e6, 1.2e6]]
        {
            let [low, high] = range(values.iter().copied());
            assert!(values.iter().all(|v| (low..=high).contains(v)) && low < high, "{values:?}");
        }
        assert_eq!(range([0.02, 0.41].into_iter())[0], 0.0);
        assert_eq!(range([f64::NAN].into_iter()), [0.0, 1.0]);
    }
}
