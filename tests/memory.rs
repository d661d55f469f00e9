//! What a process says of its memory beforehand, against what it then asks of the allocator.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
};

use candle_core::{DType, Device, Tensor};
use isopleth::{
    Observations, Process, Result, Sites, Stream,
    baseline::ExactGp,
    kernel::{Matern, Metric, Smoothness},
    likelihood,
    model::{MODELS, Problem, params::Params},
};

const MIB: f64 = 1_048_576.0;

/// The system's allocator, counting: bytes that are out, and the most that ever were.
struct Counting;
static OUT: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(OUT.fetch_add(layout.size(), SeqCst) + layout.size(), SeqCst);
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        OUT.fetch_sub(layout.size(), SeqCst);
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most that `f` takes beyond what was out before, MiB, and what of it stays.
fn taken<T>(f: impl FnOnce() -> Result<T>) -> Result<(T, [f64; 2])> {
    let before = OUT.load(SeqCst);
    PEAK.store(before, SeqCst);
    let out = f()?;
    let more = |bytes: usize| bytes.saturating_sub(before) as f64 / MIB;
    Ok((out, [more(PEAK.load(SeqCst)), more(OUT.load(SeqCst))]))
}

fn places(n: usize, seed: u64) -> Sites {
    let mut rng = Stream::new(seed, "places", 0);
    // A map's frame makes the context's box [−1, 1].
    let mut along = || rng.uniform(-1.0, 1.0);
    let xy: Vec<[f64; 2]> = (0..n).map(|_| [along(), along()]).collect();
    Sites::plane(&xy, &Device::Cpu).unwrap()
}

/// An estimate that is too low breaks the user's limit; one that is far too high refuses maps that
/// would have fitted. One test, for the allocator is the whole process's.
#[test]
fn every_process_takes_the_memory_that_it_says() -> Result<()> {
    let gaussian = likelihood::find("gaussian")?;
    let problem = Problem::new(2, gaussian);
    let kernel = Matern {
        smoothness: Smoothness::ThreeHalves,
        length_scale: 0.5,
        sill: 1.0,
        metric: Metric::Euclidean,
    };
    let gp = ExactGp::new(Box::new(kernel), 0.1, 0.0, gaussian)?;
    let mut processes: Vec<(&str, Box<dyn Process>)> = vec![("gp", Box::new(gp))];
    for entry in MODELS {
        // The settings of a model of the usual size; as a map has it, with weights that are no
        // longer learned.
        let usual = toml::Table::new();
        let mut params = Params::new(1, &Device::Cpu, DType::F32);
        (entry.build)(&usual, problem, &mut params)?;
        let weights = params.vars().iter().map(|(p, v)| (p.clone(), v.as_tensor().clone()));
        let mut saved = Params::frozen(weights.collect(), &Device::Cpu, DType::F32);
        processes.push((entry.name, (entry.build)(&usual, problem, &mut saved)?));
    }
    let (sites, targets) = (1_000, 1_000);
    let y = Tensor::zeros((1, sites, 1), DType::F32, &Device::Cpu)?;
    let context = Observations::new(places(sites, 1), y, None)?;
    let mut cases: Vec<_> =
        processes.iter().map(|(name, p)| (*name, &**p, context.clone())).collect();
    // Counts take more of some: few, whose covariance stays in doubt, and many.
    let binomial = Problem::new(2, likelihood::find("binomial")?);
    let entry = MODELS.iter().find(|entry| entry.name == "kriging").expect("registered");
    let usual = toml::Table::new();
    let reads_counts =
        (entry.build)(&usual, binomial, &mut Params::new(1, &Device::Cpu, DType::F32))?;
    for (name, n) in [("kriging of few counts", 300), ("kriging of counts", 5_000)] {
        let y = Tensor::from_iter((0..n).map(|i| (i * i % 3) as f32), &Device::Cpu)?;
        let trials = Tensor::full(5f32, (1, n), &Device::Cpu)?;
        let counts = Observations::new(places(n, 1), y.reshape((1, n, 1))?, Some(trials))?;
        cases.push((name, &*reads_counts, counts));
    }
    let asked = places(targets, 2);
    let mut wrong = Vec::new();
    for (name, process, context) in &cases {
        let sites = context.len();
        process.condition(context)?.at(&asked)?; // threads have their buffers from now on
        let said = process.memory(sites);
        let (posterior, [conditioning, held]) = taken(|| process.condition(context))?;
        let (_, [asking, _]) = taken(|| posterior.at(&asked))?;
        for (what, said, seen) in [
            ("conditioning", said.conditioning, conditioning),
            ("holding", said.held, held),
            ("asking", said.target * targets, asking),
        ] {
            let said = said as f64 / MIB;
            println!("{name}: {what} takes {seen:.1} MiB, said to be {said:.1}");
            if seen > said + 0.5 || said > 3.0 * seen + 4.0 {
                wrong.push(format!("{name}: {what} takes {seen:.1} MiB, said to be {said:.1}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}
