//! The stages of a map, each on threads of its own: read → ask → gather → write.
//!
//! Windows are opened in order and written in order, and at most [`WINDOWS`] are between the two:
//! that is what bounds the memory, and every queue here is as long as it needs to be. The
//! questions of a window are answered by several threads; one question's whole network runs on
//! one thread, which needs no waiting between its steps and keeps its intermediate results in
//! that core's cache.
//!
//! Cards hold the context; only places go there and answers come back. Whoever is free takes the next
//! question, of whatever card, and answers are put in their places: which card answered changes
//! nothing, as long as the cards are alike.

use std::{
    any::Any,
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    thread,
};

use candle_core::Device;
use rayon::ThreadPool;

use super::{Plan, near::Near, nearest::Nearest, part::Part, plan};
use crate::{
    error::{Error, Result},
    geo::{
        frame::Frame,
        grid::{Grid, Window},
    },
    process::Posterior,
    product::{self, Around, Product, Spec},
    sites::Sites,
};

/// Windows that are open at a time, at the least: see [`Plan::windows`].
pub(super) const WINDOWS: usize = 3;

/// What every stage may look at.
pub(super) struct Stage<'a> {
    /// One for each device of the plan.
    pub posteriors: &'a [&'a dyn Posterior],
    pub grid: &'a Grid,
    pub frame: &'a Frame,
    pub near: Near,
    /// Where a product reads how far the nearest site is.
    pub nearest: Option<Nearest>,
    /// Variance over the whole map, where a product reads it.
    pub spread: f64,
    pub specs: Vec<Spec>,
    pub plan: &'a Plan,
    /// Targets in one question, at most.
    pub targets: usize,
    /// Targets in one call of a posterior, at most: fewer once a card had no memory for more.
    pub part: Part,
}

/// What the mapped pixels hold, outcome units.
#[derive(Clone, Copy)]
pub(super) struct Tally {
    pub pixels: usize,
    pub lowest: f64,
    pub total: f64,
    pub highest: f64,
    /// Pixels that no site is near.
    pub far: usize,
}

impl Tally {
    const NONE: Tally =
        Tally { pixels: 0, lowest: f64::INFINITY, total: 0.0, highest: f64::NEG_INFINITY, far: 0 };

    fn and(self, other: Tally) -> Tally {
        Tally {
            pixels: self.pixels + other.pixels,
            lowest: self.lowest.min(other.lowest),
            total: self.total + other.total,
            highest: self.highest.max(other.highest),
            far: self.far + other.far,
        }
    }
}

impl Default for Tally {
    fn default() -> Self {
        Tally::NONE
    }
}

/// Targets `start …` of a window's wanted pixels.
struct Question {
    window: usize,
    part: usize,
    start: usize,
    sites: Sites,
}

/// A window that is being answered.
struct Open {
    window: Window,
    valid: Vec<bool>,
    /// Values of the wanted pixels, product by product.
    values: Vec<Vec<f32>>,
    tallies: Vec<Option<Tally>>,
}

/// What the gatherer is told.
enum News {
    Opened(Open),
    Answered { window: usize, part: usize, start: usize, values: Vec<Vec<f32>>, tally: Tally },
    Failed(Error),
    Panicked(Box<dyn Any + Send>),
}

