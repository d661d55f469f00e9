//! One simulated case: what is seen, what is asked, what is true, and the process that made it.

use candle_core::{Device, Tensor};

use super::case::{Case, Layout, Surface};
use crate::{
    baseline::{NearestGp, sequential},
    error::{Error, Result},
    likelihood::Likelihood,
    predictive::Predictive,
    prior::lattice::Lattice,
    process::{Memory, Posterior, Process},
    rng::Stream,
    sites::{Observations, Sites, mean_sd, unit_box},
    task::continent::Continent,
};

/// What is true at a target that is scored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Truth {
    /// Which target.
    pub target: usize,
    /// The surface, link scale.
    pub surface: f64,
    /// The surface plus the nugget, link scale.
    pub noisy: f64,
    /// What is observed: a value, or a count.
    pub y: f64,
    /// People tested; 1 for values.
    pub trials: f64,
}

/// A frame that observations are seen in: region units and outcome as they are, or model units and a
/// standardised outcome.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Frame {
    centre: [f64; 2],
    unit: f64,
    /// Mean and sd of the outcome.
    pub level: [f64; 2],
}

/// One drawn case.
#[derive(Debug)]
pub struct Drawn {
    /// Context sites, region units.
    pub xy: Vec<[f64; 2]>,
    /// What was observed there.
    y: Vec<f64>,
    trials: Option<Vec<f64>>,
    /// Places that are asked, region units.
    pub asked: Vec<[f64; 2]>,
    /// What is true at some of them, in their order.
    pub truths: Vec<Truth>,
    /// The surface on a lattice, `[row][column]`, with its columns and rows, and whether each node was
    /// hidden; where it was drawn on one.
    pub whole: Option<(Vec<f64>, [usize; 2], Vec<bool>)>,
    /// Half-sides of the region.
    pub half: [f64; 2],
}

/// Sites and targets before anything is drawn at them.
struct Laid {
    xy: Vec<[f64; 2]>,
    asked: Vec<[f64; 2]>,
    /// Which of the asked are scored.
    scored: Vec<usize>,
    half: [f64; 2],
}

impl Drawn {
    /// Draws `case` with about `context` sites: exactly so many, but on lattices, where it is the
    /// nearest number that fits.
    ///
    /// # Errors
    /// [`Error::Input`] for fewer than 3 sites, and those of drawing.
    pub fn new(case: &Case, context: usize, seed: u64) -> Result<Self> {
        if context < 3 {
            return Err(Error::input("a case needs three sites at the least")
                .fact("sites", context)
                .try_this("for example --sites 1000"));
        }
        let stream = |purpose| Stream::new(seed, purpose, context as u64);
        match &case.sites {
            Layout::Lattice { aspect, gaps, hidden } => {
                let nodes = context as f64 / (1.0 - hidden);
                let cols = (nodes / aspect).sqrt().round().max(2.0) as usize;
                let rows = (nodes / cols as f64).round().max(2.0) as usize;
                let step = 2.0 / (cols - 1) as f64;
                let half = [1.0, 0.5 * step * (rows - 1) as f64];
                let at = |i: usize| [0, 1].map(|d| step * [i % cols, i / cols][d] as f64 - half[d]);
                let places: Vec<[f64; 2]> = (0..cols * rows).map(at).collect();
                let mask = gaps.hide([cols, rows], *hidden, &mut stream("scale gaps"))?;
                let mut rng = stream("scale surface");
                let kernel = case.surface.kernel();
                let latent = match case.surface.varies == 1.0 {
                    true => {
                        let [surface, _] =
                            Lattice::new(&*kernel, [cols, rows], [step, step])?.draw(&mut rng);
                        surface
                    }
                    // No torus knows a surface that is not stationary.
                    false => sequential::draw(&*kernel, &places, sequential::NEIGHBOURS, &mut rng),
                };
                let (under, open): (Vec<usize>, Vec<usize>) =
                    (0..mask.len()).partition(|i| mask[*i]);
                let pick = |which: &[usize]| which.iter().map(|i| places[*i]).collect();
                let scored = (0..under.len()).collect();
                let laid = Laid { xy: pick(&open), asked: pick(&under), scored, half };
                let order: Vec<f64> = open.iter().chain(&under).map(|i| latent[*i]).collect();
                let mut drawn = Self::observed(case, laid, &order, &mut stream("scale noise"))?;
                let whole = (0..latent.len()).map(|i| latent[i] + case.surface.mean(places[i]));
                drawn.whole = Some((whole.collect(), [cols, rows], mask));
                Ok(drawn)
            }
            layout => {
                let laid = scattered(layout, context, &mut stream("scale sites"))?;
                let drawn = laid.scored.iter().map(|i| laid.asked[*i]);
                let places: Vec<[f64; 2]> = laid.xy.iter().copied().chain(drawn).collect();
                let (kernel, most) = (case.surface.kernel(), sequential::NEIGHBOURS);
                let latent =
                    sequential::draw(&*kernel, &places, most, &mut stream("scale surface"));
                Self::observed(case, laid, &latent, &mut stream("scale noise"))
            }
        }
    }

