//! Convolutional conditional neural process on the grid: pixels seen and pixels missing.
//!
//! Source: Gordon et al. (2020), arXiv:1910.13556, §5.2 and its on-the-grid layers as in
//! github.com/YannDubs/Neural-Process-Family. Departures: channels are normalised cell by cell where
//! the authors normalise over the batch, in which a task would see its neighbours; the residual joins
//! after the last product; and GELU stands between the layers after the last convolution.

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::{
    Entry, Problem,
    conv::Conv,
    convcnp::reached,
    head::Head,
    layer::{Activation, Dense, Mlp, Norm},
    params::{Init, Params},
    settings,
};
use crate::{
    error::{Error, Result},
    fused::{self, conv::Window},
    likelihood::Likelihood,
    predictive::Predictive,
    process::{Memory, Posterior, Process},
    sites::{Observations, Sites},
};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    name: "convcnp-grid",
    about: "convolutional conditional neural process on pixels, some missing (Gordon et al. 2020, arXiv:1910.13556)",
    build,
    joint: false,
    tiny: "step = 0.3\nwidth = 6\nkernel = 3\nkernel_in = 5\nblocks = 1\nhead = { components = 2 }",
};

/// Settings of a [`ConvCnpGrid`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Side of a pixel, model units. Sites count for the pixel that they lie in, and those of one
    /// pixel for their mean.
    pub step: f64,
    /// Where the middle of some pixel lies, the same along both axes, model units.
    pub origin: f64,
    /// Half the side of the square, about the origin of the model units, that has pixels. A context
    /// that lies beyond moves it, and one that is wider widens it; targets further out are answered
    /// as if nothing had been observed.
    pub reach: f64,
    /// Channels.
    pub width: usize,
    /// Side of a kernel, pixels, odd.
    pub kernel: usize,
    /// Side of the kernel that what was seen is spread by, pixels, odd.
    pub kernel_in: usize,
    /// Residual blocks of two convolutions.
    pub blocks: usize,
    /// Hidden layers between a pixel's channels and its head.
    pub depth: usize,
    /// Predictive family.
    pub head: Head,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            step: 1.0 / 16.0,
            origin: 0.0,
            reach: 1.3,
            width: 32,
            kernel: 9,
            kernel_in: 11,
            blocks: 5,
            depth: 2,
            head: Head::default(),
        }
    }
}

impl Config {
    /// # Errors
    /// [`Error::Input`] for pixels without a side, or a kernel without a middle.
    fn check(&self) -> Result<()> {
        let odd = self.kernel % 2 == 1 && self.kernel_in % 2 == 1;
        let sides = [self.step, self.reach, self.reach / self.step];
        let sound = sides.iter().all(|s| s.is_finite() && *s > 0.0) && self.origin.is_finite();
        if self.width == 0 || !odd || !sound {
            return Err(Error::input("the [model] table gives no pixels to convolve")
                .fact("width", self.width)
                .fact("kernel", self.kernel)
                .fact("kernel_in", self.kernel_in)
                .fact("step", self.step)
                .fact("reach", self.reach)
                .try_this("compare with `width = 32`, `kernel = 9` (odd), `step = 0.0625`"));
        }
        self.head.check()
    }
}

/// The most pixels of a raster.
const MOST: f64 = 4e6;
/// Where the kernel's weights on pixels seen add up to less, nothing was seen.
const FAINT: f64 = 1e-5;

/// Convolutional conditional neural process on the grid.
pub struct ConvCnpGrid {
    config: Config,
    dim: usize,
    spread: Tensor, // [side, side, 1]
    embed: Conv,
    blocks: Vec<Block>,
    decode: Mlp,
    likelihood: &'static dyn Likelihood,
}

/// Each channel by its kernel, then each pixel by a matrix.
struct Separable {
    norm: Norm,
    kernel: Tensor, // [side, side, channel]
    mix: Dense,
}

struct Block([Separable; 2]);

impl Separable {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.norm.forward(x)?.relu()?;
        self.mix.forward(&fused::depthwise(&x, &self.kernel)?)
    }
}

