//! Where, what was seen, and what is asked: `Sites`, `Observations`, `Task`.

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};

/// Places that can be observed, in model units.
#[derive(Debug, Clone)]
pub struct Sites {
    /// Coordinates `[batch, site, 2]` (1 on a line, 3 on the globe), model units.
    pub s: Tensor,
    /// Time `[batch, site, 1]`, model units.
    pub t: Option<Tensor>,
    /// Covariates `[batch, site, feature]`, standardised.
    pub x: Option<Tensor>,
}

impl Sites {
    /// Sites with coordinates only.
    pub fn new(s: Tensor) -> Self {
        Sites { s, t: None, x: None }
    }

    /// One row of planar sites from host coordinates in model units.
    pub fn plane(xy: &[[f64; 2]], device: &Device) -> Result<Self> {
        Self::flat(xy.as_flattened(), 2, device)
    }

    /// One row of sites from host coordinates `[site, dim]` in model units.
    pub fn flat(places: &[f64], dim: usize, device: &Device) -> Result<Self> {
        let flat: Vec<f32> = places.iter().map(|c| *c as f32).collect();
        Ok(Self::new(Tensor::from_vec(flat, (1, places.len() / dim.max(1), dim), device)?))
    }

    /// Rows in the batch.
    pub fn batch(&self) -> usize {
        self.s.dims()[0]
    }

    /// Sites in each row.
    pub fn len(&self) -> usize {
        self.s.dims()[1]
    }

    /// No sites at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same change made to coordinates, times and covariates.
    pub fn map(&self, change: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Sites {
            s: change(&self.s)?,
            t: self.t.as_ref().map(&change).transpose()?,
            x: self.x.as_ref().map(&change).transpose()?,
        })
    }

    /// Sites `start … start + len` of every row.
    pub fn narrow(&self, start: usize, len: usize) -> Result<Self> {
        self.map(|x| Ok(x.narrow(1, start, len)?))
    }

    /// The same sites on another device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        self.map(|x| Ok(x.to_device(device)?))
    }

    /// Rows `start … start + len` of the batch.
    pub fn rows(&self, start: usize, len: usize) -> Result<Self> {
        self.map(|x| Ok(x.narrow(0, start, len)?.contiguous()?))
    }

    /// The same places with times and covariates as further coordinates, behind their own, where there
    /// are covariates.
    pub fn joined(&self) -> Result<Self> {
        let Some(x) = &self.x else { return Ok(self.clone()) };
        let mut all = vec![self.s.clone()];
        for behind in self.t.iter().chain([x]) {
            all.push(behind.to_dtype(self.s.dtype())?);
        }
        Ok(Sites::new(Tensor::cat(&all, 2)?))
    }

    /// Coordinates on the host in f64: `[batch][site][dimension]`.
    pub fn host(&self) -> Result<Vec<Vec<Vec<f64>>>> {
        Ok(self.s.to_dtype(DType::F64)?.to_vec3::<f64>()?)
    }
}

/// What was seen at some sites.
#[derive(Debug, Clone)]
pub struct Observations {
    /// Where.
    pub sites: Sites,
    /// `[batch, site, outcome]`: standardised values or logarithms of values, or counts.
    pub y: Tensor,
    /// `[batch, site]`, 1 = observed, 0 = padding.
    pub mask: Tensor,
    /// `[batch, site]`: for counts people tested, or cases expected at the frame's rate.
    pub trials: Option<Tensor>,
}

impl Observations {
    /// Observations without padding.
    ///
    /// # Errors
    /// [`Error::Axis`] if `y` or `trials` disagree with the sites.
    pub fn new(sites: Sites, y: Tensor, trials: Option<Tensor>) -> Result<Self> {
        let (batch, len) = (sites.batch(), sites.len());
        if y.dims().len() != 3 || y.dims()[..2] != [batch, len] {
            return Err(Error::axis(
                "outcomes and sites, [batch, site]",
                format!("{:?}", y.dims()),
                format!("[{batch}, {len}]"),
            ));
        }
        if let Some(trials) = &trials
            && trials.dims() != [batch, len]
        {
            return Err(Error::axis(
                "trials and sites, [batch, site]",
                format!("{:?}", trials.dims()),
                format!("[{batch}, {len}]"),
            ));
        }
        let mask = Tensor::ones((batch, len), y.dtype(), y.device())?;
        Ok(Observations { sites, y, mask, trials })
    }

    /// The same observations on another device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Observations {
            sites: self.sites.to_device(device)?,
            y: self.y.to_device(device)?,
            mask: self.mask.to_device(device)?,
            trials: self.trials.as_ref().map(|t| t.to_device(device)).transpose()?,
        })
    }

    /// These and `others`, row by row.
    ///
    /// # Errors
    /// If the two are not of one kind: trials or covariates in one only, other batches.
    pub fn and(&self, others: &Self) -> Result<Self> {
        let join = |a: &Tensor, b: &Tensor| Tensor::cat(&[a, b], 1);
        let both = |a: &Option<Tensor>, b: &Option<Tensor>| match (a, b) {
            (Some(a), Some(b)) => Ok(Some(join(a, b)?)),
            (None, None) => Ok(None),
            _ => Err(Error::axis("observations that are joined", "with", "without")),
        };
        let sites = Sites {
            s: join(&self.sites.s, &others.sites.s)?,
            t: both(&self.sites.t, &others.sites.t)?,
            x: both(&self.sites.x, &others.sites.x)?,
        };
        Ok(Observations {
            sites,
            y: join(&self.y, &others.y)?,
            mask: join(&self.mask, &others.mask)?,
            trials: both(&self.trials, &others.trials)?,
        })
    }

    /// Rows `start … start + len` of the batch.
    pub fn rows(&self, start: usize, len: usize) -> Result<Self> {
        let part = |x: &Tensor| x.narrow(0, start, len)?.contiguous();
        Ok(Observations {
            sites: self.sites.rows(start, len)?,
            y: part(&self.y)?,
            mask: part(&self.mask)?,
            trials: self.trials.as_ref().map(part).transpose()?,
        })
    }

    /// Sites in each row, padding included.
    pub fn len(&self) -> usize {
        self.sites.len()
    }

    /// No sites at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One context with its target.
