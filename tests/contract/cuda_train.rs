//! The kernels of layers and of the optimiser, run by the processor: those against formulas in f64, this
//! against the optimiser of the CPU, bit by bit.

use std::{
    collections::BTreeMap,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use candle_core::{Device, Tensor, Var};
use isopleth::{
    Stream,
    train::optimiser::{Optimiser, Rule},
};

/// A file of tests/cuda, compiled; nothing where there is no C++ compiler.
fn compiled(name: &str) -> Option<(tempfile::TempDir, PathBuf)> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda");
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join(name);
    let named = std::env::var("CXX").ok();
    for compiler in named.iter().map(String::as_str).chain(["c++", "g++", "clang++"]) {
        let ran = Command::new(compiler)
            .args(["-std=c++17", "-O1", "-ffp-contract=off", "-I"])
            .arg(&tests)
            .arg("-o")
            .arg(&program)
            .arg(tests.join(name).with_extension("cpp"))
            .output();
        let Ok(ran) = ran else { continue };
        let said = String::from_utf8_lossy(&ran.stderr);
        assert!(ran.status.success(), "{compiler} cannot compile {name}:\n{said}");
        return Some((folder, program));
    }
    eprintln!("skipped: there is no C++ compiler here");
    None
}

#[test]
fn kernels_of_layers_are_right_in_value_and_gradient() {
    let Some((_folder, program)) = compiled("layers") else { return };
    let ran = Command::new(program).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
}

const LENGTHS: [usize; 4] = [1, 33, 2049, 5000];
const CLIP: f64 = 1.5;
const STEPS: u64 = 4;

/// Numbers for each parameter.
type Each = Vec<Vec<f32>>;

/// Weights and gradients of a training: for each step, and each part of the batch.
fn drawn(parts: usize) -> (Each, Vec<Vec<Each>>) {
    let mut rng = Stream::new(5, "update", 0);
    let mut some = |scale: f64| -> Each {
        LENGTHS
            .iter()
            .map(|n| rng.normals(*n).iter().map(|x| (x * scale) as f32).collect())
            .collect()
    };
    let weights = some(1.0);
    // The first step's gradient is short of the clip.
    let scale = |step: u64| if step == 0 { 1e-3 } else { 0.1 };
    let steps = (0..STEPS).map(|s| (0..parts).map(|_| some(scale(s))).collect()).collect();
    (weights, steps)
}

/// Loss of a step, of which one may be refused.
fn losses(refused: Option<u64>) -> Vec<f32> {
    (0..STEPS).map(|s| if Some(s) == refused { f32::NAN } else { 0.5 + s as f32 }).collect()
}

/// What the kernels leave: weights, moments and average of each parameter, and the news.
fn on_card(program: &Path, rule: Rule, parts: usize, refused: Option<u64>) -> (Each, Vec<f64>) {
    let (weights, steps) = drawn(parts);
    let mut bytes = Vec::new();
    let yogi = i32::from(rule == Rule::Yogi);
    for x in [LENGTHS.len() as i32, STEPS as i32, yogi, parts as i32] {
        bytes.extend(x.to_le_bytes());
    }
    bytes.extend(CLIP.to_le_bytes());
    LENGTHS.iter().for_each(|n| bytes.extend((*n as i32).to_le_bytes()));
    let push =
        |bytes: &mut Vec<u8>, x: &[f32]| x.iter().for_each(|x| bytes.extend(x.to_le_bytes()));
    weights.iter().for_each(|w| push(&mut bytes, w));
    let mut optimiser = Optimiser::new(rule, 0.01, &BTreeMap::new());
    for ((step, parts), loss) in (0..).zip(&steps).zip(losses(refused)) {
        optimiser.step = step + 1;
        let s = optimiser.scalars(rate(step));
        push(&mut bytes, &[s.rate, s.shrink, s.c1, s.c2, KEEP, loss]);
        parts.iter().flatten().for_each(|g| push(&mut bytes, g));
    }
    let mut child =
        Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(&bytes).unwrap());
    let ran = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(ran.status.success());
    let (numbers, news) = ran.stdout.split_at(ran.stdout.len() - 48);
    let mut numbers = numbers.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    let kept =
        LENGTHS.iter().flat_map(|n| [*n; 4]).map(|n| numbers.by_ref().take(n).collect()).collect();
    let news = news.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect();
    (kept, news)
}

const KEEP: f32 = 0.75;

fn rate(step: u64) -> f64 {
    1e-2 / (step + 1) as f64
}

/// The same on the CPU; the norm of the last gradient beside it.
fn on_host(rule: Rule, parts: usize, steps: u64) -> (Each, f64) {
    let (weights, given) = drawn(parts);
    let vars: BTreeMap<String, Var> = weights
        .iter()
        .enumerate()
        .map(|(i, w)| (i.to_string(), Var::from_vec(w.clone(), w.len(), &Device::Cpu).unwrap()))
        .collect();
    let mut average = weights.clone();
    let mut optimiser = Optimiser::new(rule, 0.01, &vars);
    let mut norm = 0.0;
    for (step, parts) in (0..steps).zip(&given) {
        let grads: Vec<_> = parts
            .iter()
            .map(|part| {
                // Σ weight · gradient has the gradient that is wanted.
                let sum = vars.values().zip(part).map(|(var, g)| {
                    let g = Tensor::from_vec(g.clone(), g.len(), &Device::Cpu).unwrap();
                    (var.as_tensor() * g).unwrap().sum_all().unwrap()
                });
                sum.reduce(|a, b| (a + b).unwrap()).unwrap().backward().unwrap()
            })
            .collect();
        norm = optimiser.update(&vars, &grads, rate(step), CLIP).unwrap();
        for (average, var) in average.iter_mut().zip(vars.values()) {
            let now = var.to_vec1::<f32>().unwrap();
            average.iter_mut().zip(now).for_each(|(a, w)| *a = KEEP * *a + (1.0 - KEEP) * w);
        }
    }
    let kept = vars
        .iter()
        .zip(average)
        .flat_map(|((path, var), average)| {
            let (m, v) = optimiser.moments[path].clone();
            [var.to_vec1::<f32>().unwrap(), m, v, average]
        })
        .collect();
    (kept, norm)
}

#[test]
fn the_optimiser_on_a_card_is_the_host_s_bit_by_bit() {
    let Some((_folder, program)) = compiled("update") else { return };
    for rule in [Rule::Adamw, Rule::Yogi] {
        for parts in [1, 3] {
            let (card, news) = on_card(&program, rule, parts, None);
            let (host, norm) = on_host(rule, parts, STEPS);
            for (i, (a, b)) in card.iter().zip(&host).enumerate() {
                let what = ["weights", "first", "second", "average"][i % 4];
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert!(
                    bits(a) == bits(b),
                    "{rule:?}, {parts} parts: {what} of parameter {}",
                    i / 4
                );
            }
            let sum: f32 = losses(None).iter().sum();
            assert_eq!(news[..2], [f64::from(sum), STEPS as f64]);
            assert!((news[2] / norm - 1.0).abs() < 1e-12, "{} and {norm}", news[2]);
        }
    }
}

#[test]
fn a_loss_that_is_not_finite_stops_the_optimiser_where_it_stood() {
    let Some((_folder, program)) = compiled("update") else { return };
    let (card, news) = on_card(&program, Rule::Adamw, 1, Some(2));
    let (host, _) = on_host(Rule::Adamw, 1, 2);
    assert_eq!(card, host, "nothing is learned from then on");
    assert_eq!(news[3..5], [2.0, 1.0], "the step, and that its loss was to blame");
    assert_eq!(news[1], 2.0);
}
