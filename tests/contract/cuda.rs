//! Laws of scan attention on an NVIDIA GPU: it equals the reference on the CPU in f64.
//!
//! The kernels are tested everywhere: compiled for the processor by the system's C++ compiler, every
//! thread of theirs a fiber (tests/cuda/emulate.h). The same laws run on hardware where there is a GPU, in a
//! build with the feature `cuda`.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use candle_core::{DType, Device, Tensor, Var};
use isopleth::{
    Stream,
    attention::{Bias, Keys, Metric, Term, bias::geometry, full},
};

use super::reader::{BIASES, Case, Shape, USUAL, case, extreme, gap, of_f32, single};

/// A program of tests/cuda, compiled once; nothing where there is no C++ compiler.
pub fn compiled(source: &str) -> Option<(tempfile::TempDir, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda");
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("program");
    let named = std::env::var("CXX").ok();
    for compiler in named.iter().map(String::as_str).chain(["c++", "g++", "clang++"]) {
        let ran = Command::new(compiler)
            .args(["-std=c++17", "-O2", "-ffp-contract=off", "-I"])
            .arg(&root)
            .arg("-o")
            .arg(&program)
            .arg(root.join(source))
            .output();
        let Ok(ran) = ran else { continue };
        let said = String::from_utf8_lossy(&ran.stderr);
        assert!(ran.status.success(), "{compiler} cannot compile {source}:\n{said}");
        return Some((folder, program));
    }
    eprintln!("skipped: there is no C++ compiler here");
    None
}

/// The kernels for the processor.
fn host() -> Option<&'static Path> {
    static HOST: OnceLock<Option<(tempfile::TempDir, PathBuf)>> = OnceLock::new();
    HOST.get_or_init(|| compiled("run.cpp")).as_ref().map(|(_, program)| program.as_path())
}

fn floats(x: &Tensor) -> Vec<f32> {
    single(x).flatten_all().unwrap().to_vec1().unwrap()
}

/// How kernels are launched: nothing of it may show in an answer.
#[derive(Debug, Clone, Copy)]
struct Launch {
    threads: usize,
    splits: usize,
    /// Draws the order in which threads run.
    seed: usize,
}

const ALONE: Launch = Launch { threads: 128, splits: 1, seed: 1 };

/// What is asked of the kernels.
enum Ask<'a> {
    Forward,
    /// With the gradient of the answer.
    Gradient(&'a Tensor),
    /// Only what is near.
    Near(&'a Lists),
}

/// What a block of queries is to read, as the kernel takes it.
struct Lists {
    from: Vec<i32>,
    tile: Vec<i32>,
    gap2: Vec<f32>,
    order: Vec<i32>,
    reach2: Vec<f32>,
    envelope: Vec<f32>,
    norm: Vec<f32>,
    longest: Vec<f32>,
    share: f32,
}

/// Padded width of keys and values.
fn width(case: &Case) -> usize {
    let widest = case.k.dims()[3].max(case.v.dims()[3]);
    [8, 16, 32, 64].into_iter().find(|w| *w >= widest).unwrap()
}

/// 0 without a bias, 1 for one bump on the plane, 2 for any.
fn kind(case: &Case) -> usize {
    let Some(bias) = &case.bias else { return 0 };
    let near: Vec<&Term> = bias.terms.iter().filter(|t| **t != Term::Sink).collect();
    match near[..] {
        [] => 0,
        [Term::Rbf] if bias.metric == Metric::Euclidean => 1,
        _ => 2,
    }
}

/// What the kernels answer when the processor runs them, as it lies in memory: answers `[batch, target,
/// head, w]`, marks `[batch, target, 2 · head]`, then what else was asked.
fn emulated(program: &Path, case: &Case, launch: Launch, ask: &Ask) -> Vec<f32> {
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
    let operation = match ask {
        Ask::Forward => 0,
        Ask::Gradient(_) => 1,
        Ask::Near(_) => 2,
    };
    let Launch { threads, splits, seed } = launch;
    let mut input: Vec<u8> = Vec::new();
    let sizes = [batch, targets, context, heads, d, w, points.dims()[2], terms.len(), globe];
    let mut whole = |n: usize| input.extend((n as i32).to_ne_bytes());
    [operation, width(case), kind(case), threads, splits].into_iter().for_each(&mut whole);
    sizes.into_iter().chain([seed]).for_each(whole);
    input.extend(families.to_ne_bytes());
    let mut send = |values: &[f32]| input.extend(values.iter().flat_map(|x| x.to_ne_bytes()));
    send(&floats(&case.q));
    send(&floats(&Tensor::cat(&[&case.k, &case.v], 3).unwrap()));
    send(&case.bias.as_ref().map_or(Vec::new(), |b| floats(&b.params)));
    send(&floats(&points));
    send(&floats(&places));
    send(&floats(&case.mask));
    match ask {
        Ask::Forward => {}
        Ask::Gradient(grad) => send(&floats(grad)),
        Ask::Near(lists) => {
            let whole = |n: &[i32]| -> Vec<u8> { n.iter().flat_map(|n| n.to_ne_bytes()).collect() };
            input.extend(whole(&lists.from));
            input.extend(whole(&lists.tile));
            input.extend(lists.gap2.iter().flat_map(|x| x.to_ne_bytes()));
            input.extend(whole(&lists.order));
            let rest = [&lists.reach2, &lists.envelope, &lists.norm, &lists.longest];
            let rest = rest.into_iter().flatten().chain([&lists.share]);
            input.extend(rest.flat_map(|x| x.to_ne_bytes()));
        }
    }
    let mut child =
        Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let sent = child.stdin.take().unwrap().write_all(&input);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && sent.is_ok(), "{launch:?}: {}", output.status);
    output.stdout.chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().unwrap())).collect()
}

