//! How survey sites are laid out, in region units: the region's longer half-side is 1 unless the
//! recipe says otherwise.

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    prior::hyper::{Law, check_share},
    rng::Stream,
};

/// A range of context sizes with its relative chance.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    /// Fewest and most sites.
    pub sites: [usize; 2],
    /// Every size equally likely, instead of every order of magnitude.
    #[serde(default)]
    pub uniform: bool,
    /// Relative chance of this range.
    pub weight: f64,
}

/// Laws of the survey design.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Design {
    /// Context sizes.
    pub context: Vec<Size>,
    /// Targets per task.
    pub targets: usize,
    /// Fewest targets: their number is drawn anew for every batch, `targets` being the most; 0 for
    /// always as many as `targets`.
    pub fewest_targets: usize,
    /// Most sites in all, context and targets, where the number of targets is drawn; 0 for no bound.
    pub most_sites: usize,
    /// Chance that sites cluster.
    pub clustered: f64,
    /// Chance that sites lie on a jittered grid.
    pub gridded: f64,
    /// Number of clusters.
    pub clusters: Law,
    /// Radius of a cluster, region units.
    pub cluster_radius: Law,
    /// Shorter over longer side of the region.
    pub aspect: Law,
    /// Chance that a whole neighbourhood of sites is held out, as in spatial block folds.
    pub held_block: f64,
    /// Share of targets close to a context site.
    pub near: f64,
    /// Share of targets anywhere in the region and a margin around it.
    pub anywhere: f64,
    /// Site coordinates on a line instead of the plane.
    pub line: bool,
    /// Longer half-side of the region.
    pub half_side: f64,
    /// How far the context's sites are moved along the first axis, after all else.
    pub shift_context: f64,
    /// The same for targets.
    pub shift_targets: f64,
    /// The farthest that context sites were moved before they were recorded, one number a survey, region
    /// units: a model that learns from such surveys integrates over the displacement of a real one.
    pub displacement: Law,
    /// When sites are visited; nothing for surveys of one time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub times: Option<Times>,
    /// Published benchmarks ask, beside this many sites of which the context is a part, …
    pub pool: usize,
    /// … a regular grid of this many targets (per axis) over the region, and nothing else.
    pub grid: usize,
}

impl Default for Design {
    fn default() -> Self {
        Design {
            context: vec![
                Size { sites: [3, 2000], uniform: false, weight: 0.2 },
                Size { sites: [15, 300], uniform: false, weight: 0.8 },
            ],
            targets: 64,
            fewest_targets: 0,
            most_sites: 0,
            clustered: 0.5,
            gridded: 0.1,
            clusters: Law::uniform(2.0, 25.0),
            cluster_radius: Law::log_uniform(0.02, 0.3),
            aspect: Law::uniform(0.3, 1.0),
            held_block: 0.35,
            near: 0.15,
            anywhere: 0.2,
            line: false,
            half_side: 1.0,
            shift_context: 0.0,
            shift_targets: 0.0,
            displacement: Law::Fixed(0.0),
            times: None,
            pool: 0,
            grid: 0,
        }
    }
}

/// Laws of when sites are visited: times span −1 to 1.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Times {
    /// Rounds of visits, evenly spread over the time.
    pub rounds: Law,
    /// Chance that there are no rounds, and visits are spread over the whole time.
    pub continuous: f64,
    /// Chance that rounds come at uneven steps.
    pub uneven: f64,
    /// Chance that every round visits the places of the first again.
    pub revisited: f64,
    /// Chance that targets are of the last round, or a time after it, and the context of those before.
    pub ahead: f64,
}

impl Default for Times {
    fn default() -> Self {
        Times {
            rounds: Law::uniform(0.5, 8.5),
            continuous: 0.15,
            uneven: 0.3,
            revisited: 0.25,
            ahead: 0.25,
        }
    }
}

impl Times {
    fn check(&self) -> Result<()> {
        self.rounds.check("rounds", true)?;
        for (name, share) in [
            ("continuous", self.continuous),
            ("uneven", self.uneven),
            ("revisited", self.revisited),
            ("ahead", self.ahead),
        ] {
            check_share(name, share)?;
        }
        Ok(())
    }

