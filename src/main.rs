//! The `isopleth` command: parse, run, print the error and its help line, choose the exit code.

use std::{io::Write, process::ExitCode};

use clap::Parser;
use isopleth::{Error, cli};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match cli::run(cli::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // If standard error is closed too, the exit code still tells.
            let _ = std::io::stderr().write_all(report(&error).as_bytes());
            ExitCode::from(exit_code(&error))
        }
    }
}

/// 2 when the input must change, as for a mistyped flag; 1 when the machine or this crate failed.
fn exit_code(error: &Error) -> u8 {
    match error {
        Error::Input(_)
        | Error::Unknown { .. }
        | Error::MissingTime { .. }
        | Error::NoJointDraws => 2,
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => 2,
        _ => 1,
    }
}

/// The error, its facts in two columns, and what to try.
fn report(error: &Error) -> String {
    let facts = error.facts();
    let width = facts.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let mut text = format!("error: {error}\n");
    for (name, value) in &facts {
        // A value of several lines stays in its column.
        let value = value.trim_end().replace('\n', &format!("\n{:1$}", "", width + 4));
        text += &format!("  {name:width$}  {value}\n");
    }
    if let Some(help) = error.help() {
        text += &format!("help: {help}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_stand_in_two_columns_between_error_and_help() {
        let error = Error::input("the checkpoint expects time at every site; the survey has none")
            .fact("checkpoint", "models/st.safetensors")
            .fact("survey", "survey.csv\ncolumns: lon, lat")
            .try_this("name the time column with --time COLUMN");
        assert_eq!(
            report(&error),
            "error: the checkpoint expects time at every site; the survey has none\n\
             \x20 checkpoint  models/st.safetensors\n\
             \x20 survey      survey.csv\n\
             \x20             columns: lon, lat\n\
             help: name the time column with --time COLUMN\n"
        );
        assert_eq!(exit_code(&error), 2);
    }

    #[test]
    fn a_missing_file_is_the_input_s_fault_and_a_full_disk_is_not() {
        let io = |kind| Error::io("write", "out.tif".as_ref(), std::io::Error::from(kind));
        assert_eq!(exit_code(&io(std::io::ErrorKind::NotFound)), 2);
        assert_eq!(exit_code(&io(std::io::ErrorKind::StorageFull)), 1);
        assert!(report(&io(std::io::ErrorKind::StorageFull)).contains("help: the disk is full"));
    }
}
