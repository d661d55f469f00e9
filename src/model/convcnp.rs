//! Convolutional conditional neural process: observations on a raster, a convolutional network, and
//! back to sites. Moving everything by whole cells moves the answer, and nothing else.
//!
//! Source: Gordon et al. (2020), arXiv:1910.13556; the product of weights in the plane is that of
//! github.com/wesselb/neuralprocesses (Bruinsma et al. 2023, arXiv:2303.14468). Departures: one length
//! scale each way where the authors learn one for every channel, so that the signal is a weighted
//! mean of what was seen; density enters as ln(1 + density), unsquashed, since surveys cluster;
//! weights back to sites add up to 1; and the raster does not depend on the targets.

use std::sync::OnceLock;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::{
    Entry, Problem,
    conv::{Kind, Network},
    head::Head,
    layer::Dense,
    params::{Init, Params, Scope},
    settings,
};
use crate::{
    error::{Error, Result},
    fused::set_conv::{Lattice, from_lattice, to_lattice},
    likelihood::Likelihood,
    predictive::Predictive,
    process::{Memory, Posterior, Process},
    sites::{Observations, Sites},
};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    name: "convcnp",
    about: "convolutional conditional neural process, off the grid (Gordon et al. 2020, arXiv:1910.13556)",
    build,
    joint: false,
    tiny: "points_per_unit = 4\nwidth = 4\nkernel = 3\nnetwork = 'unet'\nlevels = 2\nmargin = 0.5\n\
           head = { components = 2 }",
};

/// Settings of a [`ConvCnp`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Cells in a model unit; 0 for 64 on a line and 16 in the plane.
    pub points_per_unit: usize,
    /// Half the side of the square, about the origin, that the raster covers, model units. A
    /// context that lies beyond moves it, and one that is wider widens it; targets that lie further
    /// out are answered as if nothing had been observed.
    pub reach: f64,
    /// What lies around that square, model units; 0 for eight cells.
    pub margin: f64,
    /// Channels of the raster.
    pub width: usize,
    /// Side of a kernel, cells, odd.
    pub kernel: usize,
    /// Network over the raster.
    pub network: Kind,
    /// Layers down, and up again, of a U-Net; 0 for 6 on a line and 4 in the plane.
    pub levels: usize,
    /// Predictive family.
    pub head: Head,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            points_per_unit: 0,
            reach: 1.3,
            margin: 0.0,
            width: 8,
            kernel: 5,
            network: Kind::Unet,
            levels: 0,
            head: Head::default(),
        }
    }
}

impl Config {
    /// # Errors
    /// [`Error::Input`] for a raster without cells, or a kernel without a middle.
    fn check(&self) -> Result<()> {
        let sound = self.reach > 0.0 && self.reach.is_finite() && (0.0..1e3).contains(&self.margin);
        if self.width == 0 || self.kernel.is_multiple_of(2) || self.levels > 16 || !sound {
            return Err(Error::input("the [model] table gives no raster to convolve")
                .fact("width", self.width)
                .fact("kernel", self.kernel)
                .fact("levels", self.levels)
                .fact("reach", self.reach)
                .fact("margin", self.margin)
                .try_this("compare with `width = 8`, `kernel = 5` (odd), `reach = 1.3`"));
        }
        self.head.check()
    }
}

/// The most cells of a raster: beyond it sites are hardly in model units.
const MOST: f64 = 4e6;
/// Added to the density before the signal is divided by it: what was seen fades where the nearest
/// site weighs less than this.
const FAINT: f64 = 1e-4;

/// What a context becomes before any head: a raster, asked at sites.
pub struct Backbone {
    likelihood: &'static dyn Likelihood,
    dim: usize,
    per_unit: usize,
    reach: f64,
    margin: f64,
    log_length_in: Tensor,  // [1]
    log_length_out: Tensor, // [1]
    embed: Dense,
    network: Network,
    outputs: usize,
}

/// A context on its rasters.
#[derive(Debug)]
pub struct Encoded {
    /// Rows of the batch that share a lattice, in order.
    parts: Vec<Part>,
    /// What stands where nothing was observed, `[1, 1, outputs]`: made when first asked for.
    nothing: OnceLock<Tensor>,
}

#[derive(Debug)]
struct Part {
    rows: usize,
    lattice: Lattice,
    field: Tensor, // [rows, row, column, outputs]
}

/// How far a raster goes along an axis: `reach` both ways, moved or widened by as little as lets it
/// hold every site observed. A raster that is moved, and not widened, is of the size it was trained on.
pub(super) fn reached(sites: &[Vec<f64>], observed: &[f64], axis: usize, reach: f64) -> (f64, f64) {
    let seen = sites.iter().zip(observed).filter(|(_, seen)| **seen > 0.0).map(|(s, _)| s[axis]);
    let none = (f64::INFINITY, f64::NEG_INFINITY);
    let (low, high) = seen.fold(none, |(low, high), s| (low.min(s), high.max(s)));
    match high - low <= 2.0 * reach {
        true if high > reach => (high - 2.0 * reach, high),
        true if low < -reach => (low, low + 2.0 * reach),
        _ => (low.min(-reach), high.max(reach)),
    }
}

