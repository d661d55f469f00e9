//! Weights and card in one file; reopening rebuilds the model from the registry.
//!
//! The file is safetensors; the card is JSON under the metadata key `isopleth`. Written to a
//! temporary name and renamed, so that a file under its own name is always whole.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use crate::{
    attention::Reading,
    error::{Error, Result},
    geo::covariates::{Head, KNOWN, Lattice, Spec, VALUES},
    likelihood::{self, Likelihood},
    model::{self, Problem, params::Params},
    process::Process,
    recipe::Recipe,
    registry, whole,
};

/// Version of the file format; another version is refused.
pub const FORMAT: u32 = 1;

/// What a checkpoint says about itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Card {
    /// Version of the file format.
    pub format: u32,
    /// Version of the library that wrote it.
    pub isopleth: String,
    /// Name of the model.
    pub name: String,
    /// What it predicts, in plain words.
    pub predicts: String,
    /// The recipe, as TOML: model, prior, design, training.
    pub recipe: String,
    /// Numbers learned.
    pub parameters: usize,
    /// Seed of the training.
    pub seed: u64,
    /// Steps trained when the file was written.
    pub steps: u64,
    /// Step whose weights these are: the best by validation.
    pub best_step: u64,
    /// Tasks seen.
    pub tasks: u64,
    /// What the weights started from, where not from a random draw.
    #[serde(default)]
    pub started_from: Option<String>,
    /// Validation loss of these weights, nats per target.
    pub validation: Option<f64>,
    /// The exact GP's loss on the same tasks, given the true hyperparameters.
    pub exact_gp: Option<f64>,
    /// Seconds of training, all resumed parts together.
    pub seconds: f64,
    /// Machine it was trained on, in words.
    pub machine: String,
    /// Day it was written, UTC.
    pub date: String,
    /// The covariates that it reads and where their rasters were read; those are among the tensors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub covariates: Option<Head>,
    /// Measured scores, by name.
    #[serde(default)]
    pub scores: serde_json::Map<String, serde_json::Value>,
}

/// Tensors with a card.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// What the file says about itself.
    pub card: Card,
    /// Parameters by path, on the CPU.
    pub tensors: BTreeMap<String, Tensor>,
}

/// Models that come inside the binary.
const SHIPPED: &[Shipped] = &[
    Shipped {
        name: "prevalence",
        about: "binomial counts: prevalence surface and new village, for surveys on the plane",
        bytes: include_bytes!("../models/prevalence.safetensors"),
    },
    Shipped {
        name: "prevalence-st",
        about: "binomial counts at several times: prevalence surface and new village, on the plane",
        bytes: include_bytes!("../models/prevalence-st.safetensors"),
    },
    Shipped {
        name: "continuous",
        about: "continuous values: surface and new noisy value, for surveys on the plane",
        bytes: include_bytes!("../models/continuous.safetensors"),
    },
    Shipped {
        name: "kriging-values",
        about: "continuous values at any number of sites: kriging under covariances read off the data",
        bytes: include_bytes!("../models/kriging-values.safetensors"),
    },
    Shipped {
        name: "kriging-counts",
        about: "binomial counts at any number of sites: kriging under covariances read off the data",
        bytes: include_bytes!("../models/kriging-counts.safetensors"),
    },
];

struct Shipped {
    name: &'static str,
    about: &'static str,
    bytes: &'static [u8],
}

impl registry::Named for Shipped {
    fn name(&self) -> &str {
        self.name
    }
    fn about(&self) -> &str {
        self.about
    }
}

/// Names of the models that come inside the binary, with one line on each.
pub fn shipped() -> Vec<(&'static str, &'static str)> {
    SHIPPED.iter().map(|s| (s.name, s.about)).collect()
}

impl Checkpoint {
    /// A shipped model by name, or a file by path.
    ///
    /// # Errors
    /// [`Error::Unknown`] if it is neither; otherwise as [`Checkpoint::open`].
    pub fn resolve(name: &str) -> Result<Self> {
        let path = Path::new(name);
        if path.is_file() {
            return Self::open(path);
        }
        if name.contains(['/', '\\']) || path.extension().is_some() {
            let missing = std::io::Error::from(std::io::ErrorKind::NotFound);
            return Err(Error::io("read the model", path, missing));
        }
        Self::parse(registry::find("model", SHIPPED, name)?.bytes, name)
    }

