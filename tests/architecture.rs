//! The house rules that a compiler does not check: layers, registries, words, and nothing of the machine
//! it was written on.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

/// Modules of the crate, lowest layer first. An import points to a lower layer, or stays in its module.
const LAYERS: &[&[&str]] = &[
    &["error", "device", "registry", "rng", "sites", "predictive", "process", "settings", "whole"],
    &["linalg", "fused", "likelihood", "geo"],
    &["kernel"],
    &["prior", "attention", "product", "score"],
    &["baseline"],
    &["task", "model"],
    &["recipe"],
    &["checkpoint"],
    &["train", "mapping", "picture"],
    &["bench", "benchmark"],
    &["cli"],
];
/// The words are one vocabulary and may refer to each other.
const WORDS: usize = 0;
/// Folders that hold a registry.
const REGISTRIES: &[&str] = &["kernel", "likelihood", "prior", "model", "product", "score"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below `folder`, without build outputs and what git keeps for itself.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut entries: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_symlink() || [".git", ".cuda13", "target", "out"].contains(&name.as_str()) {
            continue;
        }
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

/// Rust sources of the library and the binary, with their path below the root.
fn sources() -> Vec<(String, String)> {
    files(&root().join("src"))
        .into_iter()
        .filter(|path| path.extension().is_some_and(|e| e == "rs"))
        .map(|path| (below_root(&path), fs::read_to_string(&path).unwrap()))
        .collect()
}

fn below_root(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/")
}

/// The source with every comment blanked out, so that positions and lines stay.
fn code(source: &str) -> String {
    source
        .lines()
        .map(|line| match line.find("//") {
            // Not inside a string: an odd number of quotes before it.
            Some(at) if line[..at].matches('"').count() % 2 == 0 => &line[..at],
            _ => line,
        })
        .collect::<Vec<_>>()
        .join("\n")
}

/// `src/kernel/matern.rs` belongs to `kernel`.
fn module_of(file: &str) -> &str {
    let name = file.trim_start_matches("src/").split('/').next().unwrap();
    name.trim_end_matches(".rs")
}

fn layer_of(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

/// First names after each `crate::`, with their line: `crate::{a::b, c}` holds `a` and `c`.
fn imports(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, prefix) in code.match_indices("crate::") {
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            continue; // the end of a longer name, or a macro's `$crate`
        }
        let start = at + prefix.len();
        let mut name_may_start = true;
        let mut depth = 0;
        for (i, c) in code[start..].char_indices() {
            let here = &code[start + i..];
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => name_may_start = true,
                c if name_may_start && c.is_alphabetic() => {
                    let name = here.chars().take_while(|c| c.is_alphanumeric() || *c == '_');
                    let line = code[..start + i].matches('\n').count() + 1;
                    found.push((line, name.collect()));
                    name_may_start = false;
                }
                _ => {}
            }
            if depth == 0 {
                break; // a single name, or the group is closed
            }
        }
    }
    found
}

/// Names that `lib.rs` lifts to the root, with the module each comes from; and its `pub mod`s.
fn root_names() -> (HashMap<String, String>, Vec<String>) {
    let lib = code(&fs::read_to_string(root().join("src/lib.rs")).unwrap());
    let (mut lifted, mut modules) = (HashMap::new(), Vec::new());
    for statement in lib.split(';') {
        let statement = statement.trim();
        let start = statement.rfind("pub ").map_or(statement, |at| &statement[at..]);
        if let Some(name) = start.strip_prefix("pub mod ") {
            modules.push(name.trim().to_string());
        } else if let Some(path) = start.strip_prefix("pub use ") {
            let (module, names) = path.split_once("::").expect("`pub use module::name`");
            for name in names.trim_matches(|c| c == '{' || c == '}').split(',') {
                let name = name.rsplit("::").next().unwrap().trim();
                if !name.is_empty() {
                    lifted.insert(name.to_string(), module.trim().to_string());
                }
            }
        }
    }
    (lifted, modules)
}

