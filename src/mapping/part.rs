//! How much a posterior is asked at once, where a card turns out to have less memory than planned.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::plan::LEAST_TARGETS;
use crate::{
    error::{Error, Result},
    sites::Sites,
};

/// The most targets in one call of a posterior; half as many each time that memory runs out.
pub struct Part {
    planned: usize,
    most: AtomicUsize,
}

impl Part {
    /// As many as `planned`, until a device refuses.
    pub fn new(planned: usize) -> Self {
        Part { planned: planned.max(1), most: AtomicUsize::new(planned.max(1)) }
    }

    /// What it came down to, where that is less than was planned.
    pub fn less(&self) -> Option<usize> {
        let most = self.most.load(Ordering::Relaxed);
        (most < self.planned).then_some(most)
    }

    /// `ask` about all `sites`, part by part; the answers in order. A part that a device has too
    /// little memory for is asked again in halves; any other error is returned as it is.
    ///
    /// # Errors
    /// The first of `ask`'s; [`Error::Input`] if memory runs out for the smallest part, too.
    pub fn each<T>(&self, sites: &Sites, ask: impl Fn(&Sites) -> Result<T>) -> Result<Vec<T>> {
        let (all, mut start) = (sites.len(), 0);
        let mut answers = Vec::new();
        while start < all {
            let len = self.most.load(Ordering::Relaxed).min(all - start);
            let answer = if len == all { ask(sites) } else { ask(&sites.narrow(start, len)?) };
            match answer {
                Ok(answer) => {
                    answers.push(answer);
                    start += len;
                }
                Err(error) if error.is_out_of_memory() => self.halve(len, &error)?,
                Err(error) => return Err(error),
            }
        }
        Ok(answers)
    }

    /// Asks less from now on, where `len` targets were too many.
    fn halve(&self, len: usize, error: &Error) -> Result<()> {
        if len > LEAST_TARGETS {
            self.most.fetch_min((len / 2).max(LEAST_TARGETS), Ordering::Relaxed);
            return Ok(());
        }
        let said = error.to_string();
        Err(Error::input("the device has no memory left to answer with")
            .fact("targets at once", len)
            .fact("reason", said.lines().next().unwrap_or_default())
            .try_this("wait for what else runs on the card (nvidia-smi), or use --device cpu"))
    }
}
