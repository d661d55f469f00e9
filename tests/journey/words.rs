//! Help, lists, slips of the finger, and outputs that are closed or full.

use std::process::Stdio;

use super::{command, ok, refused, text};

/// Names in the table of subcommands that `--help` prints.
fn subcommands() -> Vec<String> {
    let help = ok(&["--help"]);
    let table = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let names = table.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names.map(|line| line.split_whitespace().next().unwrap().to_string()).collect()
}

#[test]
fn every_subcommand_explains_itself_and_its_flags() {
    let names = subcommands();
    assert!(names.contains(&"list".to_string()), "{names:?}");
    for name in names.iter().filter(|name| *name != "help") {
        let help = ok(&[name, "--help"]);
        assert!(help.contains(&format!("Usage: isopleth {name}")), "{help}");
        // A flag and its description stand on one line, or the description follows, indented.
        let lines: Vec<&str> = help.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            if line.trim_start().starts_with("--") || line.trim_start().starts_with("-h,") {
                let beside = line.trim().contains("  ");
                let below = lines.get(i + 1).is_some_and(|next| next.starts_with("          "));
                assert!(beside || below, "{name}: no description of {line}");
            }
        }
    }
}

#[test]
fn the_version_is_the_crate_s() {
    assert_eq!(ok(&["--version"]), format!("isopleth {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn without_a_subcommand_the_help_is_shown() {
    assert!(refused(&[]).contains("First steps:"));
}

#[test]
fn list_shows_every_registry_and_where_things_come_from() {
    let all = ok(&["list"]);
    for registry in ["models", "terms", "priors", "kernels", "likelihoods", "products", "scores"] {
        assert!(all.contains(&format!("{registry}: ")), "{all}");
        let alone = ok(&["list", registry]);
        assert!(all.contains(&alone), "{alone}");
        assert_eq!(ok(&["list", &registry[..registry.len() - 1]]), alone);
    }
    let likelihoods = ok(&["list", "likelihoods"]);
    let line = likelihoods.lines().find(|line| line.starts_with("  binomial "));
    assert!(line.is_some_and(|line| line.contains("  positive of tested")), "{likelihoods}");
}

#[test]
fn list_speaks_json() {
    let json: serde_json::Value = serde_json::from_str(&ok(&["list", "--json"])).unwrap();
    let names: Vec<&str> = json["likelihoods"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["name"].as_str().unwrap())
        .collect();
    let all: Vec<&str> = isopleth::likelihood::LIKELIHOODS.iter().map(|l| l.name()).collect();
    assert_eq!(names, all);
    for (registry, entries) in json.as_object().unwrap() {
        for entry in entries.as_array().unwrap() {
            assert!(!entry["about"].as_str().unwrap().is_empty(), "{registry}: {entry}");
        }
    }
}

#[test]
fn a_slip_in_a_name_is_answered_with_the_nearest() {
    let error = refused(&["list", "kernles"]);
    assert!(error.starts_with("error: there is no registry named `kernles`\n"), "{error}");
    assert!(error.ends_with("help: did you mean `kernels`?\n"), "{error}");
    let error = refused(&["list", "zzz"]);
    assert!(error.ends_with("help: `isopleth list` shows them all\n"), "{error}");
    assert!(refused(&["lits"]).contains("a similar subcommand exists: 'list'"));
    assert!(refused(&["list", "--jsno"]).contains("a similar argument exists: '--json'"));
}

#[test]
fn an_error_has_facts_in_two_columns_and_help_last() {
    let error = refused(&["list", "kernles"]);
    let lines: Vec<&str> = error.lines().collect();
    assert!(lines[0].starts_with("error: "));
    assert!(lines[1].starts_with("  known  models, "), "{error}");
    assert!(lines[2].starts_with("help: "));
    assert_eq!(lines.len(), 3, "{error}");
}

/// `isopleth list | head -0`: the reader goes before we write.
#[test]
fn a_reader_that_leaves_is_not_an_error() {
    for args in [&["list"][..], &["list", "--json"], &["--help"]] {
        let mut child =
            command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{args:?}: {:?}", output.status);
        assert_eq!(text(&output.stderr), "", "{args:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_behind_a_redirect_is_an_error() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = command(&["list"]).stdout(full).output().unwrap();
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.starts_with("error: could not write to standard output: "), "{error}");
    assert!(error.contains("help: the disk is full"), "{error}");
}

/// The commands of README, word for word: every subcommand and every flag in them is known.
#[test]
fn readme_names_only_what_there_is() {
    let readme = include_str!("../../README.md");
    let mut checked = 0;
    let blocks = readme.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    let inline =
        readme.split('`').filter(|span| span.starts_with("isopleth ") && !span.contains('…'));
    for line in blocks.flat_map(str::lines).chain(inline) {
        let line = line.split('#').next().unwrap().trim();
        let Some(words) =
            line.strip_prefix("target/release/").unwrap_or(line).strip_prefix("isopleth ")
        else {
            continue;
        };
        let mut words: Vec<&str> = words.split_whitespace().collect();
        // Help is printed, and nothing run, once all that stands before it is understood.
        words.push("--help");
        assert!(ok(&words).contains("Usage: isopleth"), "{line}");
        checked += 1;
    }
    assert!(checked >= 10, "only {checked} commands found in README.md");
}
