//! A sheet of small pictures: surfaces or curves with their sites, side by side.

use std::path::Path;

use plotters::style::text_anchor::{HPos, VPos};

use super::{Canvas, GREY, INK, Palette, WHITE, label, mark, nice, range};
use crate::error::{Error, Result};

/// Panels in a row.
const ACROSS: usize = 4;
/// Side of the square that a panel's map fits into, pixels.
const SIDE: usize = 264;
/// Size of a panel with caption, colour bar and the space to its neighbours, pixels.
const CELL: [usize; 2] = [SIDE + 92, SIDE + 78];
/// Room above the panels and around the sheet, pixels.
const HEAD: usize = 104;
const EDGE: usize = 40;
/// Height of a caption, pixels.
const CAPTION: usize = 46;

/// A site in a panel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dot {
    /// Place, the panel's coordinates.
    pub at: [f64; 2],
    /// What was observed, in the units of the panel's values.
    pub value: f64,
    /// Size: 0 small, 1 large.
    pub weight: f64,
}

/// What a panel shows.
#[derive(Debug, Clone, PartialEq)]
pub enum View {
    /// Values on a lattice, row-major from the lower left, `rows` × `cols`, whose outer nodes lie
    /// on the panel's edges; sites coloured by what was observed.
    Surface {
        /// Rows of the lattice.
        rows: usize,
        /// Columns of the lattice.
        cols: usize,
    },
    /// Values along a line, evenly spaced from edge to edge; sites at the height observed.
    Curve,
}

/// One small picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Panel {
    /// Two lines above it.
    pub caption: [String; 2],
    /// What it shows.
    pub view: View,
    /// The surface.
    pub values: Vec<f64>,
    /// Coordinates of the lower left corner.
    pub low: [f64; 2],
    /// Coordinates of the upper right corner.
    pub high: [f64; 2],
    /// Sites on top.
    pub dots: Vec<Dot>,
}

/// Draws panels under a title and two smaller lines, and writes them as PNG, to a temporary name
/// first.
///
/// # Errors
/// [`Error::Axis`] if a panel's values do not fill its lattice; [`Error::Input`] or [`Error::Io`]
/// if the disk refuses.
pub fn save(title: &str, lines: [&str; 2], panels: &[Panel], path: &Path) -> Result<()> {
    let (across, down) = (panels.len().clamp(1, ACROSS), panels.len().div_ceil(ACROSS).max(1));
    // Long lines of text need some width even above one panel.
    let width = (2 * EDGE + across * CELL[0]).max(1000);
    let mut canvas = Canvas::new(width, HEAD + down * CELL[1] + EDGE / 2);
    canvas.text(title, (EDGE as i32, 24), 27.0, INK, HPos::Left, VPos::Top)?;
    for (i, line) in lines.into_iter().enumerate() {
        let at = (EDGE as i32, 58 + 22 * i as i32);
        canvas.text(line, at, 15.0, GREY, HPos::Left, VPos::Top)?;
    }
    for (i, panel) in panels.iter().enumerate() {
        let corner = [EDGE + (i % ACROSS) * CELL[0], HEAD + (i / ACROSS) * CELL[1]];
        panel.draw(&mut canvas, corner)?;
    }
    canvas.save(path)
}

impl Panel {
    fn draw(&self, canvas: &mut Canvas, [x, y]: [usize; 2]) -> Result<()> {
        for (i, line) in self.caption.iter().enumerate() {
            let (colour, at) = ([INK, GREY][i], (x as i32, (y + 8 + 19 * i) as i32));
            canvas.text(line, at, 14.0, colour, HPos::Left, VPos::Top)?;
        }
        let corner = [x, y + CAPTION];
        match self.view {
            View::Surface { rows, cols } => self.draw_surface(canvas, corner, [rows, cols]),
            View::Curve => self.draw_curve(canvas, corner),
        }
    }

    fn draw_surface(
        &self,
        canvas: &mut Canvas,
        [left, top]: [usize; 2],
        [rows, cols]: [usize; 2],
    ) -> Result<()> {
        if self.values.len() != rows * cols || self.values.is_empty() {
            let expected = format!("{rows} × {cols}");
            return Err(Error::axis("values and shape of a panel", self.values.len(), expected));
        }
        let extent = [self.high[0] - self.low[0], self.high[1] - self.low[1]];
        let unit = SIDE as f64 / extent[0].max(extent[1]);
        let [width, height] = extent.map(|v| (v * unit).round().max(8.0) as usize);
        let ends = range(self.values.iter().copied());
        let colour = |v: f64| Palette::Level.colour((v - ends[0]) / (ends[1] - ends[0]));
        let share = |i: usize, n: usize| (i as f64 + 0.5) / n as f64;
        for row in 0..height {
            for col in 0..width {
                let v = self.between([share(col, width), 1.0 - share(row, height)], [rows, cols]);
                canvas.put(left + col, top + row, colour(v), 1.0);
            }
        }
        for dot in &self.dots {
            let [across, up] = self.place(dot.at);
            let at = (left as f64 + across * width as f64, top as f64 + (1.0 - up) * height as f64);
            // A thin ring, for panels are small and sites many.
            let radius = self.radius(dot);
            canvas.disc(at, radius + 0.9, WHITE, 0.95);
            canvas.disc(at, radius, colour(dot.value), 1.0);
        }
        canvas.frame(left, top, width, height);
        let bar = left + width + 14;
        let tall = height.max(80);
        let top = top + height / 2 - (tall / 2).min(height / 2);
        for i in 0..tall {
            canvas.fill(bar, top + i, 11, 1, Palette::Level.colour(1.0 - share(i, tall)));
        }
        canvas.frame(bar, top, 11, tall);
        ticks(canvas, (bar + 11, top, tall), ends)
    }