/// Maps every window; returns what the pixels hold.
pub(super) fn run(
    stage: &Stage,
    products: &mut [Box<dyn Product>],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Tally> {
    let workers = stage.plan.workers.max(1);
    // More threads in a worker would take as much memory as more workers, and wait more. On a card,
    // threads only make products of its answers.
    let cards = stage.plan.devices.len().max(1);
    let threads =
        if stage.plan.is_cpu() { 1 } else { rayon::current_num_threads().div_ceil(cards) };
    thread::scope(|scope| {
        let (permit, permits) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        let (question, questions) = mpsc::channel();
        let (finish, finished) = mpsc::channel();
        let questions = Arc::new(Mutex::new(questions));
        for _ in 0..stage.plan.windows() {
            let _ = permit.send(());
        }
        let news = tell.clone();
        scope.spawn(move || reported(&news, || stage.read(&permits, &news, question)));
        for worker in 0..workers {
            let (news, questions) = (tell.clone(), questions.clone());
            let seat = worker % stage.posteriors.len().max(1);
            scope.spawn(move || {
                reported(&news, || stage.answer(seat, &questions, &news, &plan::pool(threads)?))
            });
        }
        drop((tell, questions));
        let writer = scope.spawn(move || write(products, &finished, &permit));
        // Whichever stage stops first closes its ends, and the others find that nobody listens.
        let gathered = stage.gather(told, finish, progress);
        let written = writer.join().unwrap_or_else(|panic| resume_unwind(panic));
        let tally = gathered?;
        written.map(|()| tally)
    })
}

/// `ask` about parts of `sites`, at most [`Plan::targets`] each, on [`Plan::workers`] threads; the
/// answers in order. `sites` lie on the processor, and `ask` gets them on the device whose number, in
/// the plan, it is told.
///
/// # Errors
/// The first of `ask`'s, in order of place. A card without memory for a part is asked about half of it,
/// and so are all from then on that share `most`, until there is no smaller part.
pub fn in_parts<T: Send>(
    plan: &Plan,
    most: &Part,
    sites: &Sites,
    ask: impl Fn(usize, &Sites) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let each = plan.targets.max(1);
    let parts = sites.len().div_ceil(each);
    let workers = plan.workers.clamp(1, parts.max(1));
    let threads = rayon::current_num_threads() / workers;
    let next = AtomicUsize::new(0);
    let work = |worker: usize| -> Result<Vec<(usize, Result<Vec<T>>)>> {
        let pool = plan::pool(threads)?;
        let seat = worker % plan.devices.len().max(1);
        let mut answers = Vec::new();
        loop {
            let part = next.fetch_add(1, Ordering::Relaxed);
            if part >= parts {
                return Ok(answers);
            }
            let len = each.min(sites.len() - part * each);
            let sites = sites.narrow(part * each, len)?;
            let ask = |sites: &Sites| ask(seat, &moved(sites, plan.devices.get(seat))?);
            answers.push((part, pool.install(|| most.each(&sites, ask))));
        }
    };
    let work = &work;
    let mut answers = thread::scope(|scope| -> Result<Vec<_>> {
        let workers: Vec<_> = (0..workers).map(|w| scope.spawn(move || work(w))).collect();
        let done = workers.into_iter().map(|w| w.join().unwrap_or_else(|p| resume_unwind(p)));
        Ok(done.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    })?;
    answers.sort_by_key(|(part, _)| *part);
    let answers = answers.into_iter().map(|(_, answers)| answers);
    Ok(answers.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

/// A few sites of many, on a card: what they share with others stays behind. The processor's stay.
fn moved(sites: &Sites, device: Option<&Device>) -> Result<Sites> {
    let Some(device) = device.filter(|device| !device.is_cpu()) else { return Ok(sites.clone()) };
    sites.map(|x| Ok(x.force_contiguous()?.to_device(device)?))
}

/// Runs a stage; what goes wrong is news.
fn reported(news: &Sender<News>, stage: impl FnOnce() -> Result<()>) {
    let _ = match catch_unwind(AssertUnwindSafe(stage)) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => news.send(News::Failed(error)),
        Err(panic) => news.send(News::Panicked(panic)),
    };
}

impl Stage<'_> {
    /// Opens one window after another, and asks about its wanted pixels.
    fn read(
        &self,
        permits: &Receiver<()>,
        news: &Sender<News>,
        question: Sender<Question>,
    ) -> Result<()> {
        for (index, window) in self.grid.windows(self.plan.tile).enumerate() {
            if permits.recv().is_err() {
                break;
            }
            let valid = self.grid.valid(window);
            let (x, y) = self.grid.centres(window, &valid);
            let parts = x.len().div_ceil(self.targets);
            let open = Open {
                window,
                valid,
                values: vec![vec![f32::NAN; x.len()]; self.specs.len()],
                tallies: vec![None; parts],
            };
            if news.send(News::Opened(open)).is_err() {
                break;
            }
            if parts == 0 {
                continue;
            }
            let sites = self.frame.sites(&self.grid.crs, &x, &y, &Device::Cpu)?;
            // Parts of one size: no thread is left with a large last one.
            let each = x.len().div_ceil(parts);
            for (part, start) in (0..x.len()).step_by(each).enumerate() {
                let sites = sites.narrow(start, each.min(x.len() - start))?;
                if question.send(Question { window: index, part, start, sites }).is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Answers questions on device `seat` until there are no more, or nobody listens.
    fn answer(
        &self,
        seat: usize,
        questions: &Mutex<Receiver<Question>>,
        news: &Sender<News>,
        pool: &ThreadPool,
    ) -> Result<()> {
        loop {
            let next = questions.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(Question { window, part, start, sites }) = next else { return Ok(()) };
            let (values, tally) = pool.install(|| self.ask(seat, &sites))?;
            if news.send(News::Answered { window, part, start, values, tally }).is_err() {
                return Ok(());
            }
        }
    }

    /// The values of every product at `sites`, and what they come to.
    fn ask(&self, seat: usize, sites: &Sites) -> Result<(Vec<Vec<f32>>, Tally)> {
        let answers = self.part.each(sites, |sites| self.ask_part(seat, sites))?;
        let mut answers = answers.into_iter();
        let first = answers.next().unwrap_or_default();
        Ok(answers.fold(first, |(mut values, tally), (more, other)| {
            values.iter_mut().zip(more).for_each(|(values, more)| values.extend(more));
            (values, tally.and(other))
        }))
    }

    /// The same in one call of the posterior.
    fn ask_part(&self, seat: usize, sites: &Sites) -> Result<(Vec<Vec<f32>>, Tally)> {
        let device = self.plan.devices.get(seat);
        let predictive = self.posteriors[seat].at(&moved(sites, device)?)?;
        let predictive = predictive.marginals(0, self.plan.of)?;
        let marginals = self.frame.outcome(predictive);
        if marginals.len() != sites.len() {
            return Err(Error::axis("targets asked and answered", sites.len(), marginals.len()));
        }
        let host = sites.host()?;
        let km = self
            .nearest
            .iter()
            .flat_map(|nearest| host[0].iter().map(|s| self.frame.km(nearest.distance(s))));
        let around = Around { km: km.collect(), spread: self.spread };
        let values = self.specs.iter().map(|spec| spec.values(&marginals, &around)).collect();
        let mut tally = Tally { pixels: sites.len(), ..Tally::NONE };
        for mean in marginals.map(|m, i| m.mean_sd(i).0) {
            tally.lowest = mean.min(tally.lowest);
            tally.highest = mean.max(tally.highest);
            tally.total += mean;
        }
        tally.far = host[0].iter().filter(|s| !self.near.reaches(s)).count();
        Ok((values, tally))
    }

    /// Puts answers in their places, and hands whole windows on in order.
    fn gather(
        &self,
        told: Receiver<News>,
        finish: Sender<Open>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Tally> {
        let wanted = self.grid.wanted();
        let (mut done, mut sum) = (0, Tally::NONE);
        let mut open: VecDeque<Open> = VecDeque::new();
        let mut first = 0; // index of the window that `open` starts with
        for news in told {
            match news {
                News::Opened(window) => open.push_back(window),
                News::Answered { window, part, start, values, tally } => {
                    let at = &mut open[window - first];
                    for (whole, values) in at.values.iter_mut().zip(values) {
                        whole[start..start + values.len()].copy_from_slice(&values);
                    }
                    at.tallies[part] = Some(tally);
                    done += tally.pixels;
                    progress(done, wanted);
                }
                News::Failed(error) => return Err(error),
                News::Panicked(panic) => resume_unwind(panic),
            }
            while open.front().is_some_and(|w| w.tallies.iter().all(Option::is_some)) {
                let Some(whole) = open.pop_front() else { break };
                first += 1;
                // In order of place, so that sums do not depend on who was first.
                sum = whole.tallies.iter().flatten().fold(sum, |sum, tally| sum.and(*tally));
                if finish.send(whole).is_err() {
                    return Ok(sum); // the writer stopped, and says why
                }
            }
        }
        Ok(sum)
    }
}

/// Writes whole windows, and lets as many be opened.
fn write(
    products: &mut [Box<dyn Product>],
    finished: &Receiver<Open>,
    permit: &Sender<()>,
) -> Result<()> {
    for Open { window, valid, values, .. } in finished {
        for (product, values) in products.iter_mut().zip(values) {
            product.accept(window, &product::scatter(&valid, &values)?)?;
        }
        let _ = permit.send(()); // nobody listens once all windows are open
    }
    Ok(())
}