impl Backbone {
    /// Allocates it; the head of `config` plays no part.
    ///
    /// # Errors
    /// [`Error::Input`] for settings that make no raster.
    pub fn new(scope: &mut Scope, config: &Config, problem: &Problem) -> Result<Self> {
        config.check()?;
        let line = problem.dim == 1;
        let or = |given: usize, line_has: usize, plane_has: usize| match (given, line) {
            (0, true) => line_has,
            (0, false) => plane_has,
            _ => given,
        };
        let per_unit = or(config.points_per_unit, 64, 16);
        let margin = if config.margin > 0.0 { config.margin } else { 8.0 / per_unit as f64 };
        let log_length = [(2.0 / per_unit as f64).ln()].to_vec();
        let (width, levels) = (config.width, or(config.levels, 6, 4));
        let mut length = |name: &str| {
            scope.get(&format!("{name}.log_length"), &[1], &Init::Values(log_length.clone()))
        };
        let (log_length_in, log_length_out) = (length("in")?, length("out")?);
        let channels = 1 + problem.likelihood.width();
        let embed = Dense::new(&mut scope.at("embed"), channels, width, &Init::LeCun)?;
        let mut at = scope.at("network");
        let network = Network::new(&mut at, config.network, line, config.kernel, width, levels)?;
        Ok(Backbone {
            likelihood: problem.likelihood,
            dim: problem.dim,
            per_unit,
            reach: config.reach,
            margin,
            log_length_in,
            log_length_out,
            embed,
            outputs: network.outputs(width),
            network,
        })
    }

    /// Features that it gives at each site.
    pub fn width(&self) -> usize {
        self.outputs
    }

    /// The lattice that covers the square, and what was seen beyond it.
    fn lattice(&self, sites: &[Vec<f64>], observed: &[f64]) -> Result<Lattice> {
        let mut lattice = Lattice { per_unit: self.per_unit, cells: [1, 1], first: [0, 0] };
        let (per_unit, multiple) = (self.per_unit as f64, self.network.multiple() as f64);
        for d in 0..self.dim {
            let (low, high) = reached(sites, observed, d, self.reach);
            // In whole steps of the coarsest raster, so that where a cell lies does not depend on it.
            let low = ((low - self.margin) * per_unit / multiple).floor() * multiple;
            let high = ((high + self.margin) * per_unit / multiple).ceil() * multiple;
            // Places that are not finite, too.
            let fits = high - low < MOST && high.max(-low) < MOST;
            if !fits {
                return Err(Error::input("the sites reach too far for a raster")
                    .fact("cells along one axis", high - low)
                    .fact("points_per_unit", self.per_unit)
                    .try_this(
                        "give sites in model units, or fewer `points_per_unit` under [model]",
                    ));
            }
            lattice.first[1 - d] = low as i64;
            lattice.cells[1 - d] = (high - low) as usize;
        }
        if lattice.len() as f64 > MOST {
            return Err(Error::input("the raster has too many cells")
                .fact("cells", lattice.len())
                .fact("points_per_unit", self.per_unit)
                .try_this("give sites in model units, or fewer `points_per_unit` under [model]"));
        }
        Ok(lattice)
    }

    /// Puts a context on its raster and looks at it.
    pub fn encode(&self, context: &Observations) -> Result<Encoded> {
        let sites = context.sites.host()?;
        let observed = context.mask.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let lattices = sites
            .iter()
            .zip(&observed)
            .map(|(sites, observed)| self.lattice(sites, observed))
            .collect::<Result<Vec<_>>>()?;
        let mut parts = Vec::new();
        let mut start = 0;
        for alike in lattices.chunk_by(|a, b| a == b) {
            let (rows, lattice) = (alike.len(), alike[0]);
            let field = self.field(&context.rows(start, rows)?, lattice)?;
            parts.push(Part { rows, lattice, field });
            start += rows;
        }
        Ok(Encoded { parts, nothing: OnceLock::new() })
    }

    /// The middle of a raster on which nothing was observed, `[1, 1, outputs]`.
    fn nothing(&self, like: &Tensor) -> Result<Tensor> {
        let lattice = self.lattice(&[], &[])?;
        let shape = (1, lattice.cells[0], lattice.cells[1], 1 + self.likelihood.width());
        let raster = Tensor::zeros(shape, like.dtype(), like.device())?;
        let field = self.network.forward(&self.embed.forward(&raster)?)?;
        let middle = Tensor::zeros((1, 1, self.dim), like.dtype(), like.device())?;
        Ok(from_lattice(&middle, &field, &self.log_length_out, lattice)?)
    }

