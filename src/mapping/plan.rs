//! How a map is cut up: into tiles, and into questions to the posterior, for the memory there is.

use std::{fmt, panic::resume_unwind, str::FromStr, thread};

use candle_core::Device;
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::{Deserialize, Serialize};

use super::pipeline::WINDOWS;
use crate::{
    device,
    error::{Error, Result},
    geo::geotiff,
    predictive::Of,
    process::{Memory, Posterior, Process},
    sites::Observations,
};

/// Pixels along the side of a tile, unless asked otherwise.
pub const TILE: usize = 256;

/// Targets that a posterior is asked about in one call, unless memory is short. The intermediate
/// results of many more leave a core's cache, and above 65,536 numbers candle's element-wise
/// operations queue for one pool of threads: 448 tokens of 128 are below that.
pub const TARGETS: usize = 448;

/// Targets in one call, at least: fewer are slow and save nothing.
pub const LEAST_TARGETS: usize = 64;

/// Targets in one call on a card: a whole window. For four heads that is two thousand blocks of
/// threads, some four for each that an H200 runs at once, so that the last ones to end cost little.
pub const CARD_TARGETS: usize = TILE * TILE;

/// Calls at once on each card: one computes while the answers of the other come back, become
/// products and make room for the next. Their copies need no stream of their own: a call of
/// [`CARD_TARGETS`] uploads half a MiB and brings back five, which is a millisecond, and computes for
/// tens of them, hundreds over 100,000 sites.
const CARD_WORKERS: usize = 2;

/// What a card takes beside tensors: kernels, and the workspaces of cuBLAS. A guess: not measured.
const CARD_SLACK: usize = 256 << 20;

/// Tiles to choose from where memory is short.
const TILES: [usize; 5] = [256, 128, 64, 32, 16];

/// What a worker takes beside its targets: packed matrices, score tiles, and the huge pages (2 MiB
/// on Linux) of which its threads' allocators touch a dozen. Measured, rounded up.
const WORKER: usize = 24 << 20;

/// What no account shows: libraries being paged in, the other stages, and GDAL while it finishes a
/// raster, which took 48 MiB.
const SLACK: usize = 80 << 20;

/// What a programme that has read a small survey holds, where the system does not say, bytes.
pub const RESIDENT: usize = 96 << 20;

/// MiB of a budget that go to GDAL's block cache.
pub fn cache(budget: Option<Bytes>) -> usize {
    budget.map_or(geotiff::CACHE, |budget| (budget.0 >> 24).clamp(4, geotiff::CACHE))
}

/// How to map. All but `of` and `devices` change memory and speed, never the map.
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
    /// Where the model lives: the processor, or cards with a copy on each.
    pub devices: Vec<Device>,
}

impl Plan {
    /// Maps of the surface, on `device`: a call for every thread of the pool, or two for a GPU.
    pub fn new(device: Device) -> Self {
        Plan::on(vec![device])
    }

    /// The same on several devices, which share the questions.
    pub fn on(devices: Vec<Device>) -> Self {
        let plan = Plan { of: Of::Surface, tile: TILE, targets: TARGETS, workers: 1, devices };
        match plan.is_cpu() {
            true => Plan { workers: rayon::current_num_threads(), ..plan },
            false => {
                Plan { workers: CARD_WORKERS * plan.devices.len(), targets: CARD_TARGETS, ..plan }
            }
        }
    }

    /// Whether the processor computes.
    pub fn is_cpu(&self) -> bool {
        self.devices.iter().all(Device::is_cpu)
    }

    /// Windows that are open at a time: one being read, one being asked about, one being written;
    /// on cards as many as are asked about at once.
    pub(super) fn windows(&self) -> usize {
        if self.is_cpu() { WINDOWS } else { WINDOWS.max(self.workers + 1) }
    }

