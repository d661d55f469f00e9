//! Sawtooth waves: straight ramps with sudden falls, which no Gaussian process foretells.
//!
//! Source: Gordon et al. (2020), arXiv:1910.13556, for the sum of sines; Bruinsma et al. (2023),
//! arXiv:2303.14468, and the code of `neuralprocesses` for the exact wave.

use std::f64::consts::{PI, TAU};

use serde::{Deserialize, Serialize};

use super::{Entry, Prior, Rule, Surface, hyper::Law};
use crate::{
    error::{Error, Result},
    rng::Stream,
    settings,
};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    name: "sawtooth",
    about: "sawtooth waves, exact or as a sum of sines (arXiv:1910.13556, arXiv:2303.14468)",
    build,
    tiny: "frequency = { uniform = [2.0, 4.0] }\nnoise_sd = 0.1",
};

/// Settings.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sawtooth {
    /// Waves per region unit.
    pub frequency: Law,
    /// Fewest and most sines in the sum; [0, 0] for the exact wave, rising from 0 to 1.
    pub harmonics: [usize; 2],
    /// Standard deviation of the noise, link scale.
    pub noise_sd: Law,
}

impl Default for Sawtooth {
    fn default() -> Self {
        Sawtooth { frequency: Law::uniform(2.0, 4.0), harmonics: [0; 2], noise_sd: Law::Fixed(0.0) }
    }
}

fn build(table: &toml::Table) -> Result<Box<dyn Prior>> {
    let prior: Sawtooth = settings::parse_table("[prior]", table)?;
    prior.frequency.check("frequency", true)?;
    if prior.noise_sd != Law::Fixed(0.0) {
        prior.noise_sd.check("noise_sd", true)?;
    }
    if prior.harmonics[0] > prior.harmonics[1] {
        return Err(Error::input("`harmonics` has an empty range")
            .fact("written", format!("{:?}", prior.harmonics))
            .try_this("write the smaller number first, or [0, 0] for the exact wave"));
    }
    Ok(Box::new(prior))
}

/// The exact wave: 0 at whole numbers, rising to 1.
///
/// ```
/// use isopleth::prior::sawtooth::{exact, series};
/// assert!((exact(2.25) - 0.25).abs() < 1e-12);
/// assert!((exact(-0.25) - 0.75).abs() < 1e-12);
/// // Many sines come close to a wave of the same period, half a period later.
/// assert!((series(2.0, 0.1, 5000) - exact(2.0 * 0.1 + 0.5)).abs() < 1e-3);
/// ```
pub fn exact(turns: f64) -> f64 {
    turns - turns.floor()
}

/// `½ − (1/π) Σ (−1)ᵏ sin(2π k f x) / k`, k = 1 … `terms`.
pub fn series(frequency: f64, x: f64, terms: usize) -> f64 {
    let sum: f64 = (1..=terms)
        .map(|k| {
            let sign = if k % 2 == 0 { 1.0 } else { -1.0 };
            sign * (TAU * k as f64 * frequency * x).sin() / k as f64
        })
        .sum();
    0.5 - sum / PI
}

impl Prior for Sawtooth {
    fn rule(&self, rng: &mut Stream) -> Rule {
        let nugget = self.noise_sd.draw(rng).powi(2);
        Rule { kernel: None, nugget, mean: 0.5, class: None }
    }

    fn surfaces(
        &self,
        xy: &[[f64; 2]],
        count: usize,
        rng: &mut Stream,
    ) -> Result<Vec<(Rule, Surface)>> {
        // On a line the wave runs one way or the other; in the plane it runs anywhere.
        let line = xy.iter().all(|p| p[1] == 0.0);
        let one = |rng: &mut Stream| {
            let rule = self.rule(rng);
            let frequency = self.frequency.draw(rng);
            let turn = match line {
                true => PI * rng.below(2) as f64,
                false => rng.uniform(0.0, TAU),
            };
            let [low, high] = self.harmonics;
            let (terms, shift) = match high {
                0 => (0, rng.uniform(0.0, 1.0 / frequency)),
                _ => (low + rng.below(high - low + 1), rng.uniform(-5.0, 5.0)),
            };
            let latent: Vec<f64> = xy
                .iter()
                .map(|p| {
                    let along = p[0] * turn.cos() + p[1] * turn.sin();
                    match terms {
                        0 => exact(frequency * (along - shift)),
                        terms => series(frequency, along + shift, terms),
                    }
                })
                .collect();
            let noisy = latent.iter().map(|v| v + rule.nugget.sqrt() * rng.normal()).collect();
            (rule, Surface { latent, noisy })
        };
        Ok((0..count).map(|_| one(rng)).collect())
    }
}
