//! Benchmarks of this machine: every figure is there, and counts what it says.

use serde_json::Value;

use super::{assert_error, ok, refused};

/// A network that takes no time.
const SMALL: &str = "--layers 2 --heads 2 --key-width 8 --value-width 4";

/// The words of `isopleth bench …`.
fn words(line: &str) -> Vec<&str> {
    ["bench"].into_iter().chain(line.split_whitespace()).collect()
}

fn json(line: &str) -> Value {
    serde_json::from_str(&ok(&words(&format!("{line} --json")))).unwrap()
}

fn number(report: &Value, name: &str) -> f64 {
    report[name].as_f64().unwrap_or_else(|| panic!("no number `{name}` in {report:#}"))
}

/// What every report has, and how its figures hang together.
fn assert_sound(report: &Value, head_pairs: u64) {
    assert_eq!(report["head_pairs"], head_pairs, "{report:#}");
    for name in ["wall_s", "ns_per_head_pair", "gflops", "ceiling_share", "threads", "contexts"] {
        assert!(number(report, name) > 0.0, "{name}: {report:#}");
    }
    for name in ["attention", "layout", "device", "precision", "cpu", "isopleth", "command"] {
        assert!(report[name].is_string(), "{name}: {report:#}");
    }
    let each = number(report, "ns_per_head_pair");
    let close = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-6;
    assert!(close(each * head_pairs as f64, 1e9 * number(report, "wall_s")), "{report:#}");
    let share = number(report, "ceiling_ns_per_head_pair") / each;
    assert!(close(share, number(report, "ceiling_share")), "{report:#}");
    assert!(report["answer"].as_f64().is_some_and(f64::is_finite), "{report:#}");
    if cfg!(target_os = "linux") {
        assert!(report["cpu_s"].as_f64().is_some_and(|s| s >= 0.0), "{report:#}");
        assert!(number(report, "peak_rss_mib") > 1.0, "{report:#}");
    }
}

/// Two operations for every multiply-add: (d + w) for a head pair.
fn assert_gflops(report: &Value, multiply_adds: u64) {
    let found = number(report, "gflops") * number(report, "wall_s") * 1e9;
    let right = 2.0 * multiply_adds as f64;
    assert!((found / right - 1.0).abs() < 1e-6, "{found} for {right}");
}

#[test]
fn attention_counts_heads_times_contexts_times_targets() {
    for (attention, bias) in [("scan", "rbf,scalar,sink"), ("full", "rbf"), ("scan", "none")] {
        let report = json(&format!(
            "attention --contexts 90 --targets 70 --heads 3 --key-width 8 --value-width 5 \
             --bias {bias} --attention {attention}"
        ));
        assert_sound(&report, 3 * 90 * 70);
        assert_gflops(&report, 3 * 90 * 70 * (8 + 5));
        assert_eq!(report["attention"], attention);
        let terms = if bias == "none" { 0 } else { bias.split(',').count() };
        assert_eq!(report["bias"].as_array().unwrap().len(), terms);
    }
    // One head and no pairs: φ of both, ψ and the matrix of the context, and what targets read.
    let report = json("attention --attention dka --contexts 1K --targets 300");
    assert_sound(&report, 1000 * 300);
    let phi = (2 + 64 + 128) * 128;
    assert_gflops(&report, 1300 * phi + 1000 * 3 * 64 * 128 + 300 * 64 * 128);
}

/// Numbers of 16 bits: the report says how they were read, and the answer is nearly that of f32.
#[test]
fn half_precision_answers_nearly_the_same() {
    let attention = "attention --contexts 300 --targets 70 --heads 2";
    for line in [attention, "map --contexts 60 --targets 100 --layers 2 --attention sparse"] {
        let [single, half] = ["f32", "bf16"].map(|p| json(&format!("{line} --precision {p}")));
        assert_eq!([&single["precision"], &half["precision"]], ["f32", "bf16"]);
        assert!(single["bf16"].is_null(), "{single:#}");
        assert!(half["bf16"] == "storage" || half["bf16"] == "dot", "{half:#}");
        let apart = (number(&single, "answer") - number(&half, "answer")).abs();
        assert!(apart > 0.0 && apart < 5e-3, "{line}: {apart}");
    }
}

/// Full attention and scan attention answer the same, so they were given the same to do.
#[test]
fn a_seed_names_the_work() {
    let answer = |rest: &str| {
        number(&json(&format!("map --contexts 60 --targets 100 --layers 2 {rest}")), "answer")
    };
    let scan = answer("--attention scan --seed 5");
    assert!((scan - answer("--attention full --seed 5")).abs() < 1e-5);
    assert!((scan - answer("--attention scan --seed 6")).abs() > 1e-5);
}

#[test]
fn a_map_and_its_conditioning_skip_what_nobody_reads() {
    let pairs =
        |layers: u64, c: u64, t: u64, heads: u64| heads * ((layers - 1) * c * c + layers * c * t);
    for layout in ["clustered", "lattice"] {
        let sizes = format!("--contexts 50 --layout {layout} {SMALL}");
        let report = json(&format!("condition {sizes}"));
        assert_sound(&report, pairs(2, 50, 0, 2));
        assert_eq!(report["layout"], layout);
        let report = json(&format!("map --targets 130 {sizes}"));
        assert_sound(&report, pairs(2, 50, 130, 2));
        assert_gflops(&report, pairs(2, 50, 130, 2) * (8 + 4));
        assert!(number(&report, "condition_s") <= number(&report, "wall_s"));
    }
    // A trained model brings its sizes, and binomial counts.
    let trained = "map --model prevalence --contexts 40 --targets 30";
    let report = json(trained);
    assert_sound(&report, pairs(6, 40, 30, 4));
    assert_eq!(report["model"], "prevalence");
    let other = json(&format!("{trained} --attention full"));
    assert_eq!(other["attention"], "full");
    assert!((number(&report, "answer") - number(&other, "answer")).abs() < 1e-4);
    let report = json("map --attention dka --contexts 40 --targets 30");
    assert_sound(&report, pairs(6, 40, 30, 1));
}