    /// Gives every site of a layout its time; where places are visited again, moves context sites there.
    fn visit(&self, layout: &mut Layout, rng: &mut Stream) {
        let (n, context) = (layout.xy.len(), layout.context);
        let rounds = (self.rounds.draw(rng).round() as usize).clamp(1, context.max(1));
        let continuous = rng.unit() < self.continuous;
        let uneven = rng.unit() < self.uneven;
        let mut steps: Vec<f64> = (0..rounds).map(|_| 1.0).collect();
        if uneven {
            steps.iter_mut().for_each(|step| *step = rng.log_uniform(0.3, 3.0));
        }
        let total: f64 = steps[1..].iter().sum();
        let mut when = vec![-1.0; rounds];
        for r in 1..rounds {
            when[r] = when[r - 1] + 2.0 * steps[r] / total;
        }
        if rounds == 1 {
            when[0] = 0.0;
        }
        // Rounds are not equally large.
        let weights: Vec<f64> = (0..rounds).map(|_| rng.log_uniform(0.4, 2.5)).collect();
        let pick = |among: usize, rng: &mut Stream| {
            let mut left = rng.unit() * weights[..among].iter().sum::<f64>();
            weights[..among].iter().position(|w| {
                left -= w;
                left < 0.0
            })
        };
        let ahead = rng.unit() < self.ahead && rounds > 1;
        let seen = if ahead { rounds - 1 } else { rounds };
        let mut round: Vec<usize> = (0..n).map(|_| pick(seen, rng).unwrap_or(seen - 1)).collect();
        if rng.unit() < self.revisited && !continuous {
            let places = context.div_ceil(seen);
            for (i, round) in round.iter_mut().enumerate().take(context) {
                layout.xy[i] = layout.xy[i % places];
                *round = i / places;
            }
        }
        let last = when[seen - 1];
        let spread = |rng: &mut Stream| match continuous {
            true => rng.uniform(-1.0, last.max(-0.9)),
            false => f64::NAN,
        };
        layout.t = (0..n).map(|i| if continuous { spread(rng) } else { when[round[i]] }).collect();
        // Targets: as they were laid out, all of one time, or of any time.
        let how = rng.unit();
        let one = match (ahead, how < 0.5) {
            (true, true) => when[rounds - 1],
            (true, false) => rng.uniform(last, last + 0.8),
            (false, _) => when[rng.below(rounds)],
        };
        for i in layout.first_target..n {
            layout.t[i] = match how {
                _ if ahead => one,
                how if how < 0.4 => layout.t[i],
                how if how < 0.8 => one,
                _ => rng.uniform(-1.1, 1.1),
            };
        }
    }
}

/// Sites of one task: the context first.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// Coordinates, region units.
    pub xy: Vec<[f64; 2]>,
    /// Times, of which the visits of a survey span 2; empty where there are none.
    pub t: Vec<f64>,
    /// How many of them are context.
    pub context: usize,
    /// Index of the first target: the context's length, or 0 where the context is asked too.
    pub first_target: usize,
}

impl Design {
    /// Whether sites are visited at different times.
    pub fn has_times(&self) -> bool {
        self.times.is_some()
    }

    /// Whether context sites are moved before they are recorded.
    pub fn displaces(&self) -> bool {
        self.displacement != Law::Fixed(0.0)
    }

