//! Width of the central credible interval: upper minus lower quantile.

use super::{Entry, Parameter, Reads, Scale, short};

/// `interval:LEVEL`.
pub const ENTRY: Entry = Entry {
    name: "interval",
    about: "width of the central credible interval, outcome units; interval:0.95",
    parameter: Some(Parameter { name: "level", example: "0.95", threshold: false }),
    scale: Scale::Spread,
    reads: Reads::Parameter,
    title: |outcome, level| {
        format!("Width of the {} % credible interval of {outcome}", short(100.0 * level))
    },
    value: |marginals, i, level| {
        let tail = 0.5 * (1.0 - level);
        marginals.quantile(i, 1.0 - tail) - marginals.quantile(i, tail)
    },
};