#[derive(Debug, Clone)]
pub struct Task {
    /// What the process sees.
    pub context: Observations,
    /// What it is asked, with the answer.
    pub target: Observations,
    /// The true surface at the targets `[batch, target, 1]`, link scale.
    pub surface: Tensor,
    /// The true surface plus the nugget at the targets `[batch, target, 1]`, link scale: a new
    /// village's logit prevalence or log rate, or a new noisy value.
    pub noisy: Tensor,
    /// What ruled each row, for networks that learn to read it: `[batch, 7]`, see [`HYPER`]. Nothing
    /// where no kernel is known.
    pub hyper: Option<Tensor>,
}

/// Numbers of [`Task::hyper`]: 1 where one Matérn kernel ruled the row, else all are 0; which of
/// [`Smoothness::all`](crate::kernel::Smoothness::all) it had; the logarithms of its length scale (model
/// units, the geometric mean over directions), sill and nugget (link scale²); and the logarithm of the
/// ratio of its length scales times cosine and sine of twice their angle.
pub const HYPER: usize = 7;

impl Task {
    /// The same task on another device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Task {
            context: self.context.to_device(device)?,
            target: self.target.to_device(device)?,
            surface: self.surface.to_device(device)?,
            noisy: self.noisy.to_device(device)?,
            hyper: self.hyper.as_ref().map(|h| h.to_device(device)).transpose()?,
        })
    }
}

/// The affine map that brings planar coordinates to model units: centre and metres (or whatever
/// the coordinates are in) per unit. One unit is half the longer side of the bounding box, so the
/// sites span [−1, 1] along it. Training and mapping both use this function.
///
/// ```
/// let (centre, unit) = isopleth::sites::unit_box(&[[0.0, 0.0], [4.0, 1.0], [1.0, 2.0]]).unwrap();
/// assert_eq!((centre, unit), ([2.0, 1.0], 2.0));
/// ```
///
/// Returns `None` when the sites do not span a box: fewer than two places, or not finite.
pub fn unit_box(xy: &[[f64; 2]]) -> Option<([f64; 2], f64)> {
    let (centre, unit) = span(xy.as_flattened(), 2)?;
    Some(([centre[0], centre[1]], unit))
}

/// [`unit_box`] in any number of dimensions, of `places` `[place, dim]`.
pub fn span(places: &[f64], dim: usize) -> Option<(Vec<f64>, f64)> {
    let mut low = vec![f64::INFINITY; dim];
    let mut high = vec![f64::NEG_INFINITY; dim];
    for p in places.chunks_exact(dim) {
        for d in 0..dim {
            low[d] = low[d].min(p[d]);
            high[d] = high[d].max(p[d]);
        }
    }
    let unit = 0.5 * (0..dim).map(|d| high[d] - low[d]).fold(f64::NEG_INFINITY, f64::max);
    let centre = (0..dim).map(|d| 0.5 * (low[d] + high[d])).collect();
    (unit.is_finite() && unit > 0.0).then_some((centre, unit))
}

/// The affine map that brings times to model units: the time that is 0, and how long a unit is. Times span
/// [−1, 1]; where all are one, a unit is what it was. Training and mapping both use this function.
///
/// ```
/// assert_eq!(isopleth::sites::unit_time(&[3.0, 9.0, 5.0]), [6.0, 3.0]);
/// assert_eq!(isopleth::sites::unit_time(&[3.0, 3.0]), [3.0, 1.0]);
/// ```
pub fn unit_time(times: &[f64]) -> [f64; 2] {
    let (first, last) =
        times.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), t| (a.min(*t), b.max(*t)));
    let half = 0.5 * (last - first);
    match half > 0.0 && half.is_finite() {
        true => [0.5 * (first + last), half],
        false => [times.first().copied().unwrap_or(0.0), 1.0],
    }
}

/// Log of the overall rate of `cases` in their exposures: what rates of a frame are relative to.
/// Half a case more keeps it finite where there is none.
///
/// ```
/// let found = isopleth::sites::log_rate(&[1.0, 2.0], &[100.0, 600.0]);
/// assert!((found - (3.5f64 / 700.0).ln()).abs() < 1e-12);
/// ```
pub fn log_rate(cases: &[f64], exposure: &[f64]) -> f64 {
    let total: f64 = exposure.iter().sum();
    ((cases.iter().sum::<f64>() + 0.5) / total.max(f64::MIN_POSITIVE)).ln()
}

/// Mean and standard deviation (divisor n) used to standardise a continuous outcome. A constant
/// outcome has sd 1, so that standardising never divides by zero.
pub fn mean_sd(values: &[f64]) -> (f64, f64) {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    let sd = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt();
    (mean, if sd > 1e-12 * mean.abs().max(1e-300) { sd } else { 1.0 })
}
