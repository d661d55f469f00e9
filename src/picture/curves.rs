//! A sheet of charts: curves, bands between two curves, and dots, over one axis.

use std::path::Path;

use plotters::style::text_anchor::{HPos, VPos};

use super::{Canvas, GREY, INK, Rgb, WHITE, label, mark, nice, range};
use crate::error::{Error, Result};

/// Colours of curves: Okabe & Ito (2008), told apart by the colour-blind too, and darker shades.
const COLOURS: [Rgb; 10] = [
    [0, 114, 178],
    [213, 94, 0],
    [0, 158, 115],
    [204, 121, 167],
    [230, 159, 0],
    [86, 180, 233],
    [120, 94, 60],
    [110, 60, 150],
    [0, 80, 60],
    [150, 30, 40],
];
/// Room around the sheet, and around a chart: left, top, right, bottom, pixels.
const EDGE: usize = 36;
const HEAD: usize = 92;
const ROOM: [usize; 4] = [58, 30, 14, 44];

/// The colour of curve number `i`; curve 0 is the reference, in ink.
pub fn colour(i: usize) -> [u8; 3] {
    if i == 0 { INK } else { COLOURS[(i - 1) % COLOURS.len()] }
}

/// A line through points.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// Its points, in order of x; none that is not finite is drawn.
    pub points: Vec<[f64; 2]>,
    /// Which [`colour`].
    pub colour: usize,
    /// Half its width, pixels.
    pub width: f64,
    /// 0 unseen … 1 full.
    pub strength: f64,
    /// Whether each point is marked.
    pub marked: bool,
}

/// What lies between two values at each x.
#[derive(Debug, Clone, PartialEq)]
pub struct Band {
    /// x, lower, upper.
    pub edges: Vec<[f64; 3]>,
    /// Which [`colour`].
    pub colour: usize,
}

/// One chart.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Chart {
    /// One line above it.
    pub caption: String,
    /// What x is.
    pub across: String,
    /// What y is.
    pub up: String,
    /// Under everything.
    pub bands: Vec<Band>,
    /// Over the bands.
    pub curves: Vec<Curve>,
    /// On top: place and [`colour`].
    pub dots: Vec<([f64; 2], usize)>,
    /// Ends of the vertical axis; those of what is drawn when absent.
    pub ends: Option<[f64; 2]>,
}

/// Draws charts, `across` in a row, under a title, a smaller line and a legend of colours, and
/// writes them as PNG, to a temporary name first.
///
/// # Errors
/// [`Error::Axis`] for no charts; [`Error::Input`] or [`Error::Io`] if the disk refuses.
pub fn save(
    title: &str,
    line: &str,
    legend: &[(String, usize)],
    charts: &[Chart],
    (across, size): (usize, [usize; 2]),
    path: &Path,
) -> Result<()> {
    if charts.is_empty() || across == 0 {
        return Err(Error::axis("charts on a sheet", charts.len(), "at least one"));
    }
    let cell = [size[0] + ROOM[0] + ROOM[2], size[1] + ROOM[1] + ROOM[3]];
    let width = (2 * EDGE + across.min(charts.len()) * cell[0]).max(900);
    // The legend wraps.
    let (mut places, mut x, mut y) = (Vec::new(), EDGE, HEAD - 4);
    for (name, _) in legend {
        let wide = 40 + 8 * name.chars().count();
        if x + wide > width - EDGE {
            (x, y) = (EDGE, y + 22);
        }
        places.push((x, y));
        x += wide;
    }
    let top = if legend.is_empty() { HEAD } else { y + 26 };
    let mut canvas = Canvas::new(width, top + charts.len().div_ceil(across) * cell[1] + EDGE / 2);
    canvas.text(title, (EDGE as i32, 24), 26.0, INK, HPos::Left, VPos::Top)?;
    canvas.text(line, (EDGE as i32, 58), 15.0, GREY, HPos::Left, VPos::Top)?;
    for ((name, number), (x, y)) in legend.iter().zip(places) {
        canvas.fill(x, y - 2, 18, 4, colour(*number));
        canvas.text(name, (x as i32 + 24, y as i32), 14.0, INK, HPos::Left, VPos::Center)?;
    }
    for (i, chart) in charts.iter().enumerate() {
        let corner =
            [EDGE + (i % across) * cell[0] + ROOM[0], top + (i / across) * cell[1] + ROOM[1]];
        chart.draw(&mut canvas, corner, size)?;
    }
    canvas.save(path)
}

