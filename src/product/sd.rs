//! Posterior standard deviation of the outcome.

use super::{Entry, Reads, Scale};

/// `sd`.
pub const ENTRY: Entry = Entry {
    name: "sd",
    about: "posterior standard deviation, outcome units",
    parameter: None,
    scale: Scale::Spread,
    reads: Reads::Parameter,
    title: |outcome, _| format!("Standard deviation of {outcome}"),
    value: |marginals, i, _| marginals.mean_sd(i).1,
};
