//! Journeys through the binary, as a user takes them.

use std::process::{Command, Stdio};

#[cfg(feature = "gdal")]
mod areas;
mod bench;
mod benchmark;
mod calibrate;
#[cfg(feature = "gdal")]
mod covariates;
mod displacement;
#[cfg(feature = "gdal")]
mod family;
#[cfg(feature = "gdal")]
mod geometry;
#[cfg(target_os = "linux")]
mod gpu;
mod inspect;
#[cfg(feature = "gdal")]
mod map;
#[cfg(feature = "gdal")]
mod plan;
mod predict;
mod recipes;
#[cfg(feature = "gdal")]
mod refusals;
#[cfg(feature = "gdal")]
mod report;
mod sample;
mod scale;
#[cfg(feature = "gdal")]
mod times;
#[cfg(feature = "gdal")]
mod trust;
#[cfg(feature = "gdal")]
mod validate;
#[cfg(feature = "gdal")]
mod windows;
mod words;

/// The command, run where `data/` is, with no terminal to ask.
fn command(args: &[&str]) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("isopleth"));
    command.args(args).stdin(Stdio::null()).current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Standard output of a command that must work.
fn ok(args: &[&str]) -> String {
    let output = command(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Standard error of a command that must be refused as the input's fault.
fn refused(args: &[&str]) -> String {
    let output = command(args).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output.stderr));
    assert!(output.stdout.is_empty(), "{args:?}: {}", text(&output.stdout));
    text(&output.stderr)
}

/// The one error: what, where, what to try, each said once and the first two with these words.
fn assert_error(error: &str, what: &str, facts: &[&str], help: &str) {
    let said: Vec<&str> = error.lines().skip_while(|line| !line.starts_with("error: ")).collect();
    assert!(said.first().is_some_and(|line| line.contains(what)), "no `{what}` in\n{error}");
    for fact in facts {
        let found = said.iter().any(|line| line.starts_with("  ") && line.contains(fact));
        assert!(found, "no fact with `{fact}` in\n{error}");
    }
    let tried = said.iter().position(|line| line.starts_with("help: "));
    assert!(
        tried.is_some_and(|at| said[at..].join(" ").contains(help)),
        "no help with `{help}` in\n{error}"
    );
    assert_eq!(error.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{error}");
    assert!(!error.contains("panicked"), "{error}");
}
