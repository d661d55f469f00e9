//! Items made ahead of their use by several workers, and handed over in order.
//!
//! Item `i` is the same whoever makes it and when, so the number of workers changes nothing but the
//! time; no more than a bounded number of items wait at once.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread::Scope,
};

/// What workers and the one who takes share.
struct Shelf<T> {
    /// The next item to make.
    next: u64,
    /// The next item to hand over.
    wanted: u64,
    end: u64,
    made: BTreeMap<u64, T>,
    /// Nobody wants more, or a worker is lost.
    closed: bool,
    lost: bool,
}

/// Makes items `indices.start, …` ahead of [`Ahead::take`].
pub struct Ahead<T> {
    shelf: Mutex<Shelf<T>>,
    changed: Condvar,
    /// Items that may wait or be in the making.
    most: u64,
}

impl<T: Send> Ahead<T> {
    /// Room for `most` items; see [`Ahead::start`].
    pub fn new(indices: Range<u64>, most: usize) -> Self {
        let shelf = Shelf {
            next: indices.start,
            wanted: indices.start,
            end: indices.end,
            made: BTreeMap::new(),
            closed: false,
            lost: false,
        };
        Ahead { shelf: Mutex::new(shelf), changed: Condvar::new(), most: most.max(1) as u64 }
    }

    fn lock(&self) -> MutexGuard<'_, Shelf<T>> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets `workers` threads of `scope` to work; they end with the last item, or with
    /// [`Ahead::close`].
    pub fn start<'scope, 'env>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        workers: usize,
        make: &'env (impl Fn(u64) -> T + Sync),
    ) {
        for _ in 0..workers.max(1) {
            scope.spawn(move || self.work(make));
        }
    }

    fn work(&self, make: &impl Fn(u64) -> T) {
        /// Tells the one who waits that an item will never come.
        struct Lost<'a, T: Send>(&'a Ahead<T>);
        impl<T: Send> Drop for Lost<'_, T> {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    let mut shelf = self.0.lock();
                    (shelf.lost, shelf.closed) = (true, true);
                    self.0.changed.notify_all();
                }
            }
        }
        let _lost = Lost(self);
        loop {
            let mut shelf = self.lock();
            while !shelf.closed && shelf.next < shelf.end && shelf.next >= shelf.wanted + self.most
            {
                shelf = self.changed.wait(shelf).unwrap_or_else(PoisonError::into_inner);
            }
            if shelf.closed || shelf.next >= shelf.end {
                return;
            }
            let index = shelf.next;
            shelf.next += 1;
            drop(shelf);
            let item = make(index);
            self.lock().made.insert(index, item);
            self.changed.notify_all();
        }
    }

    /// The next item in order, waited for; nothing after the last one.
    ///
    /// # Panics
    /// If a worker panicked: a bug in what it makes.
    pub fn take(&self) -> Option<T> {
        let mut shelf = self.lock();
        loop {
            assert!(!shelf.lost, "a worker that draws tasks panicked");
            if shelf.wanted >= shelf.end {
                return None;
            }
            let wanted = shelf.wanted;
            if let Some(item) = shelf.made.remove(&wanted) {
                shelf.wanted += 1;
                self.changed.notify_all();
                return Some(item);
            }
            shelf = self.changed.wait(shelf).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets the workers stop after what they are making.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }
}

/// Closes when dropped, so that no way out of a training leaves workers waiting.
pub struct Closing<'a, T: Send>(pub &'a Ahead<T>);

impl<T: Send> Drop for Closing<'_, T> {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn items_come_in_order_for_any_number_of_workers_and_no_more_wait_than_may() {
        for (workers, most) in [(1, 1), (1, 4), (3, 1), (4, 2), (4, 9)] {
            let (made, taken, worst) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
            let ahead = Ahead::new(5..40, most);
            let make = |i: u64| {
                let began = made.fetch_add(1, Ordering::SeqCst) + 1;
                worst.fetch_max(began - taken.load(Ordering::SeqCst), Ordering::SeqCst);
                // Some take longer, so that they finish out of order.
                std::thread::sleep(std::time::Duration::from_micros(i * 7919 % 500));
                i * i
            };
            std::thread::scope(|scope| {
                ahead.start(scope, workers, &make);
                let _closing = Closing(&ahead);
                for i in 5..40 {
                    assert_eq!(ahead.take(), Some(i * i), "{workers} workers");
                    taken.fetch_add(1, Ordering::SeqCst);
                }
                assert_eq!(ahead.take(), None);
            });
            // One more than may wait: it was taken, and not yet counted.
            let worst = worst.into_inner();
            assert!(worst <= most as u64 + 1, "{worst} items for room of {most}");
        }
    }

    #[test]
    fn who_leaves_early_leaves_nobody_waiting() {
        let ahead = Ahead::new(0..u64::MAX, 2);
        std::thread::scope(|scope| {
            ahead.start(scope, 3, &|i| i);
            let _closing = Closing(&ahead);
            assert_eq!((ahead.take(), ahead.take()), (Some(0), Some(1)));
        });
    }

    #[test]
    fn a_worker_that_panics_is_not_waited_for() {
        let ended = std::panic::catch_unwind(|| {
            let ahead = Ahead::new(0..9, 2);
            std::thread::scope(|scope| {
                ahead.start(scope, 1, &|i| if i == 1 { panic!("on purpose") } else { i });
                let _closing = Closing(&ahead);
                while ahead.take().is_some() {}
            });
        });
        assert!(ended.is_err());
    }
}
