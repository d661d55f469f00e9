//! Processes whose sites stand elsewhere than they were recorded: by an expected covariance, where a
//! process has a kernel, or by places drawn for every site, for any process.
//!
//! Targets are known places, unless they are marked ([`displaced::mark`]) as displaced themselves:
//! then what is foretold is averaged over where they may stand.

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Tensor};

use crate::{
    error::{Error, Result},
    geo::displacement::{Displacement, Law},
    kernel::displaced::{mark, unmark},
    predictive::{Draws, Of, Predictive},
    process::{Memory, Posterior, Process},
    rng::Stream,
    score,
    sites::{Observations, Sites},
};

/// A process whose kernel knows marks ([`displaced`](crate::kernel::displaced)): its context is
/// marked, and its targets are where they are.
pub struct Expected {
    inner: Box<dyn Process + Send + Sync>,
    displacement: Displacement,
}

/// Contexts that a posterior is made of.
pub const COPIES: usize = 16;
/// Rounds before the first of them.
const BEFORE: usize = 3;
/// Parts of the context, each placed given the others.
const PARTS: usize = 5;
/// Places that a site chooses between.
const PLACES: usize = 8;
/// Places that stand for those of a displaced target, for each of [`COPIES`] of the context.
const TARGETS: usize = 4;

/// Any process, conditioned on several copies of its context: in each, every site stands at a place
/// drawn from the law of where it may stand given what was seen. Its posterior is their mixture.
///
/// Places are drawn round by round: the context is parted at random, and each site of a part chooses
/// between its place and seven drawn from its law, by how well the process, conditioned on the other
/// parts, foretells there what was seen (Gibbs sampling, with choices as in Andrieu, Doucet &
/// Holenstein 2010, doi:10.1111/j.1467-9868.2009.00736.x). Two approximations: sites of one part
/// do not see each other, and a process that is no exact Bayesian foretells as it does.
pub struct Placed {
    inner: Box<dyn Process + Send + Sync>,
    displacement: Displacement,
    /// Seed of the places; nothing where the process has learned from displaced sites.
    seed: Option<u64>,
}

struct Marked<'a>(Box<dyn Posterior + 'a>);

struct Mixed<'a> {
    members: Vec<Box<dyn Posterior + 'a>>,
    /// Where targets of each law may stand, for each member: `[member][place][law]`.
    offsets: Vec<Vec<Vec<[f64; 2]>>>,
}

impl Expected {
    /// `displacement` in model units, of the context's sites.
    pub fn new(inner: Box<dyn Process + Send + Sync>, displacement: Displacement) -> Self {
        Expected { inner, displacement }
    }
}

/// A context whose sites are marked, as a kernel of displaced sites reads them.
///
/// # Errors
/// As [`mark`].
pub fn marked(context: &Observations, displacement: &Displacement) -> Result<Observations> {
    Ok(Observations { sites: mark(&context.sites, displacement)?, ..context.clone() })
}

impl Process for Expected {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        let context = marked(context, &self.displacement)?;
        Ok(Box::new(Marked(self.inner.condition(&context)?)))
    }

    fn memory(&self, sites: usize) -> Memory {
        self.inner.memory(sites)
    }
}

/// Targets with a mark: their own, or that of a known place.
fn known(targets: &Sites) -> Result<Sites> {
    if targets.s.dims()[2] > 2 {
        return Ok(targets.clone());
    }
    let none = targets.s.narrow(2, 0, 1)?.zeros_like()?;
    Ok(Sites { s: Tensor::cat(&[&targets.s, &none], 2)?, ..targets.clone() })
}

impl Posterior for Marked<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        self.0.at(&known(targets)?)
    }

    fn joint(&self, targets: &Sites, of: Of, values: &Tensor) -> Result<Option<Tensor>> {
        self.0.joint(&known(targets)?, of, values)
    }

    fn draws(&self, targets: &Sites, n: usize, rng: &mut Stream) -> Result<Draws> {
        self.0.draws(&known(targets)?, n, rng)
    }
}

impl Placed {
    /// `displacement` in model units, of the context's sites; `seed` names the places drawn.
    pub fn new(
        inner: Box<dyn Process + Send + Sync>,
        displacement: Displacement,
        seed: u64,
    ) -> Self {
        Placed { inner, displacement, seed: Some(seed) }
    }

    /// A process that has learned from displaced sites: it takes the context as recorded. `displacement`
    /// is that of targets, where these are marked.
    pub fn learned(inner: Box<dyn Process + Send + Sync>, displacement: Displacement) -> Self {
        Placed { inner, displacement, seed: None }
    }

    /// Sites recorded at one place under one law: they were displaced together.
    fn clusters(&self, recorded: &[[f64; 2]]) -> Vec<Vec<usize>> {
        let mut at: BTreeMap<([u64; 2], usize), usize> = BTreeMap::new();
        let mut clusters: Vec<Vec<usize>> = Vec::new();
        for (i, (place, law)) in recorded.iter().zip(&self.displacement.of).enumerate() {
            let new = clusters.len();
            let known = *at.entry((place.map(f64::to_bits), *law)).or_insert(new);
            if known == new {
                clusters.push(Vec::new());
            }
            clusters[known].push(i);
        }
        clusters
    }