    /// # Errors
    /// [`Error::Input`] for an empty range or a share outside [0, 1].
    pub fn check(&self) -> Result<()> {
        for (name, share) in [
            ("clustered", self.clustered),
            ("gridded", self.gridded),
            ("held_block", self.held_block),
            ("near", self.near),
            ("anywhere", self.anywhere),
            ("clustered + gridded", self.clustered + self.gridded),
            ("near + anywhere", self.near + self.anywhere),
        ] {
            check_share(name, share)?;
        }
        self.clusters.check("clusters", true)?;
        self.cluster_radius.check("cluster_radius", true)?;
        self.aspect.check("aspect", true)?;
        Law::Fixed(self.half_side).check("half_side", true)?;
        for (name, shift) in
            [("shift_context", self.shift_context), ("shift_targets", self.shift_targets)]
        {
            Law::Fixed(shift).check(name, false)?;
        }
        self.displacement.check("displacement", self.displaces())?;
        if let Some(times) = &self.times {
            times.check()?;
            if self.pool > 0 || self.line || self.displaces() {
                return Err(Error::input(
                    "times are for surveys on a plane, of a context apart from its targets",
                )
                .try_this(
                    "leave `times` under [design] out, or `line`, `pool` and `displacement`",
                ));
            }
        }
        if self.pool > 0 && self.displaces() {
            return Err(Error::input("a context among the targets cannot be displaced")
                .try_this("leave `displacement` under [design] out, or set `pool` to 0"));
        }
        if self.pool > 0 && self.shift_context != self.shift_targets {
            return Err(Error::input("a context among the targets cannot be moved from them")
                .fact("shift_context", self.shift_context)
                .fact("shift_targets", self.shift_targets)
                .try_this("set both to the same number under [design], or `pool` to 0"));
        }
        let most = self.context.iter().map(|s| s.sites[1]).max().unwrap_or(0);
        if self.pool > 0 && self.pool < most {
            return Err(Error::input("the pool is smaller than the largest context")
                .fact("pool", self.pool)
                .fact("largest context", most)
                .try_this("raise `pool` under [design], or set it to 0"));
        }
        let sound =
            |s: &Size| (s.uniform || s.sites[0] > 0) && s.sites[0] <= s.sites[1] && s.weight >= 0.0;
        let chance: f64 = self.context.iter().map(|s| s.weight).sum();
        if self.targets == 0 || !self.context.iter().all(sound) || chance.is_nan() || chance <= 0.0
        {
            return Err(Error::input("the design has an empty range of sites")
                .fact("context", format!("{:?}", self.context))
                .fact("targets", self.targets)
                .try_this(
                    "write e.g. context = [{ sites = [3, 300], weight = 1 }], targets = 64",
                ));
        }
        let room = match self.most_sites {
            0 => usize::MAX,
            sites => sites.saturating_sub(most),
        };
        if self.fewest_targets > self.targets.min(room) {
            return Err(Error::input("the design has an empty range of targets")
                .fact("fewest_targets", self.fewest_targets)
                .fact("targets", self.targets)
                .fact("most_sites", self.most_sites)
                .fact("largest context", most)
                .try_this("leave room for `fewest_targets` beside the largest context"));
        }
        Ok(())
    }

    /// Draws how many targets a context of `context` sites is asked. Nothing is drawn where the
    /// number is always the same.
    pub fn asked(&self, context: usize, rng: &mut Stream) -> usize {
        if self.fewest_targets == 0 || self.pool > 0 {
            return self.target_count();
        }
        let most = match self.most_sites {
            0 => self.targets,
            sites => self.targets.min(sites.saturating_sub(context)),
        };
        self.fewest_targets + rng.below(most.saturating_sub(self.fewest_targets) + 1)
    }

    /// Draws a context size.
    pub fn size(&self, rng: &mut Stream) -> usize {
        let mut left = rng.unit() * self.context.iter().map(|s| s.weight).sum::<f64>();
        let mut chosen = self.context.last().expect("checked");
        for size in &self.context {
            if left < size.weight {
                chosen = size;
                break;
            }
            left -= size.weight;
        }
        let range = chosen.sites;
        if chosen.uniform {
            return range[0] + rng.below(range[1] - range[0] + 1);
        }
        if range[0] == range[1] {
            return range[0];
        }
        (rng.log_uniform(range[0] as f64, range[1] as f64 + 1.0) as usize).clamp(range[0], range[1])
    }

    /// How many targets a task asks, at most.
    pub fn target_count(&self) -> usize {
        match (self.pool, self.grid) {
            (0, _) => self.targets,
            (pool, grid) if self.line => pool + grid,
            (pool, grid) => pool + grid * grid,
        }
    }

    /// Lays out `context` sites and this design's targets.
    pub fn layout(&self, context: usize, rng: &mut Stream) -> Layout {
        let targets = self.asked(context, rng);
        self.layout_of(context, targets, rng)
    }

    /// Lays out `context` sites and `targets` targets, of which a design with a pool knows better.
    pub fn layout_of(&self, context: usize, targets: usize, rng: &mut Stream) -> Layout {
        let mut layout = self.unit_layout(context, targets, rng);
        layout.xy.iter_mut().flatten().for_each(|v| *v *= self.half_side);
        let (seen, asked) = layout.xy.split_at_mut(layout.context);
        seen.iter_mut().for_each(|p| p[0] += self.shift_context);
        asked.iter_mut().for_each(|p| p[0] += self.shift_targets);
        if let Some(times) = &self.times {
            times.visit(&mut layout, rng);
        }
        layout
    }