/// Answers and marks.
fn on_host(program: &Path, case: &Case, launch: Launch) -> (Tensor, Vec<f32>) {
    let (batch, targets, heads, _) = case.q.dims4().unwrap();
    let w = case.v.dims()[3];
    let mut values = emulated(program, case, launch, &Ask::Forward);
    assert_eq!(values.len(), batch * targets * heads * (w + 2));
    let marks = values.split_off(batch * targets * heads * w);
    (Tensor::from_vec(values, (batch, targets, heads, w), case.q.device()).unwrap(), marks)
}

/// Sizes that leave tails everywhere, one key, and every width that kernels are compiled for.
fn shapes() -> [Shape; 6] {
    [
        USUAL,
        Shape { targets: 1, context: 1, ..USUAL },
        Shape { batch: 1, targets: 33, context: 97, heads: 1, d: 1, w: 1, ..USUAL },
        Shape { batch: 1, targets: 40, context: 200, d: 16, w: 12, clumps: true, ..USUAL },
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
                let case = case(&mut rng, &shape, terms, metric);
                let name = format!("{shape:?}, {terms:?}, {metric:?}");
                law(&case, of_f32(terms), &name);
            }
        }
    }
}

/// What the emulator is for: mistakes that a GPU may forgive on one day.
#[test]
fn the_emulator_notices_mistakes() {
    let Some((_folder, program)) = compiled("self.cpp") else { return };
    let status = |name: &str| Command::new(&program).arg(name).output().unwrap().status.code();
    assert_eq!(status("right"), Some(0));
    for wrong in [
        "no barrier",
        "no wait",
        "half a barrier",
        "half a warp",
        "two instructions",
        "past shared memory",
    ] {
        assert_eq!(status(wrong), Some(70), "{wrong}");
    }
}

#[test]
fn the_emulated_kernel_equals_full_attention() {
    let Some(program) = host() else { return };
    let launches = [(128, 1), (64, 2), (32, 1), (32, 5)];
    let turn = std::cell::Cell::new(0);
    every_case(|case, allowed, name| {
        turn.set(turn.get() + 1);
        let (threads, splits) = launches[turn.get() % launches.len()];
        let launch = Launch { threads, splits, seed: turn.get() };
        let found = gap(&on_host(program, case, launch).0, &case.reference());
        assert!(found < allowed, "{name}, {launch:?}: {found:e}");
    });
}

