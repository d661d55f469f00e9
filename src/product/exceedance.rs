//! Exceedance probability: P(outcome > threshold given the context).

use super::{Entry, Parameter, Reads, Scale, short};

/// `exceedance:THRESHOLD`.
pub const ENTRY: Entry = Entry {
    name: "exceedance",
    about: "probability above a threshold in outcome units; exceedance:0.2",
    parameter: Some(Parameter { name: "threshold", example: "0.2", threshold: true }),
    scale: Scale::Probability,
    reads: Reads::Parameter,
    title: |outcome, threshold| format!("Probability that {outcome} exceeds {}", short(threshold)),
    value: |marginals, i, threshold| marginals.exceedance(i, threshold),
};