    fn unit_layout(&self, context: usize, targets: usize, rng: &mut Stream) -> Layout {
        let aspect = if self.line { 0.0 } else { self.aspect.draw(rng).min(1.0) };
        let half = if !self.line && rng.unit() < 0.5 { [aspect, 1.0] } else { [1.0, aspect] };
        if self.pool > 0 {
            let mut xy = self.pool(self.pool, half, rng);
            let along = |i: usize, d: usize| match (self.grid, half[d]) {
                (0 | 1, _) => 0.0,
                (n, half) => half * (2.0 * i as f64 / (n - 1) as f64 - 1.0),
            };
            let rows = if self.line { 1 } else { self.grid };
            for j in 0..rows {
                xy.extend((0..self.grid).map(|i| [along(i, 0), along(j, 1)]));
            }
            return Layout { xy, t: Vec::new(), context, first_target: 0 };
        }
        let count = |share: f64| (share * targets as f64).round() as usize;
        let near = count(self.near);
        // Rounded together: two halves of one target are one target.
        let anywhere = count(self.near + self.anywhere).saturating_sub(near);
        let alike = targets.saturating_sub(near + anywhere);
        let pool = self.pool(context + alike, half, rng);

        // Which of the pool are asked: at random, or a whole neighbourhood.
        let mut order = rng.permutation(pool.len());
        if rng.unit() < self.held_block {
            let middle = pool[rng.below(pool.len())];
            let far = |i: usize| {
                let [x, y] = pool[i];
                (x - middle[0]).powi(2) + (y - middle[1]).powi(2)
            };
            order.sort_by(|&i, &j| far(j).total_cmp(&far(i)));
        }
        let mut xy: Vec<[f64; 2]> = order.iter().map(|&i| pool[i]).collect();
        for _ in 0..near {
            // Without a context, near nothing in particular.
            let [x, y] = xy.get(rng.below(context.max(1))).copied().unwrap_or_default();
            let (r, turn) = (rng.log_uniform(0.002, 0.2), rng.uniform(0.0, std::f64::consts::TAU));
            let dy = if self.line { 0.0 } else { r * turn.sin() };
            xy.push([x + r * turn.cos(), y + dy]);
        }
        let margin = 1.3;
        for _ in 0..anywhere {
            xy.push([
                margin * half[0] * rng.uniform(-1.0, 1.0),
                margin * half[1] * rng.uniform(-1.0, 1.0),
            ]);
        }
        Layout { xy, t: Vec::new(), context, first_target: context }
    }

    /// Sites that could have been surveyed.
    fn pool(&self, n: usize, half: [f64; 2], rng: &mut Stream) -> Vec<[f64; 2]> {
        let anywhere =
            |rng: &mut Stream| [half[0] * rng.uniform(-1.0, 1.0), half[1] * rng.uniform(-1.0, 1.0)];
        let kind = rng.unit();
        if kind < self.clustered {
            let share = rng.uniform(0.2, 1.0);
            let centres: Vec<[f64; 2]> = (0..(self.clusters.draw(rng).round() as usize).max(1))
                .map(|_| anywhere(rng))
                .collect();
            let radius = self.cluster_radius.draw(rng);
            return (0..n)
                .map(|_| {
                    if rng.unit() >= share {
                        return anywhere(rng);
                    }
                    let c = centres[rng.below(centres.len())];
                    let step = |flat: f64, rng: &mut Stream| {
                        if flat == 0.0 { 0.0 } else { radius * rng.normal() }
                    };
                    [c[0] + step(half[0], rng), c[1] + step(half[1], rng)]
                })
                .collect();
        }
        if kind < self.clustered + self.gridded {
            // A lattice with at least n cells; each site sits somewhere in its own cell.
            let cells = if self.line {
                [n, 1]
            } else {
                let across = ((n as f64) * half[0] / half[1]).sqrt().ceil().max(1.0) as usize;
                [across, n.div_ceil(across)]
            };
            let jitter = rng.uniform(0.0, 0.5);
            let order = rng.permutation(cells[0] * cells[1]);
            return (0..n)
                .map(|i| {
                    let cell = [order[i] % cells[0], order[i] / cells[0]];
                    let at = |d: usize, rng: &mut Stream| {
                        let u = cell[d] as f64 + 0.5 + jitter * rng.uniform(-1.0, 1.0);
                        half[d] * (2.0 * u / cells[d] as f64 - 1.0)
                    };
                    [at(0, rng), at(1, rng)]
                })
                .collect();
        }
        (0..n).map(|_| anywhere(rng)).collect()
    }
}
