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
    attention::{Keys, Metric, Term, bias::geometry, full},
    fused::bf16,
};

use super::{
    cuda::compiled,
    reader::{BIASES, Case, Shape, USUAL, case, extreme, of_f32, single},
};

/// What products are computed with.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Numbers {
    Bf16,
    Tf32,
    Exact,
}

impl Numbers {
    const ALL: [Numbers; 3] = [Numbers::Bf16, Numbers::Tf32, Numbers::Exact];

    /// How far from f64 an answer may be, as a share of the largest value.
    fn allowed(self) -> f64 {
        match self {
            Numbers::Bf16 => 5e-3,
            Numbers::Tf32 => 1e-3,
            Numbers::Exact => 2e-6,
        }
    }

    /// How far it may be from f64 on keys and values that are rounded already: what weights lose,
    /// which are rounded too, and the hardware's own roots and logarithms.
    fn arithmetic(self) -> f64 {
        match self {
            Numbers::Bf16 => 2f64.powi(-9),
            Numbers::Tf32 => 2f64.powi(-12),
            Numbers::Exact => 2e-6,
        }
    }

    /// The numbers as they are multiplied.
    fn rounded(self, x: &Tensor) -> Tensor {
        let round = |x: f32| match self {
            Numbers::Bf16 => bf16::widen(bf16::round(x)),
            Numbers::Tf32 => f32::from_bits((x.to_bits() + 0x1000) & !0x1fff),
            Numbers::Exact => x,
        };
        let values: Vec<f64> = floats(x).into_iter().map(|x| f64::from(round(x))).collect();
        Tensor::from_vec(values, x.shape(), x.device()).unwrap()
    }
}

/// The kernels for the processor.
fn host() -> Option<&'static Path> {
    static HOST: OnceLock<Option<(tempfile::TempDir, PathBuf)>> = OnceLock::new();
    HOST.get_or_init(|| compiled("tensor.cpp")).as_ref().map(|(_, program)| program.as_path())
}

fn floats(x: &Tensor) -> Vec<f32> {
    single(x).flatten_all().unwrap().to_vec1().unwrap()
}

/// What the host program says to `input`.
fn answer(program: &Path, what: Option<&str>, input: &[u8]) -> Vec<f32> {
    let mut child = Command::new(program)
        .args(what)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "the kernels' host program failed: {}", output.status);
    output.stdout.chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().unwrap())).collect()
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
    let mut values = answer(program, None, &input);
    assert_eq!(values.len(), batch * targets * heads * (w + 2));
    let marks = values.split_off(batch * targets * heads * w);
    (Tensor::from_vec(values, (batch, targets, heads, w), case.q.device()).unwrap(), marks)
}

/// Largest difference, as a share of the largest value.
fn off(found: &Tensor, case: &Case) -> f64 {
    apart(found, &case.reference(), case)
}

