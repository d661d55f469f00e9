//! Posterior quantile of the outcome.

use super::{Entry, Parameter, Reads, Scale, short};

/// `quantile:LEVEL`.
pub const ENTRY: Entry = Entry {
    name: "quantile",
    about: "posterior quantile at a level, outcome units; quantile:0.025",
    parameter: Some(Parameter { name: "level", example: "0.025", threshold: false }),
    scale: Scale::Level,
    reads: Reads::Parameter,
    title: |outcome, level| format!("{} % quantile of {outcome}", short(100.0 * level)),
    value: |marginals, i, level| marginals.quantile(i, level),
};
