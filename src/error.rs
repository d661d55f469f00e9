//! One error type: what went wrong, where, and what to try next.
//!
//! The binary prints `error: …`, the facts, then `help: …`. Nothing is swallowed on the way.

use std::path::{Path, PathBuf};

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Something the user gave that cannot be used: what, the facts that show it, and what to try.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// What is wrong, one sentence without a full stop.
    pub what: String,
    /// Named facts that show where: `("file", "survey.csv")`, `("row", "17")`.
    pub facts: Vec<(String, String)>,
    /// What to try next.
    pub help: Option<String>,
}

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Input that cannot be used. Build it with [`Error::input`], [`Error::fact`], [`Error::try_this`].
    #[error("{}", .0.what)]
    Input(Box<Report>),
    /// Two tensors disagree about an axis they share.
    #[error("{what}: {left} against {right}")]
    Axis {
        /// Which axis of which arguments.
        what: String,
        /// Length on the left.
        left: String,
        /// Length on the right.
        right: String,
    },
    /// A name that is in no registry.
    #[error("there is no {kind} named `{name}`")]
    Unknown {
        /// Which registry: "model", "prior", …
        kind: &'static str,
        /// What was asked for.
        name: String,
        /// The closest registered name, where one is close.
        nearest: Option<String>,
        /// Every registered name.
        known: Vec<String>,
    },
    /// A covariance that stayed indefinite for every jitter on the ladder.
    #[error("a {size} × {size} covariance is not positive definite, even with jitter {jitter:e}")]
    NotPositiveDefinite {
        /// Rows of the matrix.
        size: usize,
        /// Largest jitter tried, in units of the mean diagonal.
        jitter: f64,
    },
    /// The process predicts each target on its own and cannot draw jointly.
    #[error("this process predicts each target on its own and cannot draw surfaces jointly")]
    NoJointDraws,
    /// A model that reads time at every site, and sites without.
    #[error("the checkpoint expects time at every site; the observations have none")]
    MissingTime {
        /// The model, as it was named.
        checkpoint: String,
        /// The table of observations.
        observations: PathBuf,
        /// Its columns.
        columns: String,
    },
    /// A file could not be read or written.
    #[error("could not {action} {}: {source}", .path.display())]
    Io {
        /// "read", "write", "rename to", …
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A tensor operation failed: a bug in this crate, or a device that refused.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
    /// GDAL refused.
    #[cfg(feature = "gdal")]
    #[error("GDAL: {0}")]
    Gdal(#[from] gdal::errors::GdalError),
    /// Parquet refused.
    #[error("Parquet: {0}")]
    Parquet(#[from] parquet::errors::ParquetError),
    /// Arrow refused.
    #[error("Arrow: {0}")]
    Arrow(#[from] arrow::error::ArrowError),
}

impl Error {
    /// Starts a report about unusable input.
    ///
    /// ```
    /// use isopleth::Error;
    /// let e = Error::input("the survey has no column `lat`").fact("file", "s.csv").try_this("name it with --lat COLUMN");
    /// assert_eq!(e.help().unwrap(), "name it with --lat COLUMN");
    /// assert_eq!(e.facts(), vec![("file".to_string(), "s.csv".to_string())]);
    /// ```
    pub fn input(what: impl Into<String>) -> Self {
        Error::Input(Box::new(Report { what: what.into(), facts: Vec::new(), help: None }))
    }

    /// Adds a named fact to an input report; other variants stay as they are.
    pub fn fact(mut self, name: impl Into<String>, value: impl ToString) -> Self {
        if let Error::Input(report) = &mut self {
            report.facts.push((name.into(), value.to_string()));
        }
        self
    }

    /// Says what to try next; other variants stay as they are.
    pub fn try_this(mut self, help: impl Into<String>) -> Self {
        if let Error::Input(report) = &mut self {
            report.help = Some(help.into());
        }
        self
    }

    /// A file operation that failed.
    pub fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Error::Io { action, path: path.to_path_buf(), source }
    }

    /// Two lengths of a shared axis that differ.
    pub fn axis(what: impl Into<String>, left: impl ToString, right: impl ToString) -> Self {
        Error::Axis { what: what.into(), left: left.to_string(), right: right.to_string() }
    }

    /// Whether a device had too little memory: it may do if less is asked of it at once.
    ///
    /// ```
    /// use isopleth::Error;
    /// let cuda = |said: &str| Error::Tensor(candle_core::Error::Cuda(said.into()));
    /// assert!(cuda("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")").is_out_of_memory());
    /// assert!(!cuda("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"…\")").is_out_of_memory());
    /// ```
    pub fn is_out_of_memory(&self) -> bool {
        let Error::Tensor(error) = self else { return false };
        let said = error.to_string();
        ["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED"].iter().any(|w| said.contains(w))
    }

    /// The facts that show where, for printing under the message.
    pub fn facts(&self) -> Vec<(String, String)> {
        match self {
            Error::Input(report) => report.facts.clone(),
            Error::Unknown { known, .. } => vec![("known".into(), known.join(", "))],
            Error::MissingTime { checkpoint, observations, columns } => vec![
                ("checkpoint".into(), checkpoint.clone()),
                ("observations".into(), format!("{}  columns: {columns}", observations.display())),
            ],
            _ => Vec::new(),
        }
    }

    /// What to try next, where we know.
    pub fn help(&self) -> Option<String> {
        match self {
            Error::Input(report) => report.help.clone(),
            Error::Unknown { nearest: Some(nearest), .. } => {
                Some(format!("did you mean `{nearest}`?"))
            }
            Error::Unknown { kind, .. } => {
                Some(format!("`isopleth list {kind}s` shows what there is"))
            }
            Error::MissingTime { .. } => Some(
                "name the time column with --time <COLUMN>, or use a checkpoint trained without time"
                    .into(),
            ),
            Error::NoJointDraws => {
                Some("use a process with joint draws, such as `--model gp`".into())
            }
            Error::NotPositiveDefinite { .. } => {
                Some("look for duplicate sites, or raise the nugget".into())
            }
            Error::Io { source, .. } => match source.kind() {
                std::io::ErrorKind::NotFound => Some("check the path".into()),
                std::io::ErrorKind::PermissionDenied => Some("check the permissions".into()),
                std::io::ErrorKind::StorageFull => {
                    Some("the disk is full: free space, or write elsewhere with --out".into())
                }
                _ => None,
            },
            _ => None,
        }
    }
}