    fn draw_curve(&self, canvas: &mut Canvas, [left, top]: [usize; 2]) -> Result<()> {
        let seen: Vec<f64> =
            self.values.iter().copied().chain(self.dots.iter().map(|d| d.value)).collect();
        let ends = range(seen.iter().copied());
        let height = |v: f64| {
            top as f64 + SIDE as f64 * (1.0 - (v - ends[0]) / (ends[1] - ends[0])).clamp(0.0, 1.0)
        };
        canvas.fill(left, top, SIDE, SIDE, [247, 247, 248]);
        // Discs closer than their radius make a smooth line.
        const FINE: usize = 2;
        let last = self.values.len().saturating_sub(1);
        let mut before = None;
        for i in 0..=SIDE * FINE {
            let t = i as f64 / (SIDE * FINE) as f64;
            let place = t * last as f64;
            let (low, up) = (place.floor() as usize, place.ceil() as usize);
            let v = self.values[low] + (self.values[up] - self.values[low]) * place.fract();
            let (x, y) = (left as f64 + t * SIDE as f64, height(v));
            let steps = (y - before.unwrap_or(y)).abs().ceil().max(1.0);
            for s in 1..=steps as usize {
                let y = before.unwrap_or(y) + (y - before.unwrap_or(y)) * s as f64 / steps;
                canvas.disc((x, y), 0.9, Palette::Level.colour(0.35), 0.6);
            }
            before = Some(y);
        }
        for dot in &self.dots {
            let at = (left as f64 + self.place(dot.at)[0] * SIDE as f64, height(dot.value));
            mark(canvas, at, self.radius(dot), Some(Palette::Level.colour(0.75)));
        }
        canvas.frame(left, top, SIDE, SIDE);
        ticks(canvas, (left + SIDE, top, SIDE), ends)
    }

    /// The lattice's value at a place in [0, 1]², bilinear.
    fn between(&self, at: [f64; 2], [rows, cols]: [usize; 2]) -> f64 {
        let axis = |t: f64, n: usize| {
            let place = t * (n - 1) as f64;
            let low = (place as usize).min(n.saturating_sub(2));
            (low, (low + 1).min(n - 1), place - low as f64)
        };
        let ((c, right, u), (r, above, v)) = (axis(at[0], cols), axis(at[1], rows));
        let value = |row: usize, col: usize| self.values[row * cols + col];
        let along = |row: usize| value(row, c) * (1.0 - u) + value(row, right) * u;
        along(r) * (1.0 - v) + along(above) * v
    }

    /// A place in the panel's coordinates, as shares of its width and height.
    fn place(&self, at: [f64; 2]) -> [f64; 2] {
        std::array::from_fn(|d| (at[d] - self.low[d]) / (self.high[d] - self.low[d]))
    }

    fn radius(&self, dot: &Dot) -> f64 {
        let crowd = match self.dots.len() {
            0..=100 => 1.0,
            101..=300 => 0.78,
            _ => 0.55,
        };
        crowd * (2.4 + 2.2 * dot.weight.clamp(0.0, 1.0))
    }
}

/// Labels to the right of a scale that runs from the top of `tall` pixels down.
fn ticks(
    canvas: &mut Canvas,
    (x, top, tall): (usize, usize, usize),
    [low, high]: [f64; 2],
) -> Result<()> {
    let step = nice((high - low) / (tall as f64 / 48.0).max(2.0));
    let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
    for k in first..=last {
        let value = k as f64 * step;
        let y = top + ((1.0 - (value - low) / (high - low)) * (tall - 1) as f64).round() as usize;
        canvas.fill(x, y, 4, 1, GREY);
        let at = ((x + 8) as i32, y as i32);
        canvas.text(&label(value, step), at, 13.0, INK, HPos::Left, VPos::Center)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plane_is_drawn_as_a_plane() {
        let (rows, cols) = (3, 4);
        let values = (0..rows * cols).map(|i| (i % cols) as f64 + 10.0 * (i / cols) as f64);
        let panel = Panel {
            caption: Default::default(),
            view: View::Surface { rows, cols },
            values: values.collect(),
            low: [-1.0, 0.0],
            high: [1.0, 4.0],
            dots: Vec::new(),
        };
        for (x, y) in [(0.0, 0.0), (1.0, 1.0), (0.5, 0.25), (0.1, 0.9)] {
            let seen = panel.between([x, y], [rows, cols]);
            assert!((seen - (3.0 * x + 20.0 * y)).abs() < 1e-12, "{x} {y}: {seen}");
        }
        assert_eq!(panel.place([0.0, 1.0]), [0.5, 0.25]);
    }
}
