//! The output directory of a map: written in a hidden place, moved when whole.

use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
};

use super::note;
use crate::{
    error::{Error, Result},
    mapping::record::{self, Record},
};

/// Start of the name of every scratch directory.
const SCRATCH: &str = ".isopleth-partial-";

/// In a scratch directory: a file that its run keeps locked. The system lets go of the lock when
/// the run ends, however it ends.
const LOCK: &str = ".lock";

/// A directory that is being filled.
pub(super) struct Output {
    target: PathBuf,
    /// Beside a new directory; inside one that exists, for it may be a disk of its own.
    scratch: PathBuf,
    lock: Option<File>,
}

impl Output {
    /// Clears away what killed runs into the same place left behind, and says so.
    ///
    /// # Errors
    /// [`Error::Input`] if there is something in the way that may not be replaced.
    pub fn prepare(target: &Path, force: bool) -> Result<Self> {
        let refuse = |what: &str| Error::input(what).fact("out", target.display());
        let hidden = format!("{SCRATCH}{}", std::process::id());
        let scratch = match fs::read_dir(target) {
            Ok(entries) => {
                let foreign = |e: std::io::Result<fs::DirEntry>| {
                    !e.is_ok_and(|e| e.file_name().to_string_lossy().starts_with(SCRATCH))
                };
                if !force && entries.into_iter().any(foreign) {
                    return Err(refuse("the output directory is not empty")
                        .try_this("choose another --out, or replace an earlier run with --force"));
                }
                target.join(hidden)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => target.with_file_name(hidden),
            Err(e) => {
                return Err(refuse("the output directory cannot be used")
                    .fact("reason", e)
                    .try_this("choose another --out"));
            }
        };
        if let Some(place) = scratch.parent() {
            clear(place);
        }
        fs::create_dir_all(&scratch).map_err(|e| Error::io("create", &scratch, e))?;
        // Where the disk knows no locks, a killed run stays for its user to remove.
        let lock = File::create(scratch.join(LOCK)).ok().filter(|file| file.try_lock().is_ok());
        Ok(Output { target: target.to_path_buf(), scratch, lock })
    }

    /// Where to write.
    pub fn scratch(&self) -> &Path {
        &self.scratch
    }

    /// Moves `files` into place, the last one last. Of what is there, only the files of an earlier
    /// run are removed: those its record names.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses.
    pub fn publish(&mut self, files: &[String]) -> Result<()> {
        self.lock = None;
        let _ = fs::remove_file(self.scratch.join(LOCK));
        if !self.target.exists() {
            return fs::rename(&self.scratch, &self.target)
                .map_err(|e| Error::io("rename to", &self.target, e));
        }
        let old = self.target.join(record::FILE);
        let earlier = fs::read_to_string(&old).ok();
        let earlier = earlier.and_then(|text| serde_json::from_str::<Record>(&text).ok());
        for name in earlier.iter().flat_map(|r| r.files().into_iter().rev()) {
            let plain = Path::new(&name).file_name().is_some_and(|n| n == name.as_str());
            if plain
                && let Err(e) = fs::remove_file(self.target.join(&name))
                && e.kind() != std::io::ErrorKind::NotFound
            {
                return Err(Error::io("replace", &self.target.join(&name), e));
            }
        }
        for name in files {
            let to = self.target.join(name);
            fs::rename(self.scratch.join(name), &to).map_err(|e| Error::io("rename to", &to, e))?;
        }
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.scratch);
    }
}

/// Removes scratch directories in `place` that no run holds any more. Best effort: what cannot be
/// told, or cannot be removed, stays and is in nobody's way.
fn clear(place: &Path) {
    let place = if place.as_os_str().is_empty() { Path::new(".") } else { place };
    for entry in fs::read_dir(place).into_iter().flatten().flatten() {
        let path = entry.path();
        let ours = entry.file_name().to_string_lossy().starts_with(SCRATCH) && path.is_dir();
        let Some(lock) = ours.then(|| File::open(path.join(LOCK)).ok()).flatten() else { continue };
        match lock.try_lock() {
            Ok(()) if fs::remove_dir_all(&path).is_ok() => {
                note(format!("removed {}, left by a run that was stopped", path.display()));
            }
            Ok(()) | Err(TryLockError::WouldBlock | TryLockError::Error(_)) => {}
        }
    }
}
