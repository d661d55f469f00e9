//! How a survey is read by a model's attention, where the user says: speed for a stated error.

use crate::{
    attention::{Precision, Reading},
    error::{Error, Result},
};

/// Flags that trade exactness for speed.
#[derive(Debug, Clone, clap::Args)]
pub struct ReadingArgs {
    /// Share of its attention that a pixel may lose where sites are too faint to matter: faster for
    /// large surveys. 0 loses nothing
    #[arg(long, default_value_t = 0.0, value_name = "SHARE")]
    lose: f64,
    /// Numbers that hold the survey's keys and values: bf16 halves the memory of a large survey and
    /// moves a map by up to half a percent of its range. On a GPU it is a matter of speed only, and
    /// there is tf32, right to a tenth of a percent
    #[arg(long, default_value = "f32", value_parser = ["f32", "tf32", "bf16"])]
    precision: String,
}

impl ReadingArgs {
    /// What was asked for.
    ///
    /// # Errors
    /// [`Error::Input`] for a share that is none.
    pub fn reading(&self) -> Result<Reading> {
        if !(0.0..=0.1).contains(&self.lose) {
            return Err(Error::input("--lose is a share of the attention, from 0 to 0.1")
                .fact("--lose", self.lose)
                .try_this("give --lose 1e-3, which changes a map by less than it can show"));
        }
        let precision = Precision::called(&self.precision).unwrap_or_default();
        Ok(Reading { lose: self.lose, precision })
    }
}