fn build(
    table: &toml::Table,
    problem: Problem,
    params: &mut Params,
) -> Result<Box<dyn Process + Send + Sync>> {
    let config: Config = settings(table)?;
    config.check()?;
    problem.reads_exactly("convcnp-grid")?;
    let mut scope = params.scope();
    let (width, side) = (config.width, config.kernel_in);
    let equal = Init::Constant(1.0 / (side * side) as f64);
    let spread = scope.get("spread.kernel", &[side, side, 1], &equal)?;
    // Density, and each feature.
    let embed = &mut scope.at("embed");
    let embed =
        Conv::new(embed, Window::new([1; 2]), 1 + problem.likelihood.width(), width, false)?;
    let mut blocks = Vec::with_capacity(config.blocks);
    for i in 0..config.blocks {
        let mut separable = |j: usize| -> Result<Separable> {
            let mut scope = scope.at(&format!("block.{i}.{j}"));
            let shape = [config.kernel, config.kernel, width];
            Ok(Separable {
                norm: Norm::new(&mut scope.at("norm"), width)?,
                kernel: scope.get("kernel", &shape, &Init::Normal(1.0 / config.kernel as f64))?,
                mix: Dense::new(&mut scope.at("mix"), width, width, &Init::LeCun)?,
            })
        };
        blocks.push(Block([separable(0)?, separable(1)?]));
    }
    let widths = [vec![width; config.depth + 1], vec![config.head.outputs()]].concat();
    let decode = Mlp::new(&mut scope.at("decode"), &widths, Activation::Gelu, &Init::LeCun)?;
    let (dim, likelihood) = (problem.dim, problem.likelihood);
    Ok(Box::new(ConvCnpGrid { config, dim, spread, embed, blocks, decode, likelihood }))
}

/// The pixels of a row of the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pixels {
    /// Rows (second coordinate) and columns (first); one row on a line.
    cells: [usize; 2],
    /// Number of the first row and column, counted from the one about `origin`.
    first: [i64; 2],
}

impl ConvCnpGrid {
    /// Number of the pixel, along one axis, that `s` lies in.
    fn number(&self, s: f64) -> f64 {
        ((s - self.config.origin) / self.config.step).round()
    }

    fn pixels(&self, sites: &[Vec<f64>], observed: &[f64]) -> Result<Pixels> {
        let mut pixels = Pixels { cells: [1; 2], first: [0; 2] };
        for d in 0..self.dim {
            let (low, high) = reached(sites, observed, d, self.config.reach);
            let (low, high) = (self.number(low), self.number(high) + 1.0);
            pixels.first[1 - d] = low as i64;
            let others = pixels.cells[0] * pixels.cells[1];
            pixels.cells[1 - d] = (high - low).min(2.0 * MOST) as usize;
            let fits = (high - low) * others as f64 <= MOST;
            if !fits {
                return Err(Error::input("the sites reach too far for a raster")
                    .fact("pixels along one axis", high - low)
                    .fact("step", self.config.step)
                    .try_this("give sites in model units, or a longer `step` under [model]"));
            }
        }
        Ok(pixels)
    }

    /// The pixel, in memory, that a site lies in; nothing outside.
    fn within(&self, pixels: Pixels, site: &[f64]) -> Option<usize> {
        let mut at = [0; 2];
        for (d, s) in site.iter().enumerate() {
            let last = pixels.cells[1 - d] - 1;
            let number = self.number(*s) - pixels.first[1 - d] as f64;
            if !(0.0..=last as f64).contains(&number) {
                return None;
            }
            at[1 - d] = number as usize;
        }
        Some(at[0] * pixels.cells[1] + at[1])
    }

    /// Which pixels were seen, and the mean of what was seen there: `[batch, row, column, 1 +
    /// features]`, of a context whose rows share `pixels`.
    fn raster(&self, context: &Observations, pixels: Pixels) -> Result<Tensor> {
        let features = self.likelihood.features(context)?;
        let (device, dtype) = (features.device(), features.dtype());
        let features = features.to_dtype(DType::F64)?.to_vec3::<f64>()?;
        let mask = context.mask.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let sites = context.sites.host()?;
        let (rows, channels) = (sites.len(), 1 + self.likelihood.width());
        let [tall, wide] = pixels.cells;
        let mut raster = vec![0.0f64; rows * tall * wide * channels];
        for (row, raster) in raster.chunks_exact_mut(tall * wide * channels).enumerate() {
            for (i, site) in sites[row].iter().enumerate() {
                if mask[row][i] > 0.0
                    && let Some(pixel) = self.within(pixels, site)
                {
                    let cell = &mut raster[pixel * channels..][..channels];
                    cell[0] += 1.0;
                    cell[1..].iter_mut().zip(&features[row][i]).for_each(|(sum, x)| *sum += x);
                }
            }
            for cell in raster.chunks_exact_mut(channels).filter(|cell| cell[0] > 0.0) {
                let count = cell[0];
                cell.iter_mut().for_each(|x| *x /= count);
            }
        }
        let shape = (rows, tall, wide, channels);
        Ok(Tensor::from_vec(raster, shape, device)?.to_dtype(dtype)?)
    }