    /// Where each site may stand, in [`COPIES`] ways: `[copy][site]`.
    fn places(&self, context: &Observations) -> Result<Vec<Vec<[f64; 2]>>> {
        let (recorded, _) = unmark(&context.sites)?;
        let Some(seed) = self.seed else { return Ok(vec![recorded]) };
        let n = recorded.len();
        if n != self.displacement.of.len() {
            return Err(Error::axis(
                "sites and their displacements",
                n,
                self.displacement.of.len(),
            ));
        }
        let device = context.y.device();
        let mut rng = Stream::new(seed, "places", 0);
        let clusters = self.clusters(&recorded);
        let drawn = |cluster: &[usize], rng: &mut Stream| {
            let i = cluster[0];
            let d = self.displacement.laws[self.displacement.of[i]].draw(rng);
            [recorded[i][0] + d[0], recorded[i][1] + d[1]]
        };
        let mut here = recorded.clone();
        for cluster in &clusters {
            let place = drawn(cluster, &mut rng);
            cluster.iter().for_each(|i| here[*i] = place);
        }
        let host = |x: &Tensor| -> Result<Vec<f64>> {
            Ok(x.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?)
        };
        let (y, trials) = (host(&context.y)?, context.trials.as_ref().map(host).transpose()?);
        let (parts, timed) = (PARTS.min(clusters.len()), context.sites.t.is_some());
        let mut copies = Vec::with_capacity(COPIES);
        for round in 0..BEFORE + COPIES {
            let order = rng.permutation(clusters.len());
            for part in 0..parts {
                let (asked, others): (Vec<usize>, Vec<usize>) =
                    (0..clusters.len()).partition(|at| at % parts == part);
                let asked: Vec<&Vec<usize>> =
                    asked.iter().map(|at| &clusters[order[*at]]).collect();
                let others = others.iter().flat_map(|at| clusters[order[*at]].iter().copied());
                let mut others: Vec<usize> = others.collect();
                others.sort_unstable(); // the survey's order, whatever the part
                if others.is_empty() {
                    continue;
                }
                let places: Vec<[f64; 2]> = asked
                    .iter()
                    .flat_map(|cluster| {
                        let new: Vec<_> = (1..PLACES).map(|_| drawn(cluster, &mut rng)).collect();
                        [vec![here[cluster[0]]], new].concat()
                    })
                    .collect();
                let posterior = self.inner.condition(&placed(context, &here, Some(&others))?)?;
                // A place is asked about at the time of each visit to it.
                let visits = |cluster: &[usize]| if timed { cluster.len() } else { 1 };
                let (mut there, mut then) = (Vec::new(), Vec::new());
                for (cluster, places) in asked.iter().zip(places.chunks_exact(PLACES)) {
                    for place in places {
                        for i in &cluster[..visits(cluster)] {
                            there.push(*place);
                            then.push(*i as u32);
                        }
                    }
                }
                let s = Sites::plane(&there, device)?.s.to_dtype(context.sites.s.dtype())?;
                let then = Tensor::new(then, device)?;
                let t = context.sites.t.as_ref().map(|t| t.contiguous()?.index_select(&then, 1));
                let at = Sites { t: t.transpose()?, ..Sites::new(s) };
                let said = posterior.at(&at)?.marginals(0, Of::Observation)?;
                let mut from = 0;
                for (k, cluster) in asked.iter().enumerate() {
                    let told = |place: usize| -> f64 {
                        let first = from + place * visits(cluster);
                        let one = |(visit, i): (usize, &usize)| {
                            let at = first + if timed { visit } else { 0 };
                            match &trials {
                                Some(trials) => score::log_count(&said, at, y[*i], trials[*i]),
                                None => said.link_log_density(at, y[*i]),
                            }
                        };
                        cluster.iter().enumerate().map(one).sum()
                    };
                    let log: Vec<f64> = (0..PLACES).map(told).collect();
                    from += PLACES * visits(cluster);
                    let place = places[k * PLACES + chosen(&log, rng.unit())];
                    cluster.iter().for_each(|i| here[*i] = place);
                }
            }
            if round >= BEFORE {
                copies.push(here.clone());
            }
        }
        Ok(copies)
    }
}

/// A position, with chances in the ratio of the exponentials of `log`.
fn chosen(log: &[f64], unit: f64) -> usize {
    let top = log.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = log.iter().map(|l| (l - top).exp()).sum();
    let mut left = unit * total;
    let found = log.iter().position(|l| {
        left -= (l - top).exp();
        left < 0.0
    });
    found.unwrap_or(0)
}