fn assert_none(broken: Vec<String>, rule: &str) {
    assert!(broken.is_empty(), "{rule}:\n  {}", broken.join("\n  "));
}

#[test]
fn imports_point_down_the_layers() {
    let (lifted, _) = root_names();
    let mut broken = Vec::new();
    for (file, source) in sources() {
        let from = module_of(&file);
        if from == "lib" || from == "main" {
            continue;
        }
        let Some(mine) = layer_of(from) else {
            broken.push(format!(
                "{file}:1: module `{from}` stands in no layer of tests/architecture.rs"
            ));
            continue;
        };
        for (line, name) in imports(&code(&source)) {
            let to = lifted.get(&name).map_or(name.as_str(), String::as_str);
            match layer_of(to) {
                Some(theirs) if theirs < mine || to == from || (mine, theirs) == (WORDS, WORDS) => {
                }
                Some(theirs) => broken.push(format!(
                    "{file}:{line}: `{from}` (layer {mine}) imports `{to}` (layer {theirs})"
                )),
                None => broken.push(format!("{file}:{line}: `crate::{name}` belongs to no layer")),
            }
        }
        // The way around: `super` that leaves the module.
        for (i, line) in code(&source).lines().enumerate() {
            if line.contains("super::super::") {
                broken.push(format!("{file}:{}: write `crate::`, so that the layer shows", i + 1));
            }
        }
    }
    assert_none(broken, "imports point down the layers, never up or sideways");
}

#[test]
fn the_reader_of_imports_reads_groups() {
    let code = "use crate::{\n    error::{Error, Result},\n    sites,\n};\nfn f() -> crate::rng::Stream {}\nuse crate::Error;\n";
    let found = imports(code);
    let expected = [(2, "error"), (3, "sites"), (5, "rng"), (6, "Error")];
    assert_eq!(found, expected.map(|(line, name)| (line, name.to_string())));
}

#[test]
fn every_registered_kind_is_on_its_list() {
    let mut broken = Vec::new();
    for registry in REGISTRIES {
        let folder = root().join("src").join(registry);
        let Ok(parent) = fs::read_to_string(folder.join("mod.rs")).map(|source| code(&source))
        else {
            continue; // not built yet
        };
        // `pub const KERNELS: &[Entry] = &[…];`, on however many lines.
        let parent = parent.split_whitespace().collect::<Vec<_>>().join(" ");
        let list =
            parent.split("const ").find(|part| part.contains(": &[") && part.contains("= &["));
        let Some((declared, listed)) = list.and_then(|part| part.split_once("= &[")) else {
            broken.push(format!("src/{registry}/mod.rs:1: no list `pub const …: &[…] = &[…];`"));
            continue;
        };
        let listed = listed.split("];").next().unwrap();
        let kind = declared.split("&[").nth(1).unwrap().split(']').next().unwrap().trim();
        for path in files(&folder) {
            let file = below_root(&path);
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            if name == "mod" || path.parent() != Some(&folder) || !file.ends_with(".rs") {
                continue;
            }
            if !parent.contains(&format!("mod {name};")) {
                broken.push(format!("{file}:1: not declared in src/{registry}/mod.rs"));
            }
            let source = code(&fs::read_to_string(&path).unwrap());
            for (i, line) in source.lines().enumerate() {
                let item = match kind.strip_prefix("&dyn ") {
                    Some(of) => line.strip_prefix(&format!("impl {of} for ")),
                    None => line.strip_prefix("pub const ").filter(|rest| {
                        rest.split_once(": ")
                            .is_some_and(|(_, rest)| rest.starts_with(&format!("{kind} ")))
                    }),
                };
                let Some(item) = item else { continue };
                let item: String =
                    item.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                if !listed.contains(&format!("{name}::{item}")) {
                    broken.push(format!(
                        "{file}:{}: `{name}::{item}` is not listed in src/{registry}/mod.rs",
                        i + 1
                    ));
                }
            }
        }
    }
    assert_none(broken, "a kind is a file and its pair of lines in `mod.rs`");
}