#[test]
fn the_emulated_kernel_reads_extreme_scores_like_any_other() {
    let Some(program) = host() else { return };
    for (name, case) in extreme() {
        for splits in [1, 3] {
            let found =
                gap(&on_host(program, &case, Launch { splits, ..ALONE }).0, &case.reference());
            assert!(found < 2e-6, "{name}, {splits} parts: {found:e}");
        }
    }
}

/// What cannot be read weighs exactly nothing: hidden sites, and all beyond a compact support.
#[test]
fn the_emulated_kernel_gives_nothing_to_what_it_cannot_read() {
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
        for splits in [1, 2] {
            let (out, marks) = on_host(program, &case, Launch { splits, ..ALONE });
            assert!(floats(&out).iter().all(|x| *x == 0.0), "{terms:?}");
            let sink = terms.iter().any(|t| t.0 == Term::Sink);
            for of_target in marks.chunks(2 * USUAL.heads) {
                let inverse = &of_target[USUAL.heads..];
                assert!(inverse.iter().all(|r| *r == if sink { 1.0 } else { 0.0 }), "{terms:?}");
            }
        }
    }
}

/// A top t and an inverse weight r tell the share of a key of score s as r 2^(s − t).
#[test]
fn the_emulated_kernels_marks_give_shares() {
    let Some(program) = host() else { return };
    for (name, case) in extreme() {
        for splits in [1, 4] {
            let (_, marks) = on_host(program, &case, Launch { splits, ..ALONE });
            let keys = floats(&case.k);
            let mask = floats(&case.mask);
            let seen =
                keys.iter().zip(&mask).filter(|(_, m)| **m != 0.0).map(|(k, _)| f64::from(*k));
            let top = f64::from(marks[0]);
            let log2 = |k: f64| k * std::f64::consts::LOG2_E - top;
            let total: f64 = seen.map(|k| log2(k).exp2() * f64::from(marks[1])).sum();
            // Scores of 10,000 are right to 1e-3 in f32.
            assert!((total - 1.0).abs() < 1e-3, "{name}: shares add up to {total}");
        }
    }
}

