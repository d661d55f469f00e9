//! Windows on the command line: how a survey larger than those a model was trained on is read.

use std::str::FromStr;

use super::map::plural;
use crate::{
    checkpoint::Checkpoint,
    error::{Error, Result},
    mapping::windows::{self, Cut},
    task::Tasks,
};

/// A survey of more than so many times the sites of the largest training survey is cut into windows,
/// unless the user says otherwise.
const LARGER: usize = 2;

/// How a large survey is read.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct WindowArgs {
    /// Read the survey in overlapping windows of so many sites, blended without seams, as a trained model
    /// knows them; or `off`, all of it at once. When left out, surveys of more than twice the sites of
    /// the largest that the model was trained on are cut
    #[arg(long, value_name = "SITES|off")]
    windows: Option<Choice>,
}

/// What was typed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Choice {
    /// All sites at once.
    Off,
    /// Windows of so many.
    Of(usize),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match (text, text.parse()) {
            ("off", _) => Ok(Choice::Off),
            (_, Ok(sites)) => Ok(Choice::Of(sites)),
            _ => Err("write a number of sites, such as 500, or off".into()),
        }
    }
}

impl WindowArgs {
    /// How `sites` are cut for a model that learned from `tasks`; nothing where they are read at once.
    ///
    /// # Errors
    /// [`Error::Input`] for windows too small to know anything, or of a model that reads times or
    /// covariates.
    pub(super) fn cut(&self, tasks: &Tasks, sites: usize) -> Result<Option<Cut>> {
        let design = tasks.design();
        // A window has a frame of places, and none of times and covariates.
        let more = match (design.has_times(), tasks.features() > 0) {
            (true, _) => Some("times"),
            (_, true) => Some("covariates that the model reads"),
            _ => None,
        };
        if let Some(more) = more {
            return match self.windows {
                Some(Choice::Of(few)) => {
                    Err(Error::input(format!("windows do not hold sites with {more} yet"))
                        .fact("--windows", few)
                        .try_this("leave --windows out, and all sites are read at once"))
                }
                _ => Ok(None),
            };
        }
        Ok(match self.windows {
            Some(Choice::Off) => None,
            Some(Choice::Of(few)) if few < windows::LEAST => return Err(windows::small(few)),
            Some(Choice::Of(few)) => (few < sites).then(|| Cut::of(few)),
            None => {
                let most = LARGER * windows::most(design);
                (sites > most).then(|| Cut::learned(design))
            }
        })
    }

    /// As [`WindowArgs::cut`], of a trained model, which may hold at any size by itself.
    ///
    /// # Errors
    /// [`Error::Input`] for windows too small to know anything, or of a model that has its own.
    pub(super) fn of(&self, checkpoint: &Checkpoint, sites: usize) -> Result<Option<Cut>> {
        if checkpoint.any_size() {
            self.refused(&checkpoint.card.name)?;
            return Ok(None);
        }
        self.cut(&checkpoint.recipe()?.tasks()?, sites)
    }

    /// Refuses windows for a process that needs none.
    ///
    /// # Errors
    /// [`Error::Input`] if a number of sites was asked for.
    pub(super) fn refused(&self, model: &str) -> Result<()> {
        match self.windows {
            Some(Choice::Of(few)) => Err(Error::input("windows are for trained models")
                .fact("--windows", few)
                .fact("model", model)
                .try_this("leave --windows out: a Gaussian process knows any number of sites")),
            _ => Ok(()),
        }
    }
}

/// A cut in words.
pub(super) fn about(cut: &Cut, sites: usize) -> String {
    format!(
        "{sites} sites in overlapping windows of up to {} site{}, each in a frame of its own; --windows off \
         reads them all at once",
        cut.sites,
        plural(cut.sites)
    )
}
