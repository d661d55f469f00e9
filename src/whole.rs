//! Files that are whole or not there: a temporary name, a sync, a rename.

use std::{fs::File, io::Write, path::Path};

use crate::error::{Error, Result};

/// Writes `path` by way of a temporary name in the same folder: whole, or not at all.
///
/// # Errors
/// Those of `write`, and [`Error::Io`] if the disk refuses. The temporary file is removed, and
/// whatever stood under `path` still stands.
pub fn write(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let whole = || -> Result<()> {
        let mut file = File::create(&temporary).map_err(|e| Error::io("write", path, e))?;
        write(&mut file)?;
        file.flush().and_then(|()| file.sync_all()).map_err(|e| Error::io("write", path, e))?;
        std::fs::rename(&temporary, path).map_err(|e| Error::io("rename to", path, e))
    };
    whole().inspect_err(|_| {
        // Best effort: the error to tell is the first one.
        let _ = std::fs::remove_file(&temporary);
    })
}

/// Writes `bytes` to `path`: whole, or not at all.
///
/// # Errors
/// As [`write`].
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write(path, |file| file.write_all(bytes).map_err(|e| Error::io("write", path, e)))
}
