//! Laws of kernels, scores and exact Gaussian processes, over everything registered.

#[path = "contract/kernels.rs"]
mod kernels;
#[path = "golden/surveys.rs"]
mod surveys;
