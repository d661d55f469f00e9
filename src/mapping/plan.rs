//! How a map is cut up: into tiles, and into questions to the posterior, for the memory there is.

use std::{fmt, str::FromStr};

use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::pipeline::WINDOWS;
use crate::{
    error::{Error, Result},
    geo::geotiff,
    predictive::Of,
    process::Memory,
};

/// Pixels along the side of a tile, unless asked otherwise.
pub const TILE: usize = 256;

/// Targets that a posterior is asked about in one call, unless memory is short. The intermediate
/// results of many more leave a core's cache, and above 65,536 numbers candle's element-wise
/// operations queue for one pool of threads: 448 tokens of 128 are below that.
pub const TARGETS: usize = 448;

/// Targets in one call, at least: fewer are slow and save nothing.
pub const LEAST_TARGETS: usize = 64;

/// Tiles to choose from where memory is short.
const TILES: [usize; 5] = [256, 128, 64, 32, 16];

/// What a thread takes beside its targets: packed matrices, score tiles, its allocator's slack.
const WORKER: usize = 8 << 20;

/// What finishing a raster takes at the end, and what no account shows.
const SLACK: usize = 24 << 20;

/// What a programme that has read a small survey holds, where the system does not say, bytes.
pub const RESIDENT: usize = 96 << 20;

/// MiB of a budget that go to GDAL's block cache.
pub fn cache(budget: Option<Bytes>) -> usize {
    budget.map_or(geotiff::CACHE, |budget| (budget.0 >> 24).clamp(4, geotiff::CACHE))
}

/// How to map. All but `of` and `device` change memory and speed, never the map.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The surface, or a new observation.
    pub of: Of,
    /// Pixels along a tile's side.
    pub tile: usize,
    /// Targets in one call of the posterior, at most.
    pub targets: usize,
    /// Calls of the posterior at once.
    pub workers: usize,
    /// Where the model lives.
    pub device: Device,
}

impl Plan {
    /// Maps of the surface, on `device`: a call for every thread of the pool, or one for a GPU.
    pub fn new(device: Device) -> Self {
        let workers = if device.is_cpu() { rayon::current_num_threads() } else { 1 };
        let targets = if device.is_cpu() { TARGETS } else { 32 * TARGETS };
        Plan { of: Of::Surface, tile: TILE, targets, workers, device }
    }

    /// The same plan within `budget`: smaller questions first, then smaller tiles unless `tile`
    /// is `fixed`, then fewer calls at once.
    ///
    /// # Errors
    /// [`Error::Input`] if the least that works takes more, with what takes it.
    pub fn within(self, budget: Bytes, needs: &Needs, fixed: bool) -> Result<Self> {
        let tiles: Vec<usize> = match fixed {
            true => vec![self.tile],
            false => TILES.into_iter().filter(|tile| *tile <= self.tile).collect(),
        };
        let tiles = if tiles.is_empty() { vec![self.tile] } else { tiles };
        let mut least = usize::MAX;
        for workers in (1..=self.workers.max(1)).rev() {
            for &tile in &tiles {
                let fixed = needs.fixed() + WINDOWS * needs.window(tile) + workers * WORKER;
                let target = (workers * needs.process.target).max(1);
                least = least.min(fixed + LEAST_TARGETS * target);
                let targets = (budget.0.saturating_sub(fixed) / target).min(self.targets);
                // A smaller tile is cheaper than questions so small that they are slow.
                let enough = if tile == tiles[tiles.len() - 1] { LEAST_TARGETS } else { 256 };
                if targets >= enough.min(self.targets) {
                    return match needs.conditioning() <= budget.0 {
                        true => Ok(Plan { tile, targets, workers, ..self }),
                        false => Err(needs.refuse(budget, needs.conditioning())),
                    };
                }
            }
        }
        Err(needs.refuse(budget, least.max(needs.conditioning())))
    }
}

/// What a map takes that no plan can change.
#[derive(Debug, Clone)]
pub struct Needs {
    /// What the programme holds once survey, grid and weights are read, bytes.
    pub resident: usize,
    /// GDAL's block cache, bytes.
    pub cache: usize,
    /// The process, for as many sites as the survey has.
    pub process: Memory,
    /// Sites of the survey.
    pub sites: usize,
    /// Rasters to write.
    pub products: usize,
}