/// A file of tests that nothing names compiles nowhere, and passes.
#[test]
fn every_file_of_tests_is_run() {
    let tests = root().join("tests");
    let all: Vec<(PathBuf, String)> = [tests.clone(), root().join("src")]
        .iter()
        .flat_map(|folder| files(folder))
        .filter(|path| path.extension().is_some_and(|e| e == "rs"))
        .map(|path| (path.clone(), fs::read_to_string(&path).unwrap()))
        .collect();
    let mut idle = Vec::new();
    for (path, _) in all.iter().filter(|(path, _)| path.starts_with(&tests)) {
        let folder = path.parent().unwrap();
        let name = path.file_stem().unwrap().to_string_lossy();
        if folder == tests || name == "main" {
            continue; // cargo finds these
        }
        let beside = fs::read_to_string(folder.join("main.rs")).unwrap_or_default();
        let by_path = format!("{}/{name}.rs\"", folder.file_name().unwrap().to_string_lossy());
        if !code(&beside).contains(&format!("mod {name};"))
            && !all.iter().any(|(_, source)| source.contains(&by_path))
        {
            idle.push(format!("{}:1", below_root(path)));
        }
    }
    assert_none(idle, "no crate of tests declares these files");
}

#[test]
fn every_file_says_first_what_it_is() {
    let silent = sources().into_iter().filter(|(_, source)| !source.starts_with("//! "));
    assert_none(
        silent.map(|(file, _)| format!("{file}:1")).collect(),
        "line one says what the file is",
    );
}

#[test]
fn no_module_is_a_drawer() {
    let drawers = ["util", "utils", "helper", "helpers", "misc", "common"];
    let found = sources()
        .into_iter()
        .map(|(file, _)| file)
        .filter(|file| file.split('/').any(|part| drawers.contains(&part.trim_end_matches(".rs"))));
    assert_none(found.collect(), "one concept, one file, one name");
}

#[test]
fn the_root_stays_small() {
    let (lifted, modules) = root_names();
    let names = lifted.len() + modules.len();
    assert!(names < 40, "{names} public names at the root of the crate; 39 is the most");
}

/// `println!` panics when the reader has gone. Commands use `cli::say` and `cli::note`; the library is silent.
#[test]
fn only_the_command_line_prints() {
    let mut broken = Vec::new();
    for (file, source) in sources() {
        for (i, line) in code(&source).lines().enumerate() {
            if ["println!(", "print!(", "dbg!("].iter().any(|macro_| line.contains(macro_)) {
                broken.push(format!("{file}:{}: {}", i + 1, line.trim()));
            }
        }
    }
    assert_none(broken, "print with `cli::say` (standard output) or `cli::note` (standard error)");
}

#[test]
fn nothing_of_the_machine_it_was_written_on() {
    // Spelt in pieces, so that this file may stand in the tree too.
    let paths = [
        concat!("/wo", "rk/"),
        concat!("/ro", "ot/"),
        concat!("/ho", "me/"),
        concat!("/Us", "ers/"),
    ];
    let mut broken = Vec::new();
    for path in files(root()) {
        let bytes = fs::read(&path).unwrap();
        for needle in paths {
            if let Some(at) = bytes.windows(needle.len()).position(|part| part == needle.as_bytes())
            {
                let line = bytes[..at].iter().filter(|b| **b == b'\n').count() + 1;
                broken.push(format!("{}:{line}: {needle}", below_root(&path)));
            }
        }
    }
    // One registry, the public one: a mirror would not be there for anybody else.
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let public = "source = \"registry+https://github.com/rust-lang/crates.io-index\"";
    for (i, line) in lock.lines().enumerate() {
        if line.starts_with("source = ") && line != public {
            broken.push(format!("Cargo.lock:{}: {line}", i + 1));
        }
    }
    for config in [".cargo/config.toml", ".cargo/config", "pip.conf"] {
        if root().join(config).exists() {
            broken.push(format!("{config}:1: belongs to a machine, not to the project"));
        }
    }
    assert_none(broken, "the tree must build anywhere");
}
