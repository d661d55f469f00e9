//! Laws of scan attention on the tensor cores of an NVIDIA GPU: in bf16, in tf32, and in pairs of tf32
//! for f32, against the reference on the CPU in f64.
//!
//! Everywhere the kernels themselves run on the processor (tests/cuda/emulate.h), with tensor cores that
//! hold their operands where the PTX ISA says and cut sums off as the hardware was seen to do.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use candle_core::Tensor;
use isopleth::{
    Stream,
    attention::{Metric, Term, bias::geometry},
};

use super::reader::{BIASES, Case, Shape, USUAL, case, extreme, single};

/// What products are computed with, and how far from f64 an answer may be as a share of the largest
/// value: that of the issue, and what is seen.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Numbers {
    Bf16,
    Tf32,
    Exact,
}

impl Numbers {
    const ALL: [Numbers; 3] = [Numbers::Bf16, Numbers::Tf32, Numbers::Exact];

    fn allowed(self) -> f64 {
        match self {
            Numbers::Bf16 => 5e-3,
            Numbers::Tf32 => 1e-3,
            Numbers::Exact => 2e-6,
        }
    }
}

/// The kernels for the processor, compiled once; nothing where there is no C++ compiler.
fn host() -> Option<&'static Path> {
    static HOST: OnceLock<Option<(tempfile::TempDir, PathBuf)>> = OnceLock::new();
    let host = HOST.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("tensor_host");
        let named = std::env::var("CXX").ok();
        for compiler in named.iter().map(String::as_str).chain(["c++", "g++", "clang++"]) {
            let ran = Command::new(compiler)
                .args(["-std=c++17", "-O2", "-ffp-contract=off", "-I"])
                .arg(root.join("tests/cuda"))
                .arg("-o")
                .arg(&program)
                .arg(root.join("tests/contract/tensor_host.cpp"))
                .output();
            let Ok(ran) = ran else { continue };
            let said = String::from_utf8_lossy(&ran.stderr);
            assert!(ran.status.success(), "{compiler} cannot compile the kernels:\n{said}");
            return Some((folder, program));
        }
        eprintln!("skipped: there is no C++ compiler here");
        None
    });
    host.as_ref().map(|(_, program)| program.as_path())
}

fn floats(x: &Tensor) -> Vec<f32> {
    single(x).flatten_all().unwrap().to_vec1().unwrap()
}

/// What the kernels answer, with the keys in `splits` parts: `[batch, target, head, w]` and marks
/// `[batch, target, 2 · head]`.
fn on_host(program: &Path, case: &Case, numbers: Numbers, splits: usize) -> (Tensor, Vec<f32>) {
    let (batch, targets, heads, d) = case.q.dims4().unwrap();
    let (context, w) = (case.k.dims()[1], case.v.dims()[3]);
    let metric = case.bias.as_ref().map_or(Metric::Euclidean, |b| b.metric);
    let (points, places) = (
        geometry(&single(&case.asked), metric).unwrap(),
        geometry(&single(&case.sites), metric).unwrap(),
    );
    let terms: &[Term] = case.bias.as_ref().map_or(&[], |b| &b.terms);
    let number = |t: &Term| Term::ALL.iter().position(|of| of == t).unwrap() as u64;
    let families: u64 = terms.iter().enumerate().map(|(j, t)| number(t) << (4 * j)).sum();
    let globe = usize::from(metric == Metric::GreatCircle);
    let (dim, kind) = (points.dims()[2], numbers as usize);
    let sizes = [batch, targets, context, heads, d, w, dim, terms.len(), globe, kind, splits];
    let mut input: Vec<u8> = sizes.iter().flat_map(|n| (*n as i32).to_ne_bytes()).collect();
    input.extend(families.to_ne_bytes());
    let packed = Tensor::cat(&[&case.k, &case.v], 3).unwrap();
    let params = case.bias.as_ref().map_or(Vec::new(), |b| floats(&b.params));
    let (q, kv, mask) = (floats(&case.q), floats(&packed), floats(&case.mask));
    for values in [q, kv, params, floats(&points), floats(&places), mask] {
        input.extend(values.iter().flat_map(|x| x.to_ne_bytes()));
    }
    let mut child =
        Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "the kernels' host program failed: {}", output.status);
    let mut values: Vec<f32> =
        output.stdout.chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().unwrap())).collect();
    assert_eq!(values.len(), batch * targets * heads * (w + 2));
    let marks = values.split_off(batch * targets * heads * w);
    (Tensor::from_vec(values, (batch, targets, heads, w), case.q.device()).unwrap(), marks)
}

/// Largest difference, as a share of the largest value.
fn off(found: &Tensor, case: &Case) -> f64 {
    let top = floats(&case.v).iter().fold(0.1f32, |m, v| m.max(v.abs()));
    let apart = floats(found).iter().zip(floats(&case.reference())).fold(0.0f32, |m, (x, y)| {
        assert!(x.is_finite(), "not finite");
        m.max((x - y).abs())
    });
    f64::from(apart / top)
}

/// Sizes that leave tails everywhere, one key, and every width that a kernel is compiled for.
fn shapes() -> [Shape; 6] {
    [
        USUAL,
        Shape { targets: 1, context: 1, ..USUAL },
        Shape { batch: 1, targets: 33, context: 97, heads: 1, d: 1, w: 1, ..USUAL },
        Shape { batch: 1, targets: 40, context: 200, d: 16, w: 17, clumps: true, ..USUAL },
        Shape { batch: 1, targets: 50, context: 130, heads: 2, d: 32, w: 32, size: 0.5, ..USUAL },
        Shape { batch: 1, targets: 20, context: 65, heads: 2, d: 40, w: 64, size: 0.5, ..USUAL },
    ]
}

/// Products of a warp are those of the matrices, wherever their numbers lie.
#[test]
fn emulated_tensor_cores_multiply_matrices() {
    let Some(program) = host() else { return };
    let ran = Command::new(program).arg("products").output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
}

/// Every bias family, on the plane and on the globe.
#[test]
fn tensor_cores_equal_full_attention() {
    let Some(program) = host() else { return };
    let mut rng = Stream::new(31, "tensor", 0);
    let mut worst = [0.0f64; 3];
    for shape in shapes() {
        for terms in BIASES {
            for metric in [Metric::Euclidean, Metric::GreatCircle] {
                let case = case(&mut rng, &shape, terms, metric);
                // Near its edge, weights of a compact support hang on the last digits of 1 − u.
                let compact = terms.iter().any(|t| t.0 == Term::Wendland);
                for numbers in Numbers::ALL {
                    let found = off(&on_host(program, &case, numbers, 1).0, &case);
                    let allowed = numbers.allowed().max(if compact { 2e-5 } else { 0.0 });
                    let name = format!("{numbers:?}: {shape:?}, {terms:?}, {metric:?}");
                    assert!(found < allowed, "{name}: {found:e}");
                    if !compact {
                        worst[numbers as usize] = worst[numbers as usize].max(found);
                    }
                }
            }
        }
    }
    println!("largest errors, {:?}: {worst:?}", Numbers::ALL);
}

#[test]
fn tensor_cores_read_extreme_scores_like_any_other() {
    let Some(program) = host() else { return };
    for (name, case) in extreme() {
        for numbers in Numbers::ALL {
            let found = off(&on_host(program, &case, numbers, 1).0, &case);
            assert!(found < numbers.allowed(), "{numbers:?}, {name}: {found:e}");
        }
    }
}