impl Needs {
    fn fixed(&self) -> usize {
        self.resident + self.cache + SLACK + self.process.held
    }

    fn conditioning(&self) -> usize {
        self.resident + self.process.conditioning + WORKER
    }

    /// One window: places in f64, f32 and on the way between; per product what the gatherer and
    /// the writer hold.
    fn window(&self, tile: usize) -> usize {
        tile * tile * (64 + 8 * self.products)
    }

    fn refuse(&self, budget: Bytes, needed: usize) -> Error {
        let share = |bytes: usize| Bytes(bytes).to_string();
        // A tenth more than the estimate, so that the next try does not fail by a hair.
        let enough = Bytes((needed + needed / 10).next_multiple_of(1 << 20));
        Error::input("the memory allowed is too small for this map")
            .fact("--memory", budget)
            .fact("needed", format!("{}, at the least", Bytes(needed)))
            .fact("of which", format!("{} to have read the inputs", share(self.resident)))
            .fact(
                "",
                format!(
                    "{} to condition the model on {} sites, {} to keep that",
                    share(self.process.conditioning),
                    self.sites,
                    share(self.process.held)
                ),
            )
            .try_this(format!(
                "allow --memory {enough}, map fewer products at a time, or take a model that keeps \
                 less of each site (`isopleth list models`)"
            ))
    }
}

/// An amount of memory.
///
/// ```
/// use isopleth::mapping::plan::Bytes;
/// assert_eq!("2GiB".parse::<Bytes>()?, Bytes(2 << 30));
/// assert_eq!("4GB".parse::<Bytes>()?, Bytes(4_000_000_000));
/// assert_eq!("800M".parse::<Bytes>()?, Bytes(800_000_000)); // one letter is decimal
/// assert_eq!(Bytes(3 << 29).to_string(), "1.5GiB");
/// assert!("2".parse::<Bytes>().is_err()); // 2 what?
/// # Ok::<(), isopleth::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Bytes(pub usize);

impl Bytes {
    /// In MiB, to a tenth.
    pub fn mebibytes(self) -> f64 {
        (self.0 as f64 / (1 << 20) as f64 * 10.0).round() / 10.0
    }
}

impl FromStr for Bytes {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = |what: &str| {
            Error::input(format!("the amount of memory `{text}` {what}"))
                .try_this("write a number with its unit, such as 2GiB, 512MiB or 800MB")
        };
        let text = text.trim();
        let digits = text.trim_end_matches(char::is_alphabetic);
        let value: f64 =
            digits.trim().parse().map_err(|_| refuse("does not start with a number"))?;
        let unit: f64 = match text[digits.len()..].to_ascii_lowercase().as_str() {
            "k" | "kb" => 1e3,
            "m" | "mb" => 1e6,
            "g" | "gb" => 1e9,
            "t" | "tb" => 1e12,
            "kib" => 1024.0,
            "mib" => 1_048_576.0,
            "gib" => 1_073_741_824.0,
            "tib" => 1_099_511_627_776.0,
            "" => return Err(refuse("has no unit")),
            _ => return Err(refuse("has a unit we do not know")),
        };
        let bytes = value * unit;
        if !(bytes.is_finite() && bytes >= 1.0 && bytes < usize::MAX as f64) {
            return Err(refuse("is not above zero, or beyond any machine"));
        }
        Ok(Bytes(bytes as usize))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mebibytes = self.0 as f64 / 1_048_576.0;
        let (value, unit) =
            if mebibytes < 1024.0 { (mebibytes, "MiB") } else { (mebibytes / 1024.0, "GiB") };
        let decimals = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
        let text = format!("{value:.decimals$}");
        let text = match text.contains('.') {
            true => text.trim_end_matches('0').trim_end_matches('.'),
            false => &text,
        };
        write!(f, "{text}{unit}")
    }
}

/// What the operating system says of this process's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Resident now.
    pub now: Bytes,
    /// The most that ever was.
    pub peak: Bytes,
}

/// Memory that this process has taken: `VmRSS` and `VmHWM` on Linux, unknown elsewhere.
pub fn usage() -> Option<Usage> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| -> Option<Bytes> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        let kibibytes: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(Bytes(kibibytes << 10))
    };
    Some(Usage { now: field("VmRSS")?, peak: field("VmHWM")? })
}
