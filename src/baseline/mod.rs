//! Classical processes: the yardstick of every model, and what a user can ask for instead.

pub mod exact_gp;
mod nelder_mead;
pub mod rules;

pub use exact_gp::ExactGp;
