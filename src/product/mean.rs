//! Posterior mean of the outcome, by quadrature on the link scale.

use super::{Entry, Scale};

/// `mean`.
pub const ENTRY: Entry = Entry {
    name: "mean",
    about: "posterior mean, outcome units",
    parameter: None,
    scale: Scale::Level,
    title: |outcome, _| format!("Mean {outcome}"),
    value: |marginals, i, _| marginals.mean_sd(i).0,
};