    /// `[batch, row, column, outputs]`.
    fn field(&self, context: &Observations, lattice: Lattice) -> Result<Tensor> {
        let features = self.likelihood.features(context)?;
        let mask = context.mask.unsqueeze(2)?;
        // Chosen, not multiplied: what stands at a hidden site need not be a number.
        let features = mask
            .broadcast_as(features.shape())?
            .gt(0.0)?
            .where_cond(&features, &features.zeros_like()?)?;
        let seen = Tensor::cat(&[&mask, &features], 2)?; // [batch, site, 1 + features]
        let sums = to_lattice(&context.sites.s, &seen, &self.log_length_in, lattice)?;
        let density = sums.narrow(3, 0, 1)?;
        let signal =
            sums.narrow(3, 1, self.likelihood.width())?.broadcast_div(&(&density + FAINT)?)?;
        let raster = Tensor::cat(&[&(density + 1.0)?.log()?, &signal], 3)?;
        self.network.forward(&self.embed.forward(&raster)?)
    }

    /// Features of `targets`: `[batch, target, width]`.
    pub fn features(&self, encoded: &Encoded, targets: &Sites) -> Result<Tensor> {
        let (mut start, mut parts) = (0, Vec::with_capacity(encoded.parts.len()));
        for part in &encoded.parts {
            let s = targets.s.narrow(0, start, part.rows)?;
            start += part.rows;
            let edge = |last: bool| -> Result<Tensor> {
                let along = |d: usize| {
                    let (first, cells) = (part.lattice.first[1 - d], part.lattice.cells[1 - d]);
                    let edge = if last { first + cells as i64 - 1 } else { first };
                    let edge = edge as f64 / self.per_unit as f64;
                    if last { edge - self.margin } else { edge + self.margin }
                };
                let edges: Vec<f64> = (0..self.dim).map(along).collect();
                let edges = Tensor::new(edges, s.device())?.to_dtype(s.dtype())?;
                Ok(edges.reshape((1, 1, self.dim))?)
            };
            let near = s.broadcast_maximum(&edge(false)?)?.broadcast_minimum(&edge(true)?)?;
            let sums = from_lattice(&near, &part.field, &self.log_length_out, part.lattice)?;
            let outside = s.ne(&near)?.to_dtype(DType::U32)?.sum_keepdim(2)?.gt(0u32)?;
            if outside.to_dtype(DType::U32)?.sum_all()?.to_scalar::<u32>()? == 0 {
                parts.push(sums);
                continue;
            }
            let nothing = match encoded.nothing.get() {
                Some(known) => known.clone(),
                None => {
                    let made = self.nothing(&s)?;
                    encoded.nothing.get_or_init(|| made).clone()
                }
            };
            let nothing = nothing.broadcast_as(sums.shape())?;
            parts.push(outside.broadcast_as(sums.shape())?.where_cond(&nothing, &sums)?);
        }
        let sums = Tensor::cat(&parts, 0)?;
        // A Gaussian of length ℓ adds up to √(2π) ℓ over cells that are one unit apart.
        let dim = self.dim as f64;
        let total = (2.0 * std::f64::consts::PI).sqrt() * self.per_unit as f64;
        let share = ((&self.log_length_out * -dim)?.exp()? * total.powf(-dim))?;
        Ok(sums.broadcast_mul(&share)?)
    }

    /// What conditioning on `sites` sites within the square takes.
    pub fn memory(&self, sites: usize) -> Memory {
        let side = 2.0 * (self.reach + self.margin) * self.per_unit as f64;
        let side = side as usize + 2 * self.network.multiple();
        let cells = side.pow(self.dim as u32);
        let cell = 4 * self.outputs;
        // Everything on the way down of a U-Net, and what one layer reads, pads and gives.
        Memory {
            conditioning: cells * cell * 12 + sites * 256,
            held: cells * cell,
            target: 4 * (4 * self.outputs + 16) + 256,
        }
    }
}

/// Convolutional conditional neural process.
pub struct ConvCnp {
    backbone: Backbone,
    decode: Dense,
    head: Head,
}

fn build(
    table: &toml::Table,
    problem: Problem,
    params: &mut Params,
) -> Result<Box<dyn Process + Send + Sync>> {
    let config: Config = settings(table)?;
    problem.reads_exactly("convcnp")?;
    let mut scope = params.scope();
    let backbone = Backbone::new(&mut scope, &config, &problem)?;
    let mut at = scope.at("decode");
    let decode = Dense::new(&mut at, backbone.width(), config.head.outputs(), &Init::LeCun)?;
    Ok(Box::new(ConvCnp { backbone, decode, head: config.head }))
}

struct Conditioned<'a> {
    model: &'a ConvCnp,
    encoded: Encoded,
}

impl Process for ConvCnp {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        Ok(Box::new(Conditioned { model: self, encoded: self.backbone.encode(context)? }))
    }

    fn memory(&self, sites: usize) -> Memory {
        self.backbone.memory(sites)
    }
}

impl Posterior for Conditioned<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        let model = self.model;
        let features = model.backbone.features(&self.encoded, targets)?;
        let raw = model.decode.forward(&features)?;
        model.head.predictive(model.backbone.likelihood.link(), &raw)
    }
}
