//! What the years before are worth: simulated surveys of five rounds of 60 villages each, foretold at
//! villages of the last round that were held out.
//!
//! ```text
//! cargo run --release --example space_time [SURVEYS] [CHECKPOINT]
//! ```
//!
//! Surfaces come from a Gaussian process that changes with time, of which some stay as they are and some
//! are another in every round; each round visits other villages. The same Gaussian process is fitted in three
//! ways: to all rounds with their times, to all rounds as if they were one, and to the last round
//! alone. A checkpoint that reads time (`models/prevalence-st.safetensors`) stands beside them if it is given.

use candle_core::{Device, Tensor};
use isopleth::{
    Observations, Of, Process, Result, Sites, Stream,
    baseline::{ExactGp, NearestGp},
    checkpoint::Checkpoint,
    likelihood,
    prior::{self, Prior},
    score::{Forecast, SCORES, Summary, Truth, forecasts},
};

const ROUNDS: usize = 5;
const VILLAGES: usize = 60;
const HELD: usize = 40;
const TESTED: f64 = 50.0;

/// Length scales of 0.15 to 1 of the region's half-side; in time, of a tenth to three times the span of
/// all rounds; and any share that stays.
const PRIOR: &str = "kind = 'gp'\nlength_scale = { log-uniform = [0.15, 1.0] }\nsill_sd = { uniform = [0.7, 1.3] }\n\
    nugget_sd = { uniform = [0.2, 0.6] }\nnugget_absent = 0.0\nmean = { normal = [-1.3, 0.7] }\nsum = 0.0\n\
    product = 0.0\nanisotropic = 0.0\ntime_scale = { log-uniform = [0.2, 6.0] }\n\
    static_share = { uniform = [0.0, 1.0] }\n\
    kernels = { 'matern-1/2' = 1, 'matern-3/2' = 1 }";

/// A survey: villages round by round, and those of the last round that are held out behind them.
struct Country {
    xy: Vec<[f64; 2]>,
    t: Vec<f64>,
    positive: Vec<f64>,
}

fn country(prior: &dyn Prior, seed: u64) -> Result<Country> {
    let mut rng = Stream::new(seed, "country", 0);
    let n = ROUNDS * VILLAGES + HELD;
    let xy: Vec<[f64; 2]> =
        (0..n).map(|_| [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)]).collect();
    let round = |i: usize| (i / VILLAGES).min(ROUNDS - 1);
    let t: Vec<f64> = (0..n).map(|i| 2.0 * round(i) as f64 / (ROUNDS - 1) as f64 - 1.0).collect();
    let (_, surface) = prior.surfaces_in_time(&xy, &t, 1, &mut rng)?.swap_remove(0);
    let count = |eta: &f64| rng.binomial(TESTED as u64, 1.0 / (1.0 + (-eta).exp())) as f64;
    let positive = surface.noisy.iter().map(count).collect();
    Ok(Country { xy, t, positive })
}

impl Country {
    /// Sites `from … to`, with their times if these are to be `read`.
    fn sites(&self, from: usize, to: usize, read: bool) -> Result<Sites> {
        let t: Vec<f32> = self.t[from..to].iter().map(|t| *t as f32).collect();
        let t = Tensor::from_vec(t, (1, to - from, 1), &Device::Cpu)?;
        Ok(Sites { t: read.then_some(t), ..Sites::plane(&self.xy[from..to], &Device::Cpu)? })
    }

    fn seen(&self, from: usize, to: usize, read: bool) -> Result<Observations> {
        let y: Vec<f32> = self.positive[from..to].iter().map(|k| *k as f32).collect();
        let y = Tensor::from_vec(y, (1, to - from, 1), &Device::Cpu)?;
        let tested = Tensor::full(TESTED as f32, (1, to - from), &Device::Cpu)?;
        Observations::new(self.sites(from, to, read)?, y, Some(tested))
    }

    /// What a process that saw sites `from …` says of the held-out villages.
    fn met(&self, process: &dyn Process, from: usize, read: bool) -> Result<Vec<Forecast>> {
        let first = ROUNDS * VILLAGES;
        let posterior = process.condition(&self.seen(from, first, read)?)?;
        let asked = self.sites(first, first + HELD, read)?;
        let truths: Vec<Truth> = self.positive[first..]
            .iter()
            .map(|k| Truth::Count { positive: *k as u64, tested: TESTED as u64 })
            .collect();
        forecasts(&posterior.at(&asked)?.marginals(0, Of::Observation)?, &truths)
    }
}

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let surveys: u64 = words.next().and_then(|w| w.parse().ok()).unwrap_or(30);
    let checkpoint = words.next().map(|file| Checkpoint::open(file.as_ref())).transpose()?;
    let network = checkpoint.map(|c| c.process(&Device::Cpu)).transpose()?;
    let prior = prior::build(&PRIOR.parse().expect("written above"))?;
    let binomial = likelihood::find("binomial")?;
    let last = (ROUNDS - 1) * VILLAGES;
    let mut names = vec!["with time", "with time, vecchia", "pooled", "last round alone"];
    names.extend(network.iter().map(|_| "with time, network"));
    let mut all: Vec<Vec<Vec<Forecast>>> = vec![Vec::new(); names.len()];
    for seed in 1..=surveys {
        let country = country(&*prior, seed)?;
        let fit = |from: usize, read: bool| -> Result<Vec<Forecast>> {
            let seen = country.seen(from, ROUNDS * VILLAGES, read)?;
            country.met(&ExactGp::fit(&seen, binomial)?, from, read)
        };
        let near = NearestGp::fit(&country.seen(0, ROUNDS * VILLAGES, true)?, binomial)?;
        let mut met =
            vec![fit(0, true)?, country.met(&near, 0, true)?, fit(0, false)?, fit(last, false)?];
        if let Some(network) = &network {
            met.push(country.met(&**network, 0, true)?);
        }
        all.iter_mut().zip(met).for_each(|(all, met)| all.push(met));
    }
    // Surveys are the units of chance.
    let log = SCORES.iter().find(|s| s.name == "log-score").expect("registered");
    let means = |of: &[Vec<Forecast>]| -> Vec<f64> { of.iter().map(|met| log.over(met)).collect() };
    let spread = |v: &[f64]| {
        let (mean, sd) = isopleth::sites::mean_sd(v);
        (mean, sd / ((v.len() - 1).max(1) as f64).sqrt())
    };
    println!("{surveys} surveys, {HELD} villages of the last round held out in each");
    println!(
        "{:<22}{:>12}{:>22}{:>7}{:>7}{:>7}",
        "", "log score", "less `with time`", "50 %", "80 %", "95 %"
    );
    let first = means(&all[0]);
    for (name, of) in names.iter().zip(&all) {
        let own = means(of);
        let gaps: Vec<f64> = own.iter().zip(&first).map(|(a, b)| a - b).collect();
        let ((mean, _), (gap, error)) = (spread(&own), spread(&gaps));
        let s = Summary::of(&of.concat()).coverage;
        println!(
            "{name:<22}{mean:>12.3}{:>22}{:>7.2}{:>7.2}{:>7.2}",
            format!("{gap:+.3} ± {error:.3}"),
            s.at_50,
            s.at_80,
            s.at_95
        );
    }
    Ok(())
}