    /// Observes a surface drawn at the sites and then at the scored targets.
    fn observed(case: &Case, laid: Laid, latent: &[f64], rng: &mut Stream) -> Result<Self> {
        let (likelihood, surface) = (case.likelihood()?, &case.surface);
        let mut see = |latent: f64, place: [f64; 2]| {
            let level = surface.mean(place) + latent;
            let noisy = level + surface.nugget.sqrt() * rng.normal();
            let trials = case.trials.map_or(1.0, |[least, most]| {
                (least + rng.below((most - least + 1) as usize) as u64) as f64
            });
            Truth {
                target: 0,
                surface: level,
                noisy,
                y: likelihood.observe(noisy, trials, rng),
                trials,
            }
        };
        let (here, there) = latent.split_at(laid.xy.len());
        let seen: Vec<Truth> =
            here.iter().zip(&laid.xy).map(|(v, place)| see(*v, *place)).collect();
        let truth =
            |(v, target): (&f64, &usize)| Truth { target: *target, ..see(*v, laid.asked[*target]) };
        let truths = there.iter().zip(&laid.scored).map(truth).collect();
        let trials = likelihood.counts().then(|| seen.iter().map(|t| t.trials).collect());
        Ok(Drawn {
            y: seen.iter().map(|t| t.y).collect(),
            trials,
            xy: laid.xy,
            asked: laid.asked,
            truths,
            whole: None,
            half: laid.half,
        })
    }

    /// What was observed at each site, outcome units: values, or the share that was positive.
    pub fn shares(&self) -> Vec<f64> {
        match &self.trials {
            Some(trials) => self.y.iter().zip(trials).map(|(y, n)| y / n).collect(),
            None => self.y.clone(),
        }
    }

    /// The frame that a map would have: the context's box becomes [−1, 1], values are standardised.
    ///
    /// # Errors
    /// [`Error::Input`] for sites that span no box.
    pub fn frame(&self) -> Result<Frame> {
        let (centre, unit) = unit_box(&self.xy)
            .ok_or_else(|| Error::input("the sites span no box").fact("sites", self.xy.len()))?;
        let (mean, sd) = if self.trials.is_some() { (0.0, 1.0) } else { mean_sd(&self.y) };
        Ok(Frame { centre, unit, level: [mean, sd] })
    }

    /// What was seen.
    pub fn context(&self, frame: &Frame) -> Result<Observations> {
        let n = self.xy.len();
        let [mean, sd] = frame.level;
        let y = self.y.iter().map(|y| ((y - mean) / sd) as f32).collect();
        let y = Tensor::from_vec::<_, f32>(y, (1, n, 1), &Device::Cpu)?;
        let trials = self.trials.as_ref().map(|trials| {
            let trials: Vec<f32> = trials.iter().map(|n| *n as f32).collect();
            Tensor::from_vec(trials, (1, n), &Device::Cpu)
        });
        Observations::new(frame.sites(&self.xy)?, y, trials.transpose()?)
    }
}

impl Frame {
    /// The frame of the truth: region units, the outcome as it is.
    pub const fn plain() -> Self {
        Frame { centre: [0.0; 2], unit: 1.0, level: [0.0, 1.0] }
    }

