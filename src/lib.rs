//! Amortised geostatistics: survey tables in, prevalence and uncertainty maps out.
//!
//! Two verbs carry the library: [`Process::condition`] on a context, then ask the posterior
//! [`Posterior::at`] some sites. Neural processes and exact Gaussian processes answer both.
#![deny(missing_docs, unused_must_use)]

pub mod attention;
pub mod baseline;
mod bench;
mod benchmark;
pub mod checkpoint;
pub mod cli;
pub mod device;
pub mod error;
pub mod fused;
pub mod geo;
pub mod kernel;
pub mod likelihood;
pub mod linalg;
pub mod mapping;
pub mod model;
pub mod picture;
pub mod predictive;
pub mod prior;
pub mod process;
pub mod product;
pub mod recipe;
pub mod registry;
pub mod rng;
pub mod score;
pub mod settings;
pub mod sites;
pub mod task;
pub mod train;
mod whole;

pub use error::{Error, Result};
pub use predictive::{Draws, Link, Marginals, Of, Predictive};
pub use process::{Posterior, Process};
pub use rng::Stream;
pub use sites::{Observations, Sites, Task};