    /// Opens a checkpoint file.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::Input`] if it is truncated, not a model of
    /// ours, or of another version.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io("read the model", path, e))?;
        Self::parse(&bytes, &path.display().to_string())
    }

    fn parse(bytes: &[u8], name: &str) -> Result<Self> {
        let broken = |what: &str, reason: String| {
            Error::input(what)
                .fact("model", name)
                .fact("reason", reason)
                .try_this("copy the file again, or train it with `isopleth train`")
        };
        let (_, header) = SafeTensors::read_metadata(bytes)
            .map_err(|e| broken("the model file is truncated or not a model", format!("{e:?}")))?;
        let card = header.metadata().as_ref().and_then(|m| m.get("isopleth")).ok_or_else(|| {
            broken("the model file was not written by isopleth", "it has no card".into())
        })?;
        let version: serde_json::Value = serde_json::from_str(card)
            .map_err(|e| broken("the model's card cannot be read", e.to_string()))?;
        let format = version.get("format").and_then(serde_json::Value::as_u64);
        if format != Some(u64::from(FORMAT)) {
            return Err(Error::input("the model file is of another version")
                .fact("model", name)
                .fact("its format", format.map_or("unknown".into(), |f| f.to_string()))
                .fact("this binary reads", FORMAT)
                .try_this("use the isopleth that wrote it, or train it again"));
        }
        let card: Card = serde_json::from_value(version)
            .map_err(|e| broken("the model's card cannot be read", e.to_string()))?;
        let file = SafeTensors::deserialize(bytes)
            .map_err(|e| broken("the model file is truncated or not a model", format!("{e:?}")))?;
        let mut tensors = BTreeMap::new();
        for (path, view) in file.tensors() {
            if view.dtype() != Dtype::F32 {
                return Err(broken("the model holds numbers of an unknown kind", path));
            }
            let values: Vec<f32> = view
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect();
            if values.iter().any(|v| !v.is_finite()) {
                return Err(broken("the model holds values that are not finite", path));
            }
            tensors.insert(path, Tensor::from_vec(values, view.shape(), &Device::Cpu)?);
        }
        Ok(Checkpoint { card, tensors })
    }

    /// Writes the file: temporary name, sync, rename.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses; nothing stands under `path` then that was not there.
    pub fn write(&self, path: &Path) -> Result<()> {
        let card = serde_json::to_string(&self.card).expect("a card is plain data");
        write_tensors(path, &self.tensors, HashMap::from([("isopleth".to_string(), card)]))
    }

    /// The recipe in the card, with what the file holds of its rasters.
    pub fn recipe(&self) -> Result<Recipe> {
        let recipe = Recipe::parse(&self.card.recipe)?;
        Ok(match &self.card.covariates {
            Some(head) => recipe.on(Arc::new(Lattice::of(head.clone(), &self.tensors)?)),
            None => recipe,
        })
    }

    /// The covariates that the model was trained with; none for most.
    pub fn covariates(&self) -> &[Spec] {
        self.card.covariates.as_ref().map_or(&[], |head| &head.specs)
    }

    /// Whether the model takes time linear in the sites and holds at any number of them.
    pub fn any_size(&self) -> bool {
        let kind = |recipe: Recipe| {
            let kind = recipe.table("model").ok()?.get("kind")?.as_str()?.to_string();
            Some(kind)
        };
        self.recipe().ok().and_then(kind).as_deref() == Some(model::kriging::ENTRY.name)
    }

    /// How observations arise for this model.
    pub fn likelihood(&self) -> Result<&'static dyn Likelihood> {
        likelihood::find(&self.recipe()?.likelihood()?)
    }

    /// Rebuilds the network, to be asked and not to be trained.
    ///
    /// # Errors
    /// [`Error::Input`] if the weights do not fit the recipe in the card.
    pub fn process(&self, device: &Device) -> Result<Box<dyn Process + Send + Sync>> {
        self.process_reading(device, Reading::default())
    }

    /// [`Checkpoint::process`] for a model whose contexts are read in a way of their own.
    ///
    /// # Errors
    /// As there.
    pub fn process_reading(
        &self,
        device: &Device,
        reading: Reading,
    ) -> Result<Box<dyn Process + Send + Sync>> {
        let recipe = self.recipe()?;
        let tasks = recipe.tasks()?;
        let covariates = tasks.features();
        let problem =
            Problem { reading, covariates, ..Problem::new(tasks.dim(), tasks.likelihood()) };
        let mut weights = self.tensors.clone();
        weights.retain(|name, _| ![VALUES, KNOWN].contains(&name.as_str()));
        let mut params = Params::frozen(weights, device, DType::F32);
        let process = model::build(recipe.table("model")?, problem, &mut params)?;
        if let Some(extra) = params.unused().first() {
            return Err(Error::input("the model file holds a parameter that its recipe lacks")
                .fact("parameter", extra)
                .try_this("the card does not fit these weights; train it again"));
        }
        Ok(process)
    }
}

/// Writes f32 tensors with metadata, atomically.
pub(crate) fn write_tensors(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: HashMap<String, String>,
) -> Result<()> {
    let mut raw: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let values = tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        raw.push((name.clone(), tensor.dims().to_vec(), bytes));
    }
    let mut views = Vec::with_capacity(raw.len());
    for (name, shape, bytes) in &raw {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes)
            .map_err(|e| Error::input(format!("tensor `{name}` cannot be written: {e:?}")))?;
        views.push((name.clone(), view));
    }
    let bytes = safetensors::serialize(views, Some(metadata))
        .map_err(|e| Error::input(format!("the model cannot be written: {e:?}")))?;
    whole::write_bytes(path, &bytes)
}

/// Today's date, UTC, as year-month-day. The civil calendar from days since 1970 is Hinnant's.
pub fn today() -> String {
    let seconds = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs() as i64);
    let z = seconds.div_euclid(86_400) + 719_468;
    let era = z.div_euclid(146_097);
    let day = z.rem_euclid(146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let rest = day - (365 * year + year / 4 - year / 100);
    let shifted = (5 * rest + 2) / 153;
    let (d, m) = (rest - (153 * shifted + 2) / 5 + 1, (shifted + 2) % 12 + 1);
    format!("{:04}-{m:02}-{d:02}", year + era * 400 + i64::from(m <= 2))
}
