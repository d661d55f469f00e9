//! Variables that candle and the allocator read once, as a process starts.

use crate::error::{Error, Result};

/// What a training step wants. Its parts are its threads, so candle's own, which wait by spinning,
/// would only be in the way; and what is freed is kept for 10 s, since the next step takes it again.
///
/// # Errors
/// As [`set`].
pub fn for_training() -> Result<()> {
    set(&[("CANDLE_NUM_THREADS", "1"), ("MIMALLOC_PURGE_DELAY", "10000")])
}

/// Starts the same command again with these variables; those that are set already stay as they are.
///
/// # Errors
/// [`Error::Io`] if it cannot be started.
#[cfg(unix)]
pub fn set(variables: &[(&str, &str)]) -> Result<()> {
    use std::os::unix::process::CommandExt;
    let unset = |(name, _): &&(&str, &str)| std::env::var_os(name).is_none();
    let missing: Vec<(&str, &str)> = variables.iter().filter(unset).copied().collect();
    if missing.is_empty() {
        return Ok(());
    }
    let itself = std::env::current_exe()
        .map_err(|e| Error::io("find", "the isopleth command".as_ref(), e))?;
    let mut again = std::process::Command::new(&itself);
    again.args(std::env::args_os().skip(1)).envs(missing);
    // Comes back only if it failed.
    Err(Error::io("start again", &itself, again.exec()))
}

/// Nothing: a process cannot be replaced by another here.
///
/// # Errors
/// None.
#[cfg(not(unix))]
pub fn set(_: &[(&str, &str)]) -> Result<()> {
    Ok(())
}
