//! Joint draws on the command line: where their dependence comes from, and the file they go to.

use std::path::Path;

use candle_core::Device;

use super::map::Model;
use crate::{
    error::{Error, Result},
    geo::{
        frame::Frame,
        geotiff::{Band, Stack},
        grid::Grid,
        survey::Survey,
    },
    mapping::{
        dependence,
        draws::{self, Surfaces},
        plan::Bytes,
    },
    predictive::Link,
    process::{Field, Posterior, Process},
    product::Outcome,
    sites::Observations,
};

/// Name of the draws in an output directory, at a time where there are several.
pub(super) fn file(time: Option<&str>) -> String {
    time.map_or("draws.tif".into(), |time| format!("draws_{time}.tif"))
}

/// Bytes of draws beyond which a number is taken for a slip.
const MOST: usize = 200 << 30;

/// Refuses draws, at so many times, that no disk is meant for.
///
/// # Errors
/// [`Error::Input`] for no draws at all, or for too many.
pub(super) fn check_disk([draws, times]: [usize; 2], grid: &Grid) -> Result<()> {
    if draws == 0 {
        return Err(Error::input("no surface is asked for").try_this("ask for --draws 100, say"));
    }
    let bytes = grid.len().saturating_mul(4 * times).saturating_mul(draws);
    // A band is numbered by 16 bits.
    if bytes <= MOST && draws <= 65_535 {
        return Ok(());
    }
    Err(Error::input("so many draws do not belong on a disk")
        .fact("draws", draws)
        .fact("pixels", grid.len())
        .fact("disk needed", format!("{}, before compression", Bytes(bytes)))
        .try_this(
            "ask for fewer draws or a coarser grid; `isopleth areas` makes district means of as \
             many draws without keeping them",
        ))
}

/// Where the dependence between places comes from.
pub(super) struct Joint {
    /// A process found for it; nothing where the model has joint draws of its own.
    fitted: Option<Box<dyn Process + Send + Sync>>,
    draws: usize,
    /// In words.
    pub about: String,
}

impl Joint {
    /// The model's own joint draws, or those of a Gaussian process that moves as the model does, or where
    /// that cannot be asked is fitted to the same survey.
    ///
    /// # Errors
    /// What asking and fitting return.
    pub fn prepare(
        model: &Model,
        posterior: &dyn Posterior,
        (survey, context): (&Survey, &Observations),
        (grid, frame, device): (&Grid, &Frame, &Device),
        draws: usize,
    ) -> Result<Self> {
        // One draw tells whether there are any, and costs nothing beside the fit.
        match posterior.field(1, 0, 2.0) {
            Ok(_) => {
                return Ok(Joint {
                    fitted: None,
                    draws,
                    about: "from the model's own posterior".into(),
                });
            }
            Err(Error::NoJointDraws) => {}
            Err(error) => return Err(error),
        }
        // Displaced sites are told apart by their number: one more cannot be told.
        let askable = survey.displacement.is_none() && dependence::can_be_asked(context);
        let places = askable.then(|| dependence::anchors(grid, frame, context.len(), device));
        let places = places.transpose()?.filter(|places| places.len() >= dependence::FEWEST);
        let (fitted, whose): (Box<dyn Process + Send + Sync>, _) = match places {
            Some(places) => {
                let context = context.to_device(device)?;
                let asked: (&dyn Process, _) = (&*model.process, posterior);
                let gp = dependence::learned(asked, &context, &places, model.likelihood)?;
                (Box::new(gp), "that moves as the model does when it is told of one village more")
            }
            None => (dependence::fitted(context, model.likelihood)?, "fitted to the same survey"),
        };
        let about = format!(
            "each place as the model has it, the dependence between places from a Gaussian process {whose}"
        );
        Ok(Joint { fitted: Some(fitted), draws, about })
    }

    /// The fitted process, given the survey.
    ///
    /// # Errors
    /// What conditioning returns.
    pub fn condition(&self, context: &Observations) -> Result<Option<Box<dyn Posterior + '_>>> {
        self.fitted.as_ref().map(|process| process.condition(context)).transpose()
    }

    /// The field that draws are made from.
    ///
    /// # Errors
    /// What drawing it returns.
    pub fn field<'a>(
        &self,
        own: &'a dyn Posterior,
        fitted: Option<&'a (dyn Posterior + 'a)>,
        seed: u64,
        grid: &Grid,
        frame: &Frame,
    ) -> Result<Box<dyn Field + 'a>> {
        fitted.unwrap_or(own).field(self.draws, seed, draws::extent(grid, frame))
    }

    /// Draws with the model's marginals.
    pub fn surfaces<'a>(
        &self,
        own: &'a dyn Posterior,
        device: &Device,
        field: &'a dyn Field,
        link: Link,
        frame: &'a Frame,
    ) -> Surfaces<'a> {
        match &self.fitted {
            None => Surfaces::own(field, link, frame),
            Some(_) => Surfaces::joined(own, device.clone(), field, link, frame),
        }
    }
}

/// What the file says of itself.
pub(super) fn tags(
    model: &str,
    outcome: &Outcome,
    seed: u64,
    joint: &Joint,
) -> Vec<(String, String)> {
    let tags = [
        ("MODEL", model.to_string()),
        ("ISOPLETH_VERSION", env!("CARGO_PKG_VERSION").into()),
        ("PRODUCT", format!("draws:{}", joint.draws)),
        ("OUTCOME", outcome.name.clone()),
        ("UNIT", outcome.unit.clone()),
        ("OF", "surface".into()),
        ("SEED", seed.to_string()),
        ("DEPENDENCE", joint.about.clone()),
    ];
    tags.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
}

/// Writes every draw, tile by tile; `how` is the tile asked for and how many threads work.
///
/// # Errors
/// What drawing returns, or if the disk refuses.
pub(super) fn write(
    surfaces: &Surfaces,
    grid: &Grid,
    file: &Path,
    bands: &[Band],
    tags: &[(String, String)],
    how: [usize; 2],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<()> {
    let tile = draws::tile(how[0], bands.len());
    let mut stack = Stack::create(file, grid, bands, tags, tile)?;
    let (mut done, wanted) = (0, grid.wanted());
    draws::run(
        surfaces,
        grid,
        [tile, how[1]],
        &|window| grid.valid(window),
        &|_, valid, values| Ok((valid.to_vec(), values)),
        &mut |tile, blocks| {
            let mut layer = vec![f32::NAN; tile.len()];
            for draw in 0..bands.len() {
                for (window, (valid, values)) in &blocks {
                    let mut mine = values.iter().skip(draw).step_by(bands.len());
                    for (i, _) in valid.iter().enumerate().filter(|(_, valid)| **valid) {
                        let row = window.row - tile.row + i / window.cols;
                        let col = window.col - tile.col + i % window.cols;
                        layer[row * tile.cols + col] = *mine.next().unwrap_or(&f32::NAN);
                    }
                }
                stack.write(tile, draw, &layer)?;
            }
            done += blocks.iter().map(|(_, (_, values))| values.len()).sum::<usize>() / bands.len();
            progress(done, wanted);
            Ok(())
        },
    )?;
    stack.finish()?;
    Ok(())
}
