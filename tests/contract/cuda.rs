//! Laws of scan attention on an NVIDIA GPU: it equals the reference on the CPU in f64.
//!
//! The kernel's arithmetic is tested everywhere, compiled for the processor by the system's C++
//! compiler. The kernel itself is tested where there is a GPU, in a build with the feature `cuda`.

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

use super::reader::{BIASES, Case, Shape, USUAL, case, extreme, gap, single};

/// The kernel for the processor, compiled once; nothing where there is no C++ compiler.
fn host() -> Option<&'static Path> {
    static HOST: OnceLock<Option<(tempfile::TempDir, PathBuf)>> = OnceLock::new();
    let host = HOST.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("scan_host");
        let named = std::env::var("CXX").ok();
        for compiler in named.iter().map(String::as_str).chain(["c++", "g++", "clang++"]) {
            let ran = Command::new(compiler)
                .args(["-std=c++17", "-O2", "-ffp-contract=off", "-o"])
                .arg(&program)
                .arg(root.join("tests/contract/scan_host.cpp"))
                .output();
            let Ok(ran) = ran else { continue };
            let said = String::from_utf8_lossy(&ran.stderr);
            assert!(ran.status.success(), "{compiler} cannot compile the kernel:\n{said}");
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

/// What the kernel answers when the processor runs it: answers `[batch, target, head, w]` and marks
/// `[batch, target, 2 · head]`.
fn on_host(program: &Path, case: &Case) -> (Tensor, Vec<f32>) {
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
    let sizes = [batch, targets, context, heads, d, w, points.dims()[2], terms.len(), globe];
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
    assert!(output.status.success(), "the kernel's host program failed: {}", output.status);
    let mut values: Vec<f32> =
        output.stdout.chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().unwrap())).collect();
    assert_eq!(values.len(), batch * targets * heads * (w + 2));
    let marks = values.split_off(batch * targets * heads * w);
    (Tensor::from_vec(values, (batch, targets, heads, w), case.q.device()).unwrap(), marks)
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

/// Every bias family, on the plane and on the globe.
fn every_case(law: impl Fn(&Case, f64, &str)) {
    let mut rng = Stream::new(31, "cuda", 0);
    for shape in shapes() {
        for terms in BIASES {
            for metric in [Metric::Euclidean, Metric::GreatCircle] {
                // Near its edge, weights of a compact support hang on the last digits of 1 − u.
                let compact = terms.iter().any(|t| t.0 == Term::Wendland);
                let case = case(&mut rng, &shape, terms, metric);
                let name = format!("{shape:?}, {terms:?}, {metric:?}");
                law(&case, if compact { 2e-5 } else { 2e-6 }, &name);
            }
        }
    }
}

#[test]
fn the_kernels_arithmetic_equals_full_attention() {
    let Some(program) = host() else { return };
    every_case(|case, allowed, name| {
        let found = gap(&on_host(program, case).0, &case.reference());
        assert!(found < allowed, "{name}: {found:e}");
    });
}

#[test]
fn the_kernels_arithmetic_reads_extreme_scores_like_any_other() {
    let Some(program) = host() else { return };
    for (name, case) in extreme() {
        let found = gap(&on_host(program, &case).0, &case.reference());
        assert!(found < 2e-6, "{name}: {found:e}");
    }
}

/// What cannot be read weighs exactly nothing: hidden sites, and all beyond a compact support.
#[test]
fn the_kernels_arithmetic_gives_nothing_to_what_it_cannot_read() {
    let Some(program) = host() else { return };
    let mut rng = Stream::new(32, "cuda", 0);
    for (terms, hidden) in [
        (&[(Term::Wendland, [1.0, 1e4, 0.0])][..], false),
        (&[(Term::Wendland, [1.0, 1e4, 0.0]), (Term::Sink, [-80.0, 0.0, 0.0])], false),
        (&[(Term::Rbf, [1.0, 2.0, 0.0])], true),
        (&[], true),
    ] {
        let mut case = case(&mut rng, &USUAL, terms, Metric::Euclidean);
        if hidden {
            case.mask = case.mask.zeros_like().unwrap();
        }
        let (out, marks) = on_host(program, &case);
        assert!(floats(&out).iter().all(|x| *x == 0.0), "{terms:?}");
        let sink = terms.iter().any(|t| t.0 == Term::Sink);
        for of_target in marks.chunks(2 * USUAL.heads) {
            let inverse = &of_target[USUAL.heads..];
            assert!(inverse.iter().all(|r| *r == if sink { 1.0 } else { 0.0 }), "{terms:?}");
        }
    }
}

/// A top t and an inverse weight r tell the share of a key of score s as r 2^(s − t).
#[test]
fn the_kernels_marks_give_shares() {
    let Some(program) = host() else { return };
    for (name, case) in extreme() {
        let (_, marks) = on_host(program, &case);
        let keys = floats(&case.k);
        let mask = floats(&case.mask);
        let seen = keys.iter().zip(&mask).filter(|(_, m)| **m != 0.0).map(|(k, _)| f64::from(*k));
        let top = f64::from(marks[0]);
        let log2 = |k: f64| k * std::f64::consts::LOG2_E - top;
        let total: f64 = seen.map(|k| log2(k).exp2() * f64::from(marks[1])).sum();
        // Scores of 10,000 are right to 1e-3 in f32.
        assert!((total - 1.0).abs() < 1e-3, "{name}: shares add up to {total}");
    }
}