/// The context with its sites at other places; some of its sites alone.
fn placed(
    context: &Observations,
    places: &[[f64; 2]],
    some: Option<&[usize]>,
) -> Result<Observations> {
    let device: &Device = context.y.device();
    let Some(some) = some else {
        let s = Sites::plane(places, device)?.s.to_dtype(context.sites.s.dtype())?;
        return Ok(Observations { sites: Sites { s, ..context.sites.clone() }, ..context.clone() });
    };
    let index: Vec<u32> = some.iter().map(|i| *i as u32).collect();
    let index = Tensor::from_vec(index, some.len(), device)?;
    let pick = |x: &Tensor| -> Result<Tensor> { Ok(x.contiguous()?.index_select(&index, 1)?) };
    let here: Vec<[f64; 2]> = some.iter().map(|i| places[*i]).collect();
    let s = Sites::plane(&here, device)?.s.to_dtype(context.sites.s.dtype())?;
    Ok(Observations {
        sites: Sites { s, ..context.sites.map(pick)? },
        y: pick(&context.y)?,
        mask: pick(&context.mask)?,
        trials: context.trials.as_ref().map(pick).transpose()?,
    })
}

impl Process for Placed {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        let copies = self.places(context)?;
        let members =
            copies.iter().map(|places| self.inner.condition(&placed(context, places, None)?));
        let mut rng = Stream::new(self.seed.unwrap_or(1), "targets", 0);
        // As many in all, for one copy as for many.
        let each = TARGETS * COPIES / copies.len();
        let offsets = (0..copies.len())
            .map(|_| {
                let one = |rng: &mut Stream| -> Vec<[f64; 2]> {
                    self.displacement.laws.iter().map(|law: &Law| law.draw(rng)).collect()
                };
                (0..each).map(|_| one(&mut rng)).collect()
            })
            .collect();
        Ok(Box::new(Mixed { members: members.collect::<Result<_>>()?, offsets }))
    }

    fn memory(&self, sites: usize) -> Memory {
        let one = self.inner.memory(sites);
        if self.seed.is_none() {
            return one;
        }
        Memory {
            conditioning: one.conditioning + COPIES * one.held,
            held: COPIES * one.held,
            target: COPIES * one.target,
        }
    }
}

/// A mixture of equal shares: components side by side.
fn mixture(parts: &[Predictive]) -> Result<Predictive> {
    let [first, ..] = parts else {
        return Err(Error::input("a mixture has at least one part"));
    };
    let join = |of: &dyn Fn(&Predictive) -> Result<Tensor>| -> Result<Tensor> {
        let all = parts.iter().map(of).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&all, D::Minus1)?)
    };
    let lift = match parts.iter().any(|p| p.lift.is_some()) {
        true => Some(join(&|p| Ok(p.lift.clone().map_or_else(|| p.mean.zeros_like(), Ok)?))?),
        false => None,
    };
    Ok(Predictive {
        link: first.link,
        log_weight: (join(&|p| Ok(p.log_weight.clone()))? - (parts.len() as f64).ln())?,
        mean: join(&|p| Ok(p.mean.clone()))?,
        surface_sd: join(&|p| Ok(p.surface_sd.clone()))?,
        observation_sd: join(&|p| Ok(p.observation_sd.clone()))?,
        lift,
        law: None,
    })
}

impl Posterior for Mixed<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        let marked = targets.s.dims()[2] > 2;
        let mut parts = Vec::new();
        for (member, offsets) in self.members.iter().zip(&self.offsets) {
            if !marked {
                parts.push(member.at(targets)?);
                continue;
            }
            let (places, laws) = unmark(targets)?;
            for offsets in offsets {
                let moved: Vec<[f64; 2]> = places
                    .iter()
                    .zip(&laws)
                    .map(|([x, y], law)| match law.checked_sub(1).and_then(|l| offsets.get(l)) {
                        Some([dx, dy]) => [x + dx, y + dy],
                        None => [*x, *y],
                    })
                    .collect();
                let s = Sites::plane(&moved, targets.s.device())?.s;
                let s = s.to_dtype(targets.s.dtype())?;
                parts.push(member.at(&Sites { s, ..targets.clone() })?);
            }
        }
        mixture(&parts)
    }

    /// Each surface under one copy of the context, in an order that tells nothing.
    fn draws(&self, targets: &Sites, n: usize, rng: &mut Stream) -> Result<Draws> {
        let mut counts = vec![0; self.members.len()];
        (0..n).for_each(|_| counts[rng.below(self.members.len())] += 1);
        let mut parts = Vec::new();
        for (member, count) in self.members.iter().zip(counts).filter(|(_, count)| *count > 0) {
            parts.push(member.draws(targets, count, rng)?);
        }
        let Some(first) = parts.first() else {
            return Err(Error::input("no draws were asked for").try_this("ask for one at least"));
        };
        let values = Tensor::cat(&parts.iter().map(|p| &p.values).collect::<Vec<_>>(), 0)?;
        let order: Vec<u32> = rng.permutation(n).into_iter().map(|i| i as u32).collect();
        let order = Tensor::from_vec(order, n, values.device())?;
        Ok(Draws { link: first.link, values: values.index_select(&order, 0)? })
    }
}
