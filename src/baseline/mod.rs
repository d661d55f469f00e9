//! Classical processes: the yardstick of every model, and what a user can ask for instead.

mod columns;
mod elimination;
pub mod exact_gp;
mod field;
pub mod integrated;
mod kriging;
mod latent;
mod likely;
pub mod nearest;
pub(crate) mod neighbours;
pub(crate) mod nelder_mead;
pub mod regression;
pub mod rules;
pub mod sequential;
mod spectral;
mod system;
pub mod variogram;

pub use exact_gp::ExactGp;
pub use integrated::IntegratedGp;
pub use nearest::NearestGp;
pub use regression::{Coefficients, Regressed};