/// Weights of a loss that no symmetry makes nothing.
fn loss(case: &Case) -> Tensor {
    let (batch, targets, heads, _) = case.q.dims4().unwrap();
    let shape = (batch, targets, heads, case.v.dims()[3]);
    let mut rng = Stream::new(35, "cuda", 0);
    let count = shape.0 * shape.1 * shape.2 * shape.3;
    let values: Vec<f64> = rng.normals(count).iter().map(|x| f64::from(*x as f32)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Gradients of queries, of keys, of values and of the bias: those of `full` in f64.
fn learnt(case: &Case) -> Vec<Tensor> {
    let [q, k, v] = [&case.q, &case.k, &case.v].map(|x| Var::from_tensor(x).unwrap());
    let params = case.bias.as_ref().map(|b| Var::from_tensor(&b.params).unwrap());
    let bias = case
        .bias
        .as_ref()
        .zip(params.as_ref())
        .map(|(b, params)| Bias { params: params.as_tensor().clone(), ..b.clone() });
    let keys = Keys::pack(&k, &v, &case.sites, &case.mask).unwrap();
    let out = full(&q, &case.asked, &keys, bias.as_ref()).unwrap();
    let gradients = (out * loss(case)).unwrap().sum_all().unwrap().backward().unwrap();
    let all = [Some(&q), Some(&k), Some(&v), params.as_ref()];
    all.into_iter().flatten().map(|x| gradients.get(x).unwrap().clone()).collect()
}

/// How far off gradients may be, as a share of the largest: sums of thousands of terms of both signs.
fn allowed(case: &Case) -> f64 {
    let compact = case.bias.as_ref().is_some_and(|b| b.terms.contains(&Term::Wendland));
    if compact { 1e-4 } else { 1e-5 }
}

/// Largest difference as a share of the largest value, or of 0.1: gradients of a bias cancel.
fn apart(found: &Tensor, truth: &Tensor) -> f64 {
    let host = |x: &Tensor| {
        x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap()
    };
    let (found, truth) = (host(found), host(truth));
    assert_eq!(found.len(), truth.len());
    let top = truth.iter().fold(0.1f64, |m, x| m.max(x.abs()));
    found.iter().zip(&truth).fold(0.0, |m, (x, y)| {
        assert!(x.is_finite(), "not finite");
        f64::max(m, (x - y).abs() / top)
    })
}

/// The kernels' own gradients, in the order of [`learnt`].
fn gradients_on_host(program: &Path, case: &Case, launch: Launch) -> Vec<Tensor> {
    let values = emulated(program, case, launch, &Ask::Gradient(&loss(case)));
    let (batch, targets, heads, d) = case.q.dims4().unwrap();
    let (context, w) = (case.k.dims()[1], case.v.dims()[3]);
    let mut rest = &values[batch * targets * heads * (w + 2)..];
    let mut take = |shape: &[usize]| {
        let (first, others) = rest.split_at(shape.iter().product());
        rest = others;
        Tensor::from_slice(first, shape, &Device::Cpu).unwrap()
    };
    let dq = take(&[batch, targets, heads, d]);
    let dkv = take(&[batch, context, heads, d + w]);
    let mut all = vec![dq, dkv.narrow(3, 0, d).unwrap(), dkv.narrow(3, d, w).unwrap()];
    all.extend(case.bias.as_ref().map(|b| take(b.params.dims())));
    assert!(rest.is_empty(), "{} values more than were asked for", rest.len());
    all
}

#[test]
fn the_emulated_gradients_equal_those_of_full_attention() {
    let Some(program) = host() else { return };
    let turn = std::cell::Cell::new(0);
    every_case(|case, _, name| {
        turn.set(turn.get() + 1);
        let launch = Launch { threads: 32 << (turn.get() % 3), splits: 1, seed: turn.get() };
        let found = gradients_on_host(program, case, launch);
        for (i, (found, truth)) in found.iter().zip(&learnt(case)).enumerate() {
            let found = apart(found, truth);
            assert!(found < allowed(case), "{name}, gradient {i}: {found:e}");
        }
    });
}

/// Bit by bit, in whatever order threads run.
#[test]
fn the_emulated_kernels_always_answer_the_same() {
    let Some(program) = host() else { return };
    let mut rng = Stream::new(36, "cuda", 0);
    for terms in [BIASES[2], BIASES[3]] {
        let case = case(&mut rng, &USUAL, terms, Metric::Euclidean);
        let loss = loss(&case);
        let run = |seed| {
            let launch = Launch { threads: 64, splits: 3, seed };
            emulated(program, &case, launch, &Ask::Gradient(&loss))
        };
        let (one, other) = (run(1), run(2));
        assert!(one.iter().zip(&other).all(|(a, b)| a.to_bits() == b.to_bits()), "{terms:?}");
    }
}

/// Tiles of keys, as the kernel has them.
const TILE: usize = 32;

/// A case with keys in an order in which tiles are compact, and lists of what queries are to read.
///
/// The library's own lists are tested beside the code that makes them; here they are made plainly.
fn listed(case: &Case, lose: f64, threads: usize) -> (Case, Lists) {
    let (batch, targets, heads, d) = case.q.dims4().unwrap();
    let (bias, context) = (case.bias.as_ref().unwrap(), case.k.dims()[1]);
    let radial = bias.host().unwrap();
    let points = |x: &Tensor| geometry(&single(x), bias.metric).unwrap();
    let at = points(&case.sites).to_vec3::<f32>().unwrap();
    let mut order: Vec<u32> = Vec::new();
    for row in &at {
        // By squares of a grid, and so by neighbourhood.
        let square = |p: &[f32]| ((p[0] * 4.0).floor() as i64, (p[1] * 4.0).floor() as i64);
        let mut row_order: Vec<u32> = (0..context as u32).collect();
        row_order.sort_by_key(|j| square(&row[*j as usize]));
        order.extend(row_order);
    }
    let device = Device::Cpu;
    let pick = |x: &Tensor| {
        let rows: Vec<Tensor> = (0..batch)
            .map(|row| {
                let of_row = order[row * context..(row + 1) * context].to_vec();
                let ids = Tensor::from_vec(of_row, context, &device).unwrap();
                x.get(row).unwrap().contiguous().unwrap().index_select(&ids, 0).unwrap()
            })
            .collect();
        Tensor::stack(&rows, 0).unwrap()
    };
    let sorted = Case {
        q: case.q.clone(),
        k: pick(&case.k),
        v: pick(&case.v),
        asked: case.asked.clone(),
        sites: pick(&case.sites),
        mask: pick(&case.mask),
        bias: case.bias.clone(),
    };
    let (keys, asked) = (points(&sorted.sites), points(&case.asked));
    let (keys, asked) = (keys.to_vec3::<f32>().unwrap(), asked.to_vec3::<f32>().unwrap());
    let k = single(&sorted.k).reshape((batch, context, heads * d)).unwrap();
    let k = k.to_vec3::<f32>().unwrap();
    let tiles = context.div_ceil(TILE);
    let (mut norm, mut longest) = (Vec::new(), vec![0.0f32; batch * heads]);
    for (row, k) in k.iter().enumerate() {
        for tile in k.chunks(TILE) {
            for head in 0..heads {
                let long = |key: &Vec<f32>| {
                    key[head * d..(head + 1) * d].iter().map(|x| x * x).sum::<f32>().sqrt()
                };
                let most = tile.iter().map(long).fold(0.0, f32::max) * 1.00001;
                norm.push(most);
                longest[row * heads + head] = longest[row * heads + head].max(most);
            }
        }
    }
    let queries = if width(case) == 8 { 4 } else { 8 } * threads * 8 / width(case);
    let mut lists = Lists {
        from: vec![0],
        tile: Vec::new(),
        gap2: Vec::new(),
        order: Vec::new(),
        reach2: (0..heads)
            .map(|h| (radial.support_straight(h) * 1.000_001).powi(2) as f32)
            .collect(),
        envelope: Vec::new(),
        norm,
        longest,
        share: (lose / context as f64) as f32,
    };
    for head in 0..heads {
        for cell in 0..320 {
            let d2 = f32::from_bits((((127 - 40) << 23) + (cell << 21)) as u32);
            let from = if cell == 0 { 0.0 } else { f64::from(d2).sqrt() };
            // Every family of these tests falls all the way.
            let most = radial.at_straight(head, from.min(2f64.powi(20)));
            lists.envelope.push((most * std::f64::consts::LOG2_E) as f32 + 1e-3);
        }
    }
    for row in 0..batch {
        let mut numbers: Vec<i32> = (0..targets as i32).collect();
        let square = |p: &[f32]| ((p[0] * 4.0).floor() as i64, (p[1] * 4.0).floor() as i64);
        numbers.sort_by_key(|q| square(&asked[row][*q as usize]));
        for block in numbers.chunks(queries) {
            let mut list: Vec<(f32, i32)> = (0..tiles)
                .map(|tile| {
                    let within = keys[row].chunks(TILE).nth(tile).unwrap();
                    let gap = |q: &i32, key: &Vec<f32>| -> f32 {
                        let site = &asked[row][*q as usize];
                        site.iter().zip(key).map(|(a, b)| (a - b) * (a - b)).sum()
                    };
                    let gaps = block.iter().flat_map(|q| within.iter().map(move |k| gap(q, k)));
                    (gaps.fold(f32::INFINITY, f32::min) * 0.9999, tile as i32)
                })
                .collect();
            list.sort_by(|a, b| a.0.total_cmp(&b.0));
            lists.tile.extend(list.iter().map(|x| x.1));
            lists.gap2.extend(list.iter().map(|x| x.0));
            lists.from.push(lists.tile.len() as i32);
        }
        lists.order.extend(numbers);
    }
    (sorted, lists)
}

/// What is left out has no weight, or no more than was allowed: |near − full| ≤ 2 ε max|v|.
#[test]
fn the_emulated_kernel_leaves_out_no_more_than_allowed() {
    let Some(program) = host() else { return };
    let mut rng = Stream::new(37, "cuda", 0);
    let shape = Shape { targets: 700, context: 1000, heads: 2, spread: 0.3, clumps: true, ..USUAL };
    let plane = Metric::Euclidean;
    let mut skipped = [0.0f64; 2];
    for (terms, metric, lose, d) in [
        (&[(Term::Wendland, [1.0, 5.0, 0.0])][..], plane, 0.0, 5),
        (&[(Term::Wendland, [1.0, 5.0, 0.0])], Metric::GreatCircle, 0.0, 12),
        (&[(Term::Wendland, [1.0, 3.0, 0.0]), (Term::Sink, [0.0, 0.0, 0.0])], plane, 1e-3, 5),
        (&[(Term::Scalar, [-25.0, 0.0, 0.0])], plane, 1e-2, 20),
        (&[(Term::Matern32, [1.0, 9.0, 0.0]), (Term::Sink, [-3.0, 0.0, 0.0])], plane, 1e-4, 5),
        (&[(Term::Rbf, [30.0, 4.0, 0.0])], plane, 1e-3, 40),
    ] {
        let shape = Shape { d, size: if d > 5 { 0.3 } else { 1.0 }, ..shape.clone() };
        let mut case = case(&mut rng, &shape, terms, metric);
        if lose > 0.0 {
            // One far key outshines all others.
            let mut k = case.k.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            k[2 * d * 432..2 * d * 433].iter_mut().for_each(|x| *x *= 12.0);
            case.k = Tensor::from_vec(k, case.k.shape(), &Device::Cpu).unwrap();
        }
        let launch = Launch { threads: 32, splits: 1, seed: 3 };
        let (sorted, lists) = listed(&case, lose, launch.threads);
        let mut values = emulated(program, &sorted, launch, &Ask::Near(&lists));
        let tiles = values.pop().unwrap();
        let count = shape.batch * shape.targets * shape.heads;
        let out = Tensor::from_slice(
            &values[..count * shape.w],
            (shape.batch, shape.targets, shape.heads, shape.w),
            &Device::Cpu,
        );
        let truth = case.reference();
        let off = (out.unwrap().to_dtype(DType::F64).unwrap() - truth).unwrap();
        let off = off.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
        let top = case.v.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
        let rounding = if terms[0].0 == Term::Wendland { 2e-5 } else { 4e-6 };
        assert!(off <= (2.0 * lose + rounding) * top, "{terms:?}, ε {lose}: off by {off:e}");
        let all = count as f64 * shape.context.div_ceil(TILE) as f64;
        let share = 1.0 - f64::from(tiles) / all;
        let kind = usize::from(lose > 0.0);
        skipped[kind] = skipped[kind].max(share);
    }
    assert!(skipped[0] > 0.5 && skipped[1] > 0.3, "too little was left out: {skipped:?}");
}

#[cfg(feature = "cuda")]
pub mod on_a_gpu {
    use isopleth::attention::{CHUNK, Reader, Reading, Start, scan};

    use super::*;

    /// The GPU, if there is one; a must where `ISOPLETH_GPU` is set.
    pub fn gpu() -> Option<Device> {
        match isopleth::device::open("cuda") {
            Ok(device) => Some(device),
            Err(e) if std::env::var_os("ISOPLETH_GPU").is_some() => panic!("{e}: {:?}", e.facts()),
            Err(_) => {
                eprintln!("skipped: there is no GPU here");
                None
            }
        }
    }

    pub fn at(x: &Tensor, device: &Device) -> Tensor {
        single(x).to_device(device).unwrap()
    }

    fn host(x: &Tensor) -> Tensor {
        x.to_device(&Device::Cpu).unwrap()
    }

    /// The answer and, in the order of [`learnt`], gradients. What is recorded for gradients is read
    /// by the kernels of `scan.cu`.
    fn on_gpu(case: &Case, device: &Device) -> (Tensor, Vec<Tensor>) {
        let var = |x: &Tensor| Var::from_tensor(&at(x, device)).unwrap();
        let (q, k, v) = (var(&case.q), var(&case.k), var(&case.v));
        let params = case.bias.as_ref().map(|b| var(&b.params));
        let bias = case
            .bias
            .as_ref()
            .zip(params.as_ref())
            .map(|(b, params)| Bias { params: params.as_tensor().clone(), ..b.clone() });
        let keys = Keys::pack(&k, &v, &at(&case.sites, device), &at(&case.mask, device)).unwrap();
        let asked = at(&case.asked, device);
        let out = scan(&q, &asked, &keys, bias.as_ref(), CHUNK, Start::Exact).unwrap();
        let loss = (&out * at(&loss(case), device)).unwrap().sum_all().unwrap();
        let gradients = loss.backward().unwrap();
        let all = [Some(&q), Some(&k), Some(&v), params.as_ref()];
        let gradients =
            all.into_iter().flatten().map(|x| host(gradients.get(x).unwrap())).collect();
        (host(&out), gradients)
    }

    #[test]
    fn the_kernel_and_its_gradients_equal_full_attention() {
        let Some(device) = gpu() else { return };
        every_case(|case, most, name| {
            let (out, gradients) = on_gpu(case, &device);
            let found = gap(&out, &case.reference());
            assert!(found < most, "{name}: {found:e}");
            for (i, (found, truth)) in gradients.iter().zip(&learnt(case)).enumerate() {
                let found = apart(found, truth);
                assert!(found < allowed(case), "{name}, gradient {i}: {found:e}");
            }
        });
    }

    #[test]
    fn the_kernel_reads_extreme_scores_like_any_other() {
        let Some(device) = gpu() else { return };
        for (name, case) in extreme() {
            let found = gap(&on_gpu(&case, &device).0, &case.reference());
            assert!(found < 2e-6, "{name}: {found:e}");
        }
    }

    /// Enough queries and keys for many blocks of threads, and the same answer again, bit by bit.
    #[test]
    fn many_blocks_answer_like_one() {
        let Some(device) = gpu() else { return };
        let mut rng = Stream::new(33, "cuda", 0);
        let shape = Shape { targets: 1000, context: 3000, d: 32, w: 32, size: 0.5, ..USUAL };
        let case = case(&mut rng, &shape, BIASES[2], Metric::Euclidean);
        let (out, gradients) = on_gpu(&case, &device);
        let found = gap(&out, &case.reference());
        assert!(found < 2e-6, "{found:e}");
        let (again, of_again) = on_gpu(&case, &device);
        assert_eq!(floats(&out), floats(&again));
        for (one, other) in gradients.iter().zip(&of_again) {
            assert_eq!(floats(one), floats(other));
        }
    }

    /// What is left out has no weight, or no more than was allowed.
    #[test]
    fn a_reader_leaves_out_no_more_than_allowed() {
        let Some(device) = gpu() else { return };
        let mut rng = Stream::new(38, "cuda", 0);
        let shape = Shape { targets: 5000, context: 3000, spread: 0.3, clumps: true, ..USUAL };
        for (terms, lose) in [
            (&[(Term::Wendland, [1.0, 5.0, 0.0])][..], 0.0),
            (&[(Term::Rbf, [30.0, 4.0, 0.0])], 1e-3),
            (&[(Term::Matern32, [1.0, 6.0, 0.0]), (Term::Sink, [-3.0, 0.0, 0.0])], 1e-4),
        ] {
            let case = case(&mut rng, &shape, terms, Metric::Euclidean);
            let of = |x| at(x, &device);
            let bias = case.bias.as_ref().map(|b| Bias { params: of(&b.params), ..b.clone() });
            let (k, v) = (of(&case.k), of(&case.v));
            let (sites, mask) = (of(&case.sites), of(&case.mask));
            let reading = Reading { lose, ..Reading::default() };
            let reader = Reader::new(&k, &v, &sites, &mask, bias.as_ref(), reading).unwrap();
            let out = host(&reader.read(&of(&case.q), &of(&case.asked)).unwrap());
            let off = (out.to_dtype(DType::F64).unwrap() - case.reference()).unwrap();
            let off = off.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
            let top = case.v.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
            assert!(off <= (2.0 * lose + 2e-5) * top, "{terms:?}, ε {lose}: off by {off:e}");
            assert!(reader.tally().skipped() > 0.3, "{terms:?}: too little was left out");
        }
    }
}