    /// Conditions a process on as many threads as the plan has workers: each takes memory.
    ///
    /// # Errors
    /// Those of [`Process::condition`], and [`Error::Input`] if no thread can be had, or a card
    /// has too little memory.
    pub fn condition<'a>(
        &self,
        process: &'a (dyn Process + Send + Sync),
        context: &Observations,
    ) -> Result<Box<dyn Posterior + 'a>> {
        if !self.is_cpu() {
            let device = context.y.device();
            let conditioned = process.condition(context).and_then(|posterior| {
                device.synchronize()?;
                Ok(posterior)
            });
            return conditioned.map_err(|e| unfit(e, device, process, context.len()));
        }
        if self.workers >= rayon::current_num_threads() {
            return process.condition(context);
        }
        pool(self.workers)?.install(|| process.condition(context))
    }

    /// Conditions one process for each device, all at once: the same posterior on every device.
    ///
    /// # Errors
    /// As [`Plan::condition`], the first in order of device.
    pub fn condition_each<'a>(
        &self,
        processes: &[&'a (dyn Process + Send + Sync)],
        context: &Observations,
    ) -> Result<Vec<Box<dyn Posterior + 'a>>> {
        let condition = |(process, device): (&&'a (dyn Process + Send + Sync), &Device)| {
            self.condition(*process, &context.to_device(device)?)
        };
        let pairs = processes.iter().zip(&self.devices);
        if processes.len() < 2 {
            return pairs.map(condition).collect();
        }
        thread::scope(|scope| {
            let all: Vec<_> = pairs.map(|pair| scope.spawn(move || condition(pair))).collect();
            all.into_iter().map(|t| t.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
        })
    }

    /// The same plan for cards that have `room` bytes free: smaller questions first, then fewer at
    /// once. Never an error: what takes too much after all is asked in smaller parts.
    ///
    /// A target is taken to need twice what it needs on the processor, where no layer's hidden values
    /// are ever held whole.
    pub fn within_cards(self, room: Bytes, process: &Memory) -> Self {
        let free = room.0.saturating_sub(process.held + CARD_SLACK);
        let each = |calls: usize| free / (calls * 2 * process.target).max(1);
        let calls = (self.workers / self.devices.len().max(1)).max(1);
        let calls = (1..=calls).rev().find(|n| each(*n) >= 4 * LEAST_TARGETS).unwrap_or(1);
        let targets = each(calls).clamp(LEAST_TARGETS, self.targets.max(LEAST_TARGETS));
        Plan { targets, workers: calls * self.devices.len().max(1), ..self }
    }

    /// What the card with the least memory has free; nothing without a card, or where that is unknown.
    pub fn room(&self) -> Option<Bytes> {
        let free = self.devices.iter().filter_map(device::memory).map(|m| Bytes(m.free));
        free.min()
    }

    /// The same plan within `budget`: smaller questions first, then smaller tiles unless the tile
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
        let windows = self.windows();
        for workers in (1..=self.workers.max(1)).rev() {
            for &tile in &tiles {
                let held = needs.held() + windows * needs.window(tile) + workers * WORKER;
                let target = (workers * needs.process.target).max(1);
                least = least.min(held + LEAST_TARGETS * target);
                let targets = (budget.0.saturating_sub(held) / target).min(self.targets);
                // A smaller tile costs less time than questions so small that they are slow.
                let last = Some(&tile) == tiles.last();
                let enough = if last { LEAST_TARGETS } else { 4 * LEAST_TARGETS };
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

/// A card's lack of memory in words; any other error as it is.
fn unfit(error: Error, device: &Device, process: &dyn Process, sites: usize) -> Error {
    if !error.is_out_of_memory() {
        return error;
    }
    let memory = device::memory(device)
        .map_or("unknown".into(), |m| format!("{} free of {}", Bytes(m.free), Bytes(m.total)));
    Error::input("the card has too little memory to condition the model on this survey")
        .fact("card", device::card(device).unwrap_or_else(|| "unknown".into()))
        .fact("memory", memory)
        .fact("sites", sites)
        .fact("needed", format!("about {}", Bytes(process.memory(sites).conditioning)))
        .try_this("wait for what else runs on the card (nvidia-smi), or use --device cpu")
}

/// A pool of its own. Inside one of a single thread, the parallel steps of a network are plain
/// loops, and no thread waits for a step by starting on another question.
pub(super) fn pool(threads: usize) -> Result<ThreadPool> {
    ThreadPoolBuilder::new().num_threads(threads.max(1)).build().map_err(|e| {
        Error::input("no more threads can be had")
            .fact("reason", e)
            .try_this("ask for fewer with RAYON_NUM_THREADS=1")
    })
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
    fn held(&self) -> usize {
        self.resident + self.cache + SLACK + self.process.held
    }

    fn conditioning(&self) -> usize {
        self.resident + self.process.conditioning + WORKER + SLACK / 2
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

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    fn needs(sites: usize) -> Needs {
        let process = Memory { conditioning: 6000 * sites, held: 3000 * sites, target: 20_000 };
        Needs { resident: 50 * MIB, cache: 4 * MIB, process, sites, products: 5 }
    }

    fn plan(workers: usize) -> Plan {
        Plan { workers, ..Plan::new(Device::Cpu) }
    }

    #[test]
    fn a_plan_takes_no_more_than_its_budget_and_less_budget_never_means_more() {
        for (workers, sites) in [(1, 100), (2, 10_000), (64, 100_000)] {
            let needs = needs(sites);
            let mut before = [usize::MAX; 2];
            for mib in (100..4000).rev().step_by(37) {
                let Ok(plan) = plan(workers).within(Bytes(mib * MIB), &needs, false) else {
                    before = [0; 2];
                    continue;
                };
                let questions = plan.workers * (WORKER + plan.targets * needs.process.target);
                let taken = needs.held() + WINDOWS * needs.window(plan.tile) + questions;
                assert!(taken <= mib * MIB, "{taken} in {mib} MiB by {plan:?}");
                assert!(plan.targets >= LEAST_TARGETS && plan.targets <= TARGETS, "{plan:?}");
                let now = [plan.workers, plan.workers * plan.tile];
                assert!(now[0] <= before[0], "{now:?} after {before:?} at {mib} MiB");
                before = now;
            }
            assert_eq!(before, [0; 2], "100 MiB are too little");
            let ample = plan(workers).within(Bytes(1 << 40), &needs, false).unwrap();
            assert_eq!([ample.workers, ample.tile, ample.targets], [workers, TILE, TARGETS]);
        }
    }

    #[test]
    fn cards_with_less_memory_are_asked_less_at_a_time() {
        let process = needs(100_000).process;
        let two = || Plan { workers: 4, targets: CARD_TARGETS, ..Plan::on(vec![Device::Cpu; 2]) };
        let ample = two().within_cards(Bytes(1 << 37), &process);
        assert_eq!([ample.workers, ample.targets], [4, CARD_TARGETS]);
        let mut before = [usize::MAX; 2];
        for mib in (100..5000).rev().step_by(49) {
            let plan = two().within_cards(Bytes(mib * MIB), &process);
            let taken = process.held + CARD_SLACK + plan.workers * plan.targets * process.target;
            let least = plan.targets == LEAST_TARGETS && plan.workers == 2;
            assert!(least || taken <= mib * MIB, "{taken} in {mib} MiB by {plan:?}");
            assert!(plan.workers <= before[0], "{plan:?} after {before:?}");
            assert!(plan.workers % 2 == 0 && plan.targets >= LEAST_TARGETS, "{plan:?}");
            before = [plan.workers, plan.targets];
        }
        assert_eq!(before, [2, LEAST_TARGETS], "100 MiB are too little");
    }

    /// Only a lack of memory becomes a word about memory.
    #[test]
    fn a_context_that_does_not_fit_a_card_says_so() {
        struct Small;
        impl Process for Small {
            fn condition<'a>(&'a self, _: &Observations) -> Result<Box<dyn Posterior + 'a>> {
                unreachable!("only asked what it takes")
            }
        }
        let cuda = |said: &str| Error::Tensor(candle_core::Error::Cuda(said.into()));
        let full = unfit(cuda("CUDA_ERROR_OUT_OF_MEMORY"), &Device::Cpu, &Small, 1000);
        assert!(full.facts().contains(&("sites".into(), "1000".into())), "{full:?}");
        assert!(full.help().unwrap().contains("--device cpu"));
        let other = unfit(cuda("CUDA_ERROR_ILLEGAL_ADDRESS"), &Device::Cpu, &Small, 1000);
        assert!(other.to_string().contains("ILLEGAL_ADDRESS"));
    }

    #[test]
    fn what_is_refused_says_what_would_do() {
        let needs = needs(100_000);
        let error = plan(2).within(Bytes(500 * MIB), &needs, false).unwrap_err();
        assert!(error.facts().iter().any(|(_, fact)| fact.contains("100000 sites")), "{error:?}");
        let help = error.help().unwrap();
        let enough = help.split_whitespace().nth(2).unwrap().trim_end_matches(',');
        assert!(plan(2).within(enough.parse().unwrap(), &needs, false).is_ok(), "{help}");
        // Room to hold the context is not room to condition on it.
        let room = Bytes(needs.held() + 100 * MIB);
        let (roomy, tight) = (room.0 >= needs.conditioning(), plan(1).within(room, &needs, false));
        assert!(!roomy && tight.is_err());
        // The user's own tile stays.
        let plan = Plan { tile: 777, ..plan(2) };
        let plan = plan.within(Bytes(1 << 40), &needs, true).unwrap();
        assert_eq!(plan.tile, 777);
    }

    #[test]
    fn amounts_read_and_read_back() {
        for (text, bytes) in [("1.5 GiB", 3 << 29), ("512MiB", 512 << 20), ("2gb", 2_000_000_000)] {
            assert_eq!(text.parse::<Bytes>().unwrap(), Bytes(bytes), "{text}");
        }
        for bytes in [Bytes(512 << 20), Bytes(2 << 30), Bytes(5 << 20)] {
            assert_eq!(bytes.to_string().parse::<Bytes>().unwrap(), bytes);
        }
        for text in ["", "GiB", "-1GiB", "0MB", "NaNGB", "2 elephants", "1e30TiB"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }
}
