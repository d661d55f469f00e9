//! Sines of random amplitude and phase: the regression task of meta-learning.
//!
//! Source: Finn et al. (2017), arXiv:1703.03400, section 5.1.

use serde::{Deserialize, Serialize};

use super::{Entry, Prior, Rule, Surface, hyper::Law};
use crate::{error::Result, rng::Stream, settings};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    name: "sine",
    about: "sines of random amplitude and phase (Finn et al. 2017, arXiv:1703.03400)",
    build,
    tiny: "noise_sd = 0.1",
};

/// Settings.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sine {
    /// Amplitude, link scale.
    pub amplitude: Law,
    /// Phase, radians.
    pub phase: Law,
    /// Radians per region unit.
    pub frequency: Law,
    /// Standard deviation of the noise, link scale.
    pub noise_sd: Law,
}

impl Default for Sine {
    fn default() -> Self {
        Sine {
            amplitude: Law::uniform(0.1, 5.0),
            phase: Law::uniform(0.0, std::f64::consts::PI),
            frequency: Law::Fixed(1.0),
            noise_sd: Law::Fixed(0.0),
        }
    }
}

fn build(table: &toml::Table) -> Result<Box<dyn Prior>> {
    let prior: Sine = settings::parse_table("[prior]", table)?;
    prior.amplitude.check("amplitude", true)?;
    prior.phase.check("phase", false)?;
    prior.frequency.check("frequency", true)?;
    if prior.noise_sd != Law::Fixed(0.0) {
        prior.noise_sd.check("noise_sd", true)?;
    }
    Ok(Box::new(prior))
}

impl Prior for Sine {
    fn rule(&self, rng: &mut Stream) -> Rule {
        let nugget = self.noise_sd.draw(rng).powi(2);
        Rule { kernel: None, nugget, mean: 0.0, class: None }
    }

    /// Waves along the first axis.
    fn surfaces(
        &self,
        xy: &[[f64; 2]],
        count: usize,
        rng: &mut Stream,
    ) -> Result<Vec<(Rule, Surface)>> {
        let one = |rng: &mut Stream| {
            let rule = self.rule(rng);
            let (amplitude, phase) = (self.amplitude.draw(rng), self.phase.draw(rng));
            let frequency = self.frequency.draw(rng);
            let latent: Vec<f64> =
                xy.iter().map(|p| amplitude * (frequency * p[0] - phase).sin()).collect();
            let noisy = latent.iter().map(|v| v + rule.nugget.sqrt() * rng.normal()).collect();
            (rule, Surface { latent, noisy })
        };
        Ok((0..count).map(|_| one(rng)).collect())
    }
}
