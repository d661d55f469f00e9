//! `isopleth benchmark`: a few steps, a kill, and the same table again.

use std::{fs, path::Path, process::Command, time::Duration};

fn benchmark(out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_isopleth"));
    command.args(["benchmark", "gp-a", "--models", "cnp", "--tasks", "32", "--out"]);
    command.arg(out).args(more);
    command
}

/// The table without what a clock measured.
fn table(out: &Path) -> String {
    let text = fs::read_to_string(out.join("table.md")).unwrap();
    let lines = text.lines().map(|line| match line.starts_with("| cnp | ") {
        true => {
            let cells: Vec<&str> = line.split(" | ").collect();
            let trained = cells.len() == 9;
            let kept = cells.iter().enumerate().filter(|(i, _)| !(trained && *i == 5));
            kept.map(|(_, cell)| *cell).collect::<Vec<_>>().join(" | ")
        }
        false => line.to_string(),
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn a_killed_benchmark_goes_on_to_the_same_table() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let steps = ["--seeds", "2", "--steps", "60"];
    let run = benchmark(&whole, &steps).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let printed = String::from_utf8(run.stdout).unwrap();
    for word in ["*true process*", "cnp", "periodic, 32 tasks", "0.260 ± 0.020 [R]"] {
        assert!(printed.contains(word), "{word} in {printed}");
    }
    for file in ["table.md", "scores.parquet", "sizes.png", "posteriors.png"] {
        assert!(fs::metadata(whole.join(file)).unwrap().len() > 500, "{file}");
    }

    let one_by_one = [steps.as_slice(), &["--jobs", "1"]].concat();
    let mut child = benchmark(&killed, &one_by_one).spawn().unwrap();
    let state = killed.join("cells/cnp-1.state.safetensors");
    while !state.exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let run = benchmark(&killed, &steps).output().unwrap();
    let said = String::from_utf8_lossy(&run.stderr);
    assert_eq!(run.status.code(), Some(2), "the folder is not empty: {said}");
    assert!(said.contains("--resume"), "{said}");
    let again = [steps.as_slice(), &["--resume"]].concat();
    let run = benchmark(&killed, &again).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    assert_eq!(table(&killed), table(&whole));

    // Nothing is trained twice, and what another recipe trained is not taken for one's own.
    let asked = [&again[..], &["--integrated", "60"]].concat();
    let run = benchmark(&killed, &asked).output().unwrap();
    assert!(!String::from_utf8_lossy(&run.stderr).contains("steps/s"));
    let printed = String::from_utf8(run.stdout).unwrap();
    let score = |who: &str| -> f64 {
        let row = printed.lines().find(|l| l.starts_with(who)).unwrap_or_else(|| panic!("{who}"));
        let cell = row.split(" | ").nth(1).unwrap().split(' ').next().unwrap();
        cell.replace('−', "-").parse().unwrap()
    };
    let [told, asked] = ["| *true process* |", "| *true prior, kernel not told* |"].map(score);
    assert!(
        asked < told && asked > told - 0.5,
        "not to know the kernel costs little: {asked}, {told}"
    );
    let run = benchmark(&killed, &[&again[..], &["--floor", "0.2"]].concat()).output().unwrap();
    assert_eq!(run.status.code(), Some(2), "{}", String::from_utf8_lossy(&run.stderr));
}

#[test]
fn a_budget_ends_trainings_and_the_table_says_how_far_they_came() {
    let folder = tempfile::tempdir().unwrap();
    let run = benchmark(folder.path(), &["--seeds", "2", "--budget", "0.3s"]).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    assert_eq!(String::from_utf8(run.stdout).unwrap().matches(" of 100000 |").count(), 2);
}

#[test]
fn tasks_and_models_are_listed_and_slips_are_named() {
    let run = Command::new(env!("CARGO_BIN_EXE_isopleth")).arg("benchmark").output().unwrap();
    let listed = String::from_utf8(run.stdout).unwrap();
    assert!(listed.contains("  gp-a ") && listed.contains("  tnp-kr-dka "), "{listed}");
    let slip = |args: &[&str]| {
        let run = Command::new(env!("CARGO_BIN_EXE_isopleth")).arg("benchmark").args(args).output();
        String::from_utf8(run.unwrap().stderr).unwrap()
    };
    assert!(slip(&["gp-q"]).contains("gp-"));
    assert!(slip(&["gp-a", "--models", "cmp"]).contains("cnp"));
    assert!(slip(&["gp-a", "--budget", "10"]).contains("10m"));
}
