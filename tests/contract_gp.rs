//! Laws of kernels, likelihoods, scores and exact Gaussian processes, over everything registered.

#[path = "contract/autoregressive.rs"]
mod autoregressive;
#[path = "contract/covariates.rs"]
mod covariates;
#[path = "contract/dependence.rs"]
mod dependence;
#[path = "contract/displaced.rs"]
mod displaced;
#[path = "contract/drawn_covariates.rs"]
mod drawn_covariates;
#[path = "contract/draws.rs"]
mod draws;
#[path = "contract/exact_gp.rs"]
mod exact_gp;
#[path = "contract/geometry.rs"]
mod geometry;
#[path = "contract/integrated_gp.rs"]
mod integrated_gp;
#[path = "contract/kernels.rs"]
mod kernels;
#[path = "contract/kriging.rs"]
mod kriging;
#[path = "contract/likelihoods.rs"]
mod likelihoods;
#[path = "contract/nearest_gp.rs"]
mod nearest_gp;
#[path = "contract/next.rs"]
mod next;
#[path = "contract/scores.rs"]
mod scores;
#[path = "contract/space_time.rs"]
mod space_time;
#[cfg(feature = "gdal")]
#[path = "golden/surveys.rs"]
mod surveys;
#[path = "contract/validate.rs"]
mod validate;
#[path = "contract/windows.rs"]
mod windows;
