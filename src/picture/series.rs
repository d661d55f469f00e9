//! The same map at several times: small pictures side by side under one colour scale.

use std::path::Path;

use plotters::style::text_anchor::{HPos, VPos};

use super::{Canvas, GREY, INK, NO_DATA, Picture, draw_scale, label, mark, nice, range};
use crate::error::{Error, Result};

/// Maps in a row, at most, and on a sheet.
const ACROSS: usize = 5;
const MOST: usize = 40;
/// Width of all maps of a row, and of one map at most, pixels.
const WIDE: usize = 1_240;
const LARGEST: usize = 380;
/// Room above the maps, between them, below them, and right of them for the colour bar.
const HEAD: usize = 100;
const GAP: usize = 18;
const FOOT: usize = 64;
const BAR: usize = 124;
/// Height of a caption.
const CAPTION: usize = 28;

/// Draws pictures of one grid side by side, each under its own title, and writes them as PNG, to a
/// temporary name first. Palette, scale bar and legend are the first one's. Of more than
/// 40, as many are shown, at even steps.
///
/// # Errors
/// [`Error::Axis`] for no pictures or one without values; [`Error::Input`] or [`Error::Io`] if the disk
/// refuses.
pub fn save(title: &str, subtitle: &str, all: &[Picture], path: &Path) -> Result<()> {
    let kept = all.len().min(MOST);
    let shown: Vec<&Picture> =
        (0..kept).map(|i| &all[i * (all.len() - 1) / (kept - 1).max(1)]).collect();
    let Some(first) = shown.first().filter(|_| shown.iter().all(|p| !p.values.is_empty())) else {
        return Err(Error::axis("pictures of a series with values", shown.len(), "at least one"));
    };
    let down = kept.div_ceil(ACROSS);
    let across = kept.div_ceil(down);
    let width = ((WIDE - GAP * (across - 1)) / across).min(LARGEST);
    let height = ((width as f64 * first.aspect.clamp(0.1, 10.0)) as usize).max(60);
    let (cell, line) = (width + GAP, height + CAPTION + GAP);
    let left = 40;
    // Titles need some width even above one map.
    let whole = (left + across * cell + BAR).max(900);
    let mut canvas = Canvas::new(whole, HEAD + down * line + FOOT);
    let values = || shown.iter().flat_map(|p| p.values.iter().copied());
    let ends = first.range.unwrap_or_else(|| range(values()));
    let colour = |v: f64| first.palette.colour((v - ends[0]) / (ends[1] - ends[0]));
    canvas.text(title, (left as i32, 24), 27.0, INK, HPos::Left, VPos::Top)?;
    let few = if kept < all.len() {
        format!(" · {kept} of {} times shown", all.len())
    } else {
        String::new()
    };
    let subtitle = format!("{subtitle}{few}");
    canvas.text(&subtitle, (left as i32, 60), 16.0, GREY, HPos::Left, VPos::Top)?;
    for (i, picture) in shown.iter().enumerate() {
        let (x, y) = (left + (i % across) * cell, HEAD + (i / across) * line);
        canvas.text(&picture.title, (x as i32, y as i32 + 4), 17.0, INK, HPos::Left, VPos::Top)?;
        let y = y + CAPTION;
        let share = |i: usize, n: usize| (i as f64 + 0.5) / n as f64;
        for row in 0..height {
            for col in 0..width {
                let v = picture.sample(share(col, width), share(row, height));
                canvas.put(x + col, y + row, if v.is_nan() { NO_DATA } else { colour(v) }, 1.0);
            }
        }
        let radius = if picture.marks.len() > 150 { 2.8 } else { 4.2 };
        for m in &picture.marks {
            let at = (x as f64 + m.x * width as f64, y as f64 + m.y * height as f64);
            mark(&mut canvas, at, radius, m.value.map(colour));
        }
        canvas.frame(x, y, width, height);
    }
    let tall = (down * line - CAPTION - GAP).min(420);
    let (x, top) = (left + across * cell + 8, HEAD + CAPTION);
    for y in 0..tall {
        canvas.fill(x, top + y, 18, 1, first.palette.colour(1.0 - (y as f64 + 0.5) / tall as f64));
    }
    canvas.frame(x, top, 18, tall);
    let step = nice((ends[1] - ends[0]) / (tall as f64 / 60.0).clamp(2.0, 6.0));
    for k in (ends[0] / step - 1e-9).ceil() as i64..=(ends[1] / step + 1e-9).floor() as i64 {
        let t = (k as f64 * step - ends[0]) / (ends[1] - ends[0]);
        let y = top + ((1.0 - t) * (tall - 1) as f64).round() as usize;
        canvas.fill(x + 18, y, 5, 1, GREY);
        let (at, text) = (((x + 28) as i32, y as i32), label(k as f64 * step, step));
        canvas.text(&text, at, 15.0, INK, HPos::Left, VPos::Center)?;
    }
    let foot = HEAD + down * line + 18;
    if let Some(metres) = first.metres_across {
        draw_scale(&mut canvas, (left, foot), width, metres)?;
    }
    if let Some(marked) = shown.iter().find(|p| !p.marks.is_empty()) {
        let at = ((left + across * cell - GAP) as i32, foot as i32 + 2);
        let wide = canvas.text(&first.legend, at, 15.0, INK, HPos::Right, VPos::Center)?;
        let filled = marked.marks[0].value.map(|_| first.palette.colour(0.6));
        mark(
            &mut canvas,
            (f64::from(at.0) - wide as f64 - 12.0, f64::from(at.1) + 0.5),
            4.0,
            filled,
        );
    }
    canvas.save(path)
}