    /// Places of the region.
    pub fn sites(&self, xy: &[[f64; 2]]) -> Result<Sites> {
        let to = |p: &[f64; 2]| [0, 1].map(|d| (p[d] - self.centre[d]) / self.unit);
        Sites::plane(&xy.iter().map(to).collect::<Vec<_>>(), &Device::Cpu)
    }
}

fn scattered(layout: &Layout, context: usize, rng: &mut Stream) -> Result<Laid> {
    match layout {
        Layout::Lattice { .. } => unreachable!("lattices are laid out by themselves"),
        Layout::Square { targets, per_square } => {
            let half = per_square.map_or(1.0, |n| (context as f64 / n as f64).sqrt());
            let mut places = |n: usize| -> Vec<[f64; 2]> {
                (0..n).map(|_| [(); 2].map(|()| rng.uniform(-half, half))).collect()
            };
            let (xy, asked) = (places(context), places(*targets));
            Ok(Laid { xy, scored: (0..asked.len()).collect(), asked, half: [half; 2] })
        }
        Layout::Continent { pixels, scored } => {
            let continent = Continent::draw(rng)?;
            let xy = continent.survey(context, rng);
            let side = (*pixels as f64).sqrt().round().max(2.0) as usize;
            let at = |i: usize| 2.0 * (i as f64 + 0.5) / side as f64 - 1.0;
            let pixel = |i: usize| [at(i % side), at(i / side)];
            let asked: Vec<[f64; 2]> = (0..side * side).map(pixel).collect();
            let mut land: Vec<usize> =
                (0..asked.len()).filter(|i| continent.is_land(asked[*i])).collect();
            // A random part, in the order of the pixels.
            let chosen = rng.permutation(land.len());
            let mut part: Vec<usize> = chosen.iter().take(*scored).map(|i| land[*i]).collect();
            part.sort_unstable();
            land = part;
            Ok(Laid { xy, asked, scored: land, half: [1.0; 2] })
        }
    }
}

/// The process that made a case, with its own parameters: the floor. Reads the plain frame.
pub struct Floor {
    gp: NearestGp,
    surface: Surface,
}

impl Floor {
    /// The floor of a case: nearest neighbours, told kernel, nugget, mean and trend.
    ///
    /// # Errors
    /// Those of [`NearestGp::new`].
    pub fn new(case: &Case, likelihood: &'static dyn Likelihood) -> Result<Self> {
        let surface = case.surface.clone();
        // Counts are read through their mean; values less their mean have none.
        let mean = if likelihood.counts() { surface.mean } else { 0.0 };
        let gp = NearestGp::new(surface.kernel(), surface.nugget, mean, likelihood)?;
        Ok(Floor { gp: gp.neighbours(30, case.near), surface })
    }

    /// The mean at sites `[batch, site, 2]`, where the process does not know it: `[batch, site, 1]`.
    fn trend(&self, s: &Tensor) -> Result<Tensor> {
        let [east, north] = self.surface.trend;
        let (x, y) = (s.narrow(2, 0, 1)?, s.narrow(2, 1, 1)?);
        let slope = ((x * east)? + (y * north)?)?;
        Ok((slope + (self.surface.mean - self.gp.mean))?)
    }
}

impl Process for Floor {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        // Counts have no trend here: a test says that no case of counts asks for one.
        let flat = match context.trials {
            Some(_) => context.clone(),
            None => {
                let y = (&context.y - self.trend(&context.sites.s)?)?;
                Observations { y, ..context.clone() }
            }
        };
        Ok(Box::new(Flat { floor: self, inner: self.gp.condition(&flat)? }))
    }

    fn memory(&self, sites: usize) -> Memory {
        self.gp.memory(sites)
    }
}

/// A posterior of what is left of the trend.
struct Flat<'a> {
    floor: &'a Floor,
    inner: Box<dyn Posterior + 'a>,
}

impl Posterior for Flat<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        let flat = self.inner.at(targets)?;
        let mean = (&flat.mean + self.floor.trend(&targets.s)?)?;
        Ok(Predictive { mean, ..flat })
    }
}
