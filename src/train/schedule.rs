//! The learning rate over a training: linear warm-up, then a cosine to a fraction of the peak.

/// Rate at `step` of `steps`.
///
/// ```
/// use isopleth::train::schedule::rate;
/// assert_eq!(rate(0, 100, 0, 1e-3, 0.01), 1e-3);
/// assert!((rate(50, 100, 0, 1e-3, 0.01) - 5.05e-4).abs() < 1e-9);
/// assert!((rate(100, 100, 0, 1e-3, 0.01) - 1e-5).abs() < 1e-12);
/// assert!((rate(5, 100, 10, 1e-3, 0.01) - 6e-4).abs() < 1e-12);
/// ```
pub fn rate(step: u64, steps: u64, warmup: u64, peak: f64, last: f64) -> f64 {
    if step < warmup {
        return peak * (step + 1) as f64 / warmup as f64;
    }
    let share = (step - warmup) as f64 / (steps.saturating_sub(warmup)).max(1) as f64;
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * share.min(1.0)).cos());
    peak * (last + (1.0 - last) * cosine)
}