    /// The middle of a raster on which nothing was observed, `[1, width]`.
    fn nothing(&self, like: &Tensor) -> Result<Tensor> {
        let pixels = self.pixels(&[], &[])?;
        let [rows, columns] = pixels.cells;
        let shape = (1, rows, columns, 1 + self.likelihood.width());
        let field = self.field(&Tensor::zeros(shape, like.dtype(), like.device())?)?;
        let middle = field.narrow(1, rows / 2, 1)?.narrow(2, columns / 2, 1)?;
        Ok(middle.reshape((1, ()))?)
    }

    /// `[batch, row, column, width]`.
    fn field(&self, raster: &Tensor) -> Result<Tensor> {
        let (batch, rows, columns, channels) = raster.dims4()?;
        // Every channel by the same kernel: channels stand in as rows of a batch.
        let each = raster.permute((0, 3, 1, 2))?.contiguous()?;
        let each = each.reshape((batch * channels, rows, columns, 1))?;
        let sums = fused::depthwise(&each, &self.spread.abs()?)?;
        let sums = sums.reshape((batch, channels, rows, columns))?.permute((0, 2, 3, 1))?;
        let density = sums.narrow(3, 0, 1)?;
        let signal = sums.narrow(3, 1, channels - 1)?.broadcast_div(&density.maximum(FAINT)?)?;
        let mut x = self.embed.forward(&Tensor::cat(&[&density, &signal], 3)?)?;
        for Block([first, second]) in &self.blocks {
            x = (&x + second.forward(&first.forward(&x)?)?)?;
        }
        Ok(x)
    }
}

struct Part {
    rows: usize,
    pixels: Pixels,
    field: Tensor, // [rows, row, column, width]
}

struct Conditioned<'a> {
    model: &'a ConvCnpGrid,
    /// Rows of the batch that share pixels, in order.
    parts: Vec<Part>,
}

impl Process for ConvCnpGrid {
    fn condition<'a>(&'a self, context: &Observations) -> Result<Box<dyn Posterior + 'a>> {
        let sites = context.sites.host()?;
        let observed = context.mask.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let pixels = sites
            .iter()
            .zip(&observed)
            .map(|(sites, observed)| self.pixels(sites, observed))
            .collect::<Result<Vec<_>>>()?;
        let (mut start, mut parts) = (0, Vec::new());
        for alike in pixels.chunk_by(|a, b| a == b) {
            let (rows, pixels) = (alike.len(), alike[0]);
            let raster = self.raster(&context.rows(start, rows)?, pixels)?;
            parts.push(Part { rows, pixels, field: self.field(&raster)? });
            start += rows;
        }
        Ok(Box::new(Conditioned { model: self, parts }))
    }

    fn memory(&self, sites: usize) -> Memory {
        let side = (2.0 * self.config.reach / self.config.step) as usize + 2;
        let cells = side.pow(self.dim as u32);
        let cell = 4 * self.config.width;
        Memory {
            conditioning: cells * cell * 6 + sites * 256,
            held: cells * cell,
            target: 4 * (3 * self.decode.widest() + 16) + 256,
        }
    }
}

impl Posterior for Conditioned<'_> {
    fn at(&self, targets: &Sites) -> Result<Predictive> {
        let sites = targets.host()?;
        let (mut start, mut parts) = (0, Vec::with_capacity(self.parts.len()));
        for part in &self.parts {
            let [tall, wide] = part.pixels.cells;
            let mut index = Vec::with_capacity(part.rows * targets.len());
            let nowhere = (part.rows * tall * wide) as u32;
            for row in 0..part.rows {
                let pixel = |site: &Vec<f64>| {
                    let within = self.model.within(part.pixels, site);
                    within.map_or(nowhere, |pixel| (row * tall * wide + pixel) as u32)
                };
                index.extend(sites[start + row].iter().map(pixel));
            }
            start += part.rows;
            let mut field = part.field.flatten_to(2)?;
            if index.contains(&nowhere) {
                field = Tensor::cat(&[&field, &self.model.nothing(&field)?], 0)?;
            }
            let index = Tensor::new(index, part.field.device())?;
            let found = field.index_select(&index, 0)?;
            parts.push(found.reshape((part.rows, targets.len(), ()))?);
        }
        let raw = self.model.decode.forward(&Tensor::cat(&parts, 0)?)?;
        self.model.config.head.predictive(self.model.likelihood.link(), &raw)
    }
}