/// The same from what another reference says.
fn apart(found: &Tensor, reference: &Tensor, case: &Case) -> f64 {
    let top = floats(&case.v).iter().fold(0.1f32, |m, v| m.max(v.abs()));
    let apart = floats(found).iter().zip(floats(reference)).fold(0.0f32, |m, (x, y)| {
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
    // Every bias with both metrics, and every shape with both, though not all three with each other.
    for (i, shape) in shapes().into_iter().enumerate() {
        for (j, terms) in BIASES.iter().enumerate() {
            let metric = [Metric::Euclidean, Metric::GreatCircle][(i + j) % 2];
            let case = case(&mut rng, &shape, terms, metric);
            let least = of_f32(terms);
            for numbers in Numbers::ALL {
                let answer = on_host(program, &case, numbers, 1).0;
                let found = off(&answer, &case);
                let name = format!("{numbers:?}: {shape:?}, {terms:?}, {metric:?}");
                let (k, v) = (numbers.rounded(&case.k), numbers.rounded(&case.v));
                let keys = Keys::pack(&k, &v, &case.sites, &case.mask).unwrap();
                let near = full(&case.q, &case.asked, &keys, case.bias.as_ref()).unwrap();
                let arithmetic = apart(&answer, &near, &case);
                assert!(arithmetic < numbers.arithmetic().max(least), "{name}: {arithmetic:e}");
                // A score that is one product has nothing that rounding could average out over.
                if shape.d == 1 && numbers != Numbers::Exact {
                    continue;
                }
                assert!(found < numbers.allowed().max(least), "{name}: {found:e}");
                if least <= 2e-6 {
                    worst[numbers as usize] = worst[numbers as usize].max(found);
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

/// Keys that are split into parts, for few targets and many processors, are put together again: the
/// answer, and the share of each key, which marks tell.
#[test]
fn parts_of_the_keys_add_up() {
    let Some(program) = host() else { return };
    let mut rng = Stream::new(32, "tensor", 0);
    let shape = Shape { batch: 1, targets: 20, context: 290, heads: 2, ..USUAL };
    for (i, terms) in BIASES.iter().enumerate() {
        let case = case(&mut rng, &shape, terms, Metric::Euclidean);
        let numbers = Numbers::ALL[i % 3];
        let (_, whole) = on_host(program, &case, numbers, 1);
        for parts in [2, 5] {
            let (out, marks) = on_host(program, &case, numbers, parts);
            let found = off(&out, &case);
            assert!(found < numbers.allowed().max(2e-5), "{numbers:?}, {terms:?}: {found:e}");
            // r 2^(s − t), at s = 0: whatever the top is, the share is the same, as far as weights are
            // that are rounded before they are added up.
            let rounded = numbers.allowed().max(2e-5) as f32;
            for (marks, whole) in marks.chunks(4).zip(whole.chunks(4)) {
                let share = |m: &[f32], head: usize| (-m[head]).exp2() * m[2 + head];
                for head in 0..2 {
                    let (found, truth) = (share(marks, head), share(whole, head));
                    assert!(
                        (found - truth).abs() <= rounded * truth,
                        "{terms:?}: {found} of {truth}"
                    );
                }
            }
        }
    }
}

/// What cannot be read weighs exactly nothing: hidden sites, whatever they hold, and all beyond a
/// compact support.
#[test]
fn what_tensor_cores_cannot_read_weighs_nothing() {
    let Some(program) = host() else { return };
    let mut rng = Stream::new(33, "tensor", 0);
    for (terms, hidden) in [
        (&[(Term::Wendland, [1.0, 1e4, 0.0])][..], false),
        (&[(Term::Wendland, [1.0, 1e4, 0.0]), (Term::Sink, [-80.0, 0.0, 0.0])], false),
        (&[(Term::Rbf, [1.0, 2.0, 0.0])], true),
        (&[], true),
    ] {
        let mut case = case(&mut rng, &USUAL, terms, Metric::Euclidean);
        if hidden {
            case.mask = case.mask.zeros_like().unwrap();
            case.v = (case.v * f64::NAN).unwrap();
        }
        for numbers in Numbers::ALL {
            let (out, marks) = on_host(program, &case, numbers, 1);
            assert!(floats(&out).iter().all(|x| *x == 0.0), "{numbers:?}, {terms:?}");
            let sink = terms.iter().any(|t| t.0 == Term::Sink);
            for of_target in marks.chunks(2 * USUAL.heads) {
                let inverse = &of_target[USUAL.heads..];
                let truth = if sink { 1.0 } else { 0.0 };
                assert!(inverse.iter().all(|r| *r == truth), "{numbers:?}, {terms:?}");
            }
        }
    }
}

/// Weights sum to 1: rounded or not, an average of equal numbers is that number.
#[test]
fn what_is_the_same_everywhere_stays_so_on_tensor_cores() {
    let Some(program) = host() else { return };
    let mut rng = Stream::new(34, "tensor", 0);
    let mut case = case(&mut rng, &USUAL, BIASES[1], Metric::Euclidean);
    case.v = (case.v.ones_like().unwrap() * 0.75).unwrap();
    for numbers in Numbers::ALL {
        let out = floats(&on_host(program, &case, numbers, 1).0);
        let apart = out.iter().fold(0.0f32, |m, x| m.max((x - 0.75).abs()));
        assert!(apart < 1e-6, "{numbers:?}: off by {apart:e}");
    }
}

/// Tensor cores cut sums off; over 20,000 keys that must not add up.
#[test]
fn long_sums_on_tensor_cores_do_not_drift() {
    let Some(program) = host() else { return };
    let mut rng = Stream::new(35, "tensor", 0);
    let shape = Shape { batch: 1, targets: 16, context: 20_000, heads: 1, d: 8, w: 8, ..USUAL };
    let mut case = case(&mut rng, &shape, BIASES[1], Metric::Euclidean);
    case.v = case.v.abs().unwrap();
    let (out, truth) = (floats(&on_host(program, &case, Numbers::Exact, 1).0), case.reference());
    let truth = floats(&truth);
    let apart = out.iter().zip(&truth).fold(0.0f32, |m, (x, y)| m.max((x / y - 1.0).abs()));
    assert!(apart < 3e-6, "off by {apart:e} of each answer");
}

/// The target side of deep kernel attention, beside the same in f64.
#[test]
fn the_kernel_of_deep_kernel_attention_equals_its_layers() {
    let Some(program) = host() else { return };
    let mut rng = Stream::new(36, "tensor", 0);
    for [batch, sites, dim, width, hidden, outputs] in
        [[2, 70, 2, 64, 128, 64], [1, 5, 3, 8, 6, 8], [1, 130, 2, 50, 100, 33]]
    {
        let mut normal = |shape: &[usize], scale: f64| {
            let values: Vec<f32> =
                rng.normals(shape.iter().product()).iter().map(|x| (x * scale) as f32).collect();
            let exact = Tensor::from_vec(values, shape, &candle_core::Device::Cpu).unwrap();
            exact.to_dtype(candle_core::DType::F64).unwrap()
        };
        let weight = normal(&[dim + width, hidden], 1.0 / ((dim + width) as f64).sqrt());
        let bias = normal(&[hidden], 1.0);
        let matrix = normal(&[batch, hidden, outputs], 1.0 / (hidden as f64).sqrt());
        let shift = normal(&[batch, outputs], 1.0);
        let (places, tokens) =
            (normal(&[batch, sites, dim], 1.0), normal(&[batch, sites, width], 1.0));
        let sizes = [batch, sites, dim, width, hidden, outputs];
        let mut input: Vec<u8> = sizes.iter().flat_map(|n| (*n as i32).to_ne_bytes()).collect();
        for x in [&weight, &bias, &matrix, &shift, &places, &tokens] {
            input.extend(floats(x).iter().flat_map(|x| x.to_ne_bytes()));
        }
        let found = answer(program, Some("dka"), &input);
        let hidden = Tensor::cat(&[&places, &tokens], 2)
            .unwrap()
            .broadcast_matmul(&weight)
            .unwrap()
            .broadcast_add(&bias)
            .unwrap()
            .gelu()
            .unwrap();
        let truth = hidden.matmul(&matrix).unwrap();
        let truth = floats(&truth.broadcast_add(&shift.unsqueeze(1).unwrap()).unwrap());
        let top = truth.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        assert_eq!(found.len(), truth.len());
        let apart = found.iter().zip(&truth).fold(0.0f32, |m, (x, y)| m.max((x - y).abs()));
        assert!(apart < 2e-6 * top, "{sizes:?}: off by {apart:e} of {top}");
    }
}

#[cfg(feature = "cuda")]
mod on_a_gpu {
    use candle_core::{Device, Var};
    use isopleth::attention::{Bias, CHUNK, Keys, Precision, Start, scan};

    use super::{
        super::{
            cuda::on_a_gpu::{at, gpu},
            reader::gap,
        },
        *,
    };

    /// Asked only, and in f32 on the CUDA cores too, which is how gradients are recorded.
    fn every_way(case: &Case, device: &Device, law: impl Fn(&str, f64, &Tensor)) {
        let (q, asked) = (at(&case.q, device), at(&case.asked, device));
        let [k, v, sites, mask] =
            [&case.k, &case.v, &case.sites, &case.mask].map(|x| at(x, device));
        let keys = Keys::pack(&k, &v, &sites, &mask).unwrap();
        let bias = case.bias.as_ref().map(|b| Bias { params: at(&b.params, device), ..b.clone() });
        let read = |q: &Tensor, precision| {
            let keys = keys.clone().read_in(precision);
            let out = scan(q, &asked, &keys, bias.as_ref(), CHUNK, Start::Exact).unwrap();
            out.detach().to_device(&Device::Cpu).unwrap()
        };
        for (precision, numbers) in [
            (Precision::Bf16, Numbers::Bf16),
            (Precision::Tf32, Numbers::Tf32),
            (Precision::F32, Numbers::Exact),
        ] {
            law(precision.name(), numbers.allowed(), &read(&q, precision));
        }
        let recorded = Var::from_tensor(&q).unwrap();
        law("recorded", Numbers::Exact.allowed(), &read(&recorded, Precision::F32));
    }

    #[test]
    fn tensor_cores_of_a_gpu_equal_full_attention() {
        let Some(device) = gpu() else { return };
        let mut rng = Stream::new(41, "tensor", 0);
        let large = Shape { targets: 1000, context: 3000, d: 32, w: 32, size: 0.5, ..USUAL };
        for shape in shapes().into_iter().chain([large]) {
            for terms in BIASES {
                for metric in [Metric::Euclidean, Metric::GreatCircle] {
                    let case = case(&mut rng, &shape, terms, metric);
                    let least = of_f32(terms);
                    every_way(&case, &device, |way, allowed, out| {
                        let (found, name) =
                            (off(out, &case), format!("{way}: {shape:?}, {terms:?}"));
                        let allowed = allowed.max(least);
                        assert!(found < allowed, "{name}, {metric:?}: {found:e}");
                    });
                }
            }
        }
        for (name, case) in extreme() {
            every_way(&case, &device, |way, allowed, out| {
                let found = gap(out, &case.reference());
                assert!(found < allowed, "{way}, {name}: {found:e}");
            });
        }
    }
}