#[cfg(feature = "cuda")]
mod on_a_gpu {
    use candle_core::{DType, Device, Var};
    use isopleth::attention::{Bias, CHUNK, Keys, Start, full, scan};

    use super::*;

    /// The GPU, if there is one; a must where `ISOPLETH_GPU` is set.
    fn gpu() -> Option<Device> {
        match isopleth::device::open("cuda") {
            Ok(device) => Some(device),
            Err(e) if std::env::var_os("ISOPLETH_GPU").is_some() => panic!("{e}: {:?}", e.facts()),
            Err(_) => {
                eprintln!("skipped: there is no GPU here");
                None
            }
        }
    }

    fn at(x: &Tensor, device: &Device) -> Tensor {
        single(x).to_device(device).unwrap()
    }

    fn bias(case: &Case, device: &Device) -> Option<Bias> {
        case.bias.as_ref().map(|b| Bias { params: at(&b.params, device), ..b.clone() })
    }

    fn keys(case: &Case, device: &Device) -> Keys {
        let of = |x| at(x, device);
        Keys::pack(&of(&case.k), &of(&case.v), &of(&case.sites), &of(&case.mask)).unwrap()
    }

    fn on_gpu(case: &Case, device: &Device) -> Tensor {
        let (q, asked) = (at(&case.q, device), at(&case.asked, device));
        let (keys, bias) = (keys(case, device), bias(case, device));
        let out = scan(&q, &asked, &keys, bias.as_ref(), CHUNK, Start::Exact).unwrap();
        out.to_device(&Device::Cpu).unwrap()
    }

    #[test]
    fn the_kernel_equals_full_attention() {
        let Some(device) = gpu() else { return };
        every_case(|case, allowed, name| {
            let found = gap(&on_gpu(case, &device), &case.reference());
            assert!(found < allowed, "{name}: {found:e}");
        });
    }

    #[test]
    fn the_kernel_reads_extreme_scores_like_any_other() {
        let Some(device) = gpu() else { return };
        for (name, case) in extreme() {
            let found = gap(&on_gpu(&case, &device), &case.reference());
            assert!(found < 2e-6, "{name}: {found:e}");
        }
    }

    /// Enough queries and keys for many blocks of threads.
    #[test]
    fn many_blocks_answer_like_one() {
        let Some(device) = gpu() else { return };
        let mut rng = Stream::new(33, "cuda", 0);
        let shape = Shape { targets: 1000, context: 3000, d: 32, w: 32, size: 0.5, ..USUAL };
        let case = case(&mut rng, &shape, BIASES[2], Metric::Euclidean);
        let found = gap(&on_gpu(&case, &device), &case.reference());
        assert!(found < 2e-6, "{found:e}");
    }

    /// The gradient against that of the reference in f64.
    #[test]
    fn gradients_equal_those_of_full_attention() {
        let Some(device) = gpu() else { return };
        let mut rng = Stream::new(34, "cuda", 0);
        for terms in BIASES.iter().filter(|t| t.iter().all(|t| t.0 != Term::Wendland)) {
            let case = case(&mut rng, &USUAL, terms, Metric::Euclidean);
            let learn = |dtype: DType, device: &Device| -> Vec<Tensor> {
                let of = |x: &Tensor| x.to_dtype(dtype).unwrap().to_device(device).unwrap();
                let [q, k, v] =
                    [&case.q, &case.k, &case.v].map(|x| Var::from_tensor(&of(x)).unwrap());
                let params = case.bias.as_ref().map(|b| Var::from_tensor(&of(&b.params)).unwrap());
                let bias = case
                    .bias
                    .as_ref()
                    .zip(params.as_ref())
                    .map(|(b, params)| Bias { params: params.as_tensor().clone(), ..b.clone() });
                let keys = Keys::pack(&k, &v, &of(&case.sites), &of(&case.mask)).unwrap();
                let out = match dtype {
                    DType::F64 => full(&q, &of(&case.asked), &keys, bias.as_ref()),
                    _ => scan(&q, &of(&case.asked), &keys, bias.as_ref(), CHUNK, Start::Exact),
                };
                let loss = out.unwrap().sqr().unwrap().sum_all().unwrap();
                let gradients = loss.backward().unwrap();
                let all = [Some(&q), Some(&k), Some(&v), params.as_ref()];
                all.into_iter().flatten().map(|x| gradients.get(x).unwrap().clone()).collect()
            };
            let (found, truth) = (learn(DType::F32, &device), learn(DType::F64, &Device::Cpu));
            for (i, (found, truth)) in found.iter().zip(&truth).enumerate() {
                let found = gap(&found.to_device(&Device::Cpu).unwrap(), truth);
                assert!(found < 1e-4, "{terms:?}, gradient {i}: {found:e}");
            }
        }
    }
}