/// What is left out is told, and counts for no work.
#[test]
fn sparse_attention_says_what_it_left_out() {
    let sizes = "attention --contexts 3K --targets 600 --layout clustered --heads 2 --reach 0.02";
    let full = json(&format!("{sizes} --bias scalar"));
    assert_eq!(number(&full, "skipped"), 0.0);
    let sparse = json(&format!("{sizes} --bias scalar --attention sparse --lose 1e-3"));
    assert_eq!(number(&sparse, "lose"), 1e-3);
    let skipped = number(&sparse, "skipped");
    assert!((0.2..1.0).contains(&skipped), "{sparse:#}");
    assert!((number(&full, "answer") - number(&sparse, "answer")).abs() < 2e-3 * 5.0);
    let compact = json(&format!("{sizes} --bias wendland"));
    assert!((0.5..1.0).contains(&number(&compact, "skipped")), "{compact:#}");
}

#[test]
fn a_training_step_stands_beside_the_stock_one() {
    let sizes = format!("train-step --batch 3 --contexts 20 --targets 10 --repeat 2 {SMALL}");
    let both = json(&sizes);
    let pairs = 3 * 2 * (20 * 20 + 2 * 20 * 10);
    assert_sound(&both, pairs);
    assert_gflops(&both, 3 * pairs * (8 + 4));
    assert_eq!(both["attention"], "scan");
    assert!(number(&both, "ratio") > 0.0);
    for way in ["fused", "plain"] {
        let pace = &both[way];
        assert!(number(pace, "best_ms") <= number(pace, "median_ms"), "{both:#}");
        assert!((number(pace, "best_ms") * number(pace, "steps_per_s") - 1e3).abs() < 1e-3);
    }
    let gap = number(&both["fused"], "loss") - number(&both["plain"], "loss");
    assert!(gap.abs() < 1e-4, "{both:#}");

    let plain = json(&format!("{sizes} --plain --threads 1"));
    assert_eq!(plain["attention"], "full");
    assert_eq!(plain["threads"], 1);
    for absent in ["fused", "ratio"] {
        assert!(plain.get(absent).is_none(), "{plain:#}");
    }
    let fused = json(&format!("{sizes} --fused"));
    assert!(fused.get("plain").is_none() && fused["fused"].is_object());
}

#[test]
fn a_reader_gets_a_table() {
    let table = ok(&words("attention --contexts 50 --targets 20 --threads 1"));
    for name in ["wall ", "a head pair ", "its ceiling ", "share of the ceiling ", "arithmetic "] {
        assert!(table.lines().any(|line| line.starts_with(name)), "no `{name}` in\n{table}");
    }
    assert!(table.contains("1 × "), "{table}");
}

#[test]
fn nonsense_is_refused() {
    for line in [
        "attention --contexts 0",
        "attention --targets some",
        "map --targets 0",
        "train-step --batch 0",
        "condition --threads 0",
        "map --attention fast",
        "map --layout hexagons",
        "attention --precision f8",
    ] {
        let error = refused(&words(line));
        assert!(error.contains("error: invalid value"), "{line}: {error}");
    }
    let cannot = |line: &str, what: &str, facts: &[&str], help: &str| {
        assert_error(&refused(&words(line)), what, facts, help);
    };
    let f32s = "--precision f32";
    cannot("map --attention sparse --lose 2", "between 0 and 1", &["2"], "--lose 1e-3");
    let packed = "bf16 is for contexts that scan or sparse attention reads";
    cannot("attention --precision bf16 --attention dka", packed, &["dka"], f32s);
    cannot("map --precision bf16 --attention full", packed, &["full"], f32s);
    cannot("train-step --precision bf16", packed, &["train-step"], f32s);
    cannot("attention --bias rbff", "unknown value `rbff`", &[], "did you mean `rbf`?");
    cannot("map --attention dka --heads 2", "neither heads nor a bias", &[], "--heads");
    let dka = "map --model prevalence --attention dka";
    cannot(dka, "another attention", &["prevalence, tnp-kr"], "--attention");
    cannot("map --model prevalance", "no model named", &[], "prevalence");
    cannot("train-step --contexts 100K", "cannot be drawn", &["100256"], "--contexts");
    let error = refused(&words("map --model prevalence --heads 2"));
    assert!(error.contains("cannot be used with"), "{error}");
}

/// Every bias family and the extreme scores, within what each precision is allowed.
#[test]
fn accuracy_is_told_case_by_case() {
    for precision in ["f32", "bf16"] {
        let report = json(&format!("accuracy --precision {precision}"));
        assert_eq!(report["passed"], true, "{report:#}");
        let cases = report["cases"].as_array().unwrap();
        assert!(cases.len() > 2 * isopleth::attention::Term::ALL.len(), "{report:#}");
        for case in cases {
            let (error, gate) = (number(case, "error"), number(case, "gate"));
            assert!(error <= gate, "{precision}: {case:#}");
        }
    }
}
