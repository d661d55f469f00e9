//! Posterior mean of the outcome, by quadrature on the link scale.

use super::{Entry, Reads, Scale};

/// `mean`.
pub const ENTRY: Entry = Entry {
    name: "mean",
    about: "posterior mean, outcome units",
    parameter: None,
    scale: Scale::Level,
    reads: Reads::Parameter,
    title: |outcome, _| format!("Mean {outcome}"),
    value: |marginals, i, _| marginals.mean_sd(i).0,
};