impl Chart {
    fn draw(&self, canvas: &mut Canvas, [left, top]: [usize; 2], size: [usize; 2]) -> Result<()> {
        let xs = self.curves.iter().flat_map(|c| c.points.iter().map(|p| p[0]));
        let xs = xs.chain(self.bands.iter().flat_map(|b| b.edges.iter().map(|e| e[0])));
        let (low, high) = xs
            .chain(self.dots.iter().map(|d| d.0[0]))
            .filter(|x| x.is_finite())
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), x| (a.min(x), b.max(x)));
        let sides = if low < high { [low, high] } else { [low - 0.5, low + 0.5] };
        let ys = self.curves.iter().flat_map(|c| c.points.iter().map(|p| p[1]));
        let ys =
            ys.chain(self.bands.iter().flat_map(|b| b.edges.iter().flat_map(|e| [e[1], e[2]])));
        let ends = self.ends.unwrap_or_else(|| range(ys.chain(self.dots.iter().map(|d| d.0[1]))));
        let place = |[x, y]: [f64; 2]| {
            let across = (x - sides[0]) / (sides[1] - sides[0]);
            let up = ((y - ends[0]) / (ends[1] - ends[0])).clamp(-0.02, 1.02);
            (left as f64 + across * size[0] as f64, top as f64 + (1.0 - up) * size[1] as f64)
        };
        canvas.fill(left, top, size[0], size[1], [248, 248, 249]);
        for band in &self.bands {
            let ink = colour(band.colour);
            for pair in band.edges.windows(2) {
                let (from, to) = (place([pair[0][0], 0.0]).0, place([pair[1][0], 0.0]).0);
                for col in from.round() as usize..to.round() as usize {
                    let t = (col as f64 - from) / (to - from);
                    let at = |k: usize| pair[0][k] + t * (pair[1][k] - pair[0][k]);
                    let (a, b) = (place([0.0, at(2)]).1, place([0.0, at(1)]).1);
                    if !(a.is_finite() && b.is_finite()) {
                        continue;
                    }
                    let inside = |y: f64| y.clamp(top as f64, (top + size[1]) as f64) as usize;
                    (inside(a)..inside(b)).for_each(|row| canvas.put(col, row, ink, 0.18));
                }
            }
        }
        for curve in &self.curves {
            let ink = colour(curve.colour);
            for pair in curve.points.windows(2) {
                let (a, b) = (place(pair[0]), place(pair[1]));
                if ![a.0, a.1, b.0, b.1].iter().all(|v| v.is_finite()) {
                    continue;
                }
                // Discs closer than their radius make a smooth line.
                let steps = (2.0 * (b.0 - a.0).hypot(b.1 - a.1)).ceil().max(1.0) as usize;
                for s in 0..=steps {
                    let t = s as f64 / steps as f64;
                    let at = (a.0 + t * (b.0 - a.0), a.1 + t * (b.1 - a.1));
                    canvas.disc(at, curve.width, ink, 0.5 * curve.strength);
                }
            }
            if curve.marked {
                for at in curve.points.iter().map(|p| place(*p)).filter(|p| p.1.is_finite()) {
                    canvas.disc(at, curve.width + 2.6, WHITE, 1.0);
                    canvas.disc(at, curve.width + 1.6, ink, 1.0);
                }
            }
        }
        for (at, number) in &self.dots {
            mark(canvas, place(*at), 3.0, Some(colour(*number)));
        }
        canvas.frame(left, top, size[0], size[1]);
        let at = (left as i32, top as i32 - 13);
        canvas.text(&self.caption, at, 14.0, INK, HPos::Left, VPos::Center)?;
        self.axes(canvas, [left, top], size, (sides, ends))
    }

    fn axes(
        &self,
        canvas: &mut Canvas,
        [left, top]: [usize; 2],
        size: [usize; 2],
        (sides, ends): ([f64; 2], [f64; 2]),
    ) -> Result<()> {
        let steps = |[low, high]: [f64; 2], pixels: usize, each: f64| {
            let step = nice((high - low) / (pixels as f64 / each).max(2.0));
            let (first, last) =
                ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
            (first..=last).map(move |k| (k as f64 * step, step)).collect::<Vec<_>>()
        };
        for (value, step) in steps(ends, size[1], 40.0) {
            let share = (value - ends[0]) / (ends[1] - ends[0]);
            let y = top + ((1.0 - share) * (size[1] - 1) as f64).round() as usize;
            canvas.fill(left - 4, y, 4, 1, GREY);
            let at = (left as i32 - 8, y as i32);
            canvas.text(&label(value, step), at, 12.0, INK, HPos::Right, VPos::Center)?;
        }
        let bottom = top + size[1];
        for (value, step) in steps(sides, size[0], 70.0) {
            let share = (value - sides[0]) / (sides[1] - sides[0]);
            let x = left + (share * (size[0] - 1) as f64).round() as usize;
            canvas.fill(x, bottom, 1, 4, GREY);
            let at = (x as i32, bottom as i32 + 7);
            canvas.text(&label(value, step), at, 12.0, INK, HPos::Center, VPos::Top)?;
        }
        let at = ((left + size[0]) as i32, bottom as i32 + 24);
        canvas.text(&self.across, at, 12.0, GREY, HPos::Right, VPos::Top)?;
        let at = ((left + size[0]) as i32, top as i32 - 12);
        canvas.text(&self.up, at, 12.0, GREY, HPos::Right, VPos::Center)?;
        Ok(())
    }
}
