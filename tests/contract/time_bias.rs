//! Laws of time in attention: marked rounds are the bias on time, in value and in gradient, for any times
//! of queries, hidden keys and far scores; and a model that reads time does so alike however it computes.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use isopleth::{
    Observations, Of, Process, Result, Sites, Stream,
    attention::{
        Bias, InTime, Keys, Metric, Reader, Reading, Rounds, Term, full, full_in_time, scan,
        scan_in_time,
    },
    fused, likelihood,
    model::{self, Problem, params::Params},
    registry::Named,
};

const CPU: Device = Device::Cpu;

fn normal(rng: &mut Stream, shape: &[usize], scale: f64) -> Tensor {
    let n = shape.iter().product();
    // What f32 holds exactly, so that both precisions see the same numbers.
    let values: Vec<f64> = rng.normals(n).iter().map(|v| f64::from((v * scale) as f32)).collect();
    Tensor::from_vec(values, shape, &CPU).unwrap()
}

fn host(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn gap(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    host(a).iter().zip(host(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// Every family that time may have, alone and together.
fn families() -> Vec<Vec<Term>> {
    let real = Term::ALL.into_iter().filter(|t| !matches!(t, Term::Sink | Term::Wendland));
    real.clone().map(|t| vec![t]).chain([real.collect()]).collect()
}

struct Case {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sq: Tensor,
    sk: Tensor,
    tq: Tensor,
    tk: Tensor,
    mask: Tensor,
    bias: Tensor,
    time: Tensor,
    terms: Vec<Term>,
}

const SPACE: [Term; 3] = [Term::Rbf, Term::Scalar, Term::Sink];

impl Case {
    /// Two rows of different rounds; `score` is about as large as q · k.
    fn new(rng: &mut Stream, terms: &[Term], [targets, context]: [usize; 2], score: f64) -> Self {
        let (b, h, d, w) = (2, 3, 4, 3);
        let bounded = |rng: &mut Stream, terms: &[Term]| {
            let mut p = host(&normal(rng, &[h, terms.len(), 3], 1.0));
            for (p, term) in p.chunks_mut(3).zip(terms.iter().cycle()) {
                p[1] = p[1].abs();
                if term.is_log_kernel() {
                    p[0] = p[0].abs();
                }
            }
            Tensor::from_vec(p, (h, terms.len(), 3), &CPU).unwrap()
        };
        // Row 0 has three rounds, row 1 five, unevenly spaced.
        let round = |row: usize, i: usize| [-1.0, -0.75, 0.125, 0.5, 1.0][(i * 7) % [3, 5][row]];
        let tk = (0..b).flat_map(|row| (0..context).map(move |i| round(row, i)));
        let mask = (0..b * context).map(|i| if context > 1 && i % 5 == 1 { 0.0 } else { 1.0 });
        Case {
            q: normal(rng, &[b, targets, h, d], score),
            k: normal(rng, &[b, context, h, d], 1.0),
            v: normal(rng, &[b, context, h, w], 1.0),
            sq: normal(rng, &[b, targets, 2], 1.0),
            sk: normal(rng, &[b, context, 2], 1.0),
            tq: normal(rng, &[b, targets, 1], 1.0),
            tk: Tensor::from_vec(tk.collect::<Vec<f64>>(), (b, context, 1), &CPU).unwrap(),
            mask: Tensor::from_vec(mask.collect::<Vec<f64>>(), (b, context), &CPU).unwrap(),
            bias: bounded(rng, &SPACE),
            time: bounded(rng, terms),
            terms: terms.to_vec(),
        }
    }

    fn cast(&self) -> Case {
        let cast = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
        let Case { q, k, v, sq, sk, tq, tk, mask, bias, time, terms } = self;
        let [q, k, v, sq, sk] = [q, k, v, sq, sk].map(cast);
        let [tq, tk, mask, bias, time] = [tq, tk, mask, bias, time].map(cast);
        Case { q, k, v, sq, sk, tq, tk, mask, bias, time, terms: terms.clone() }
    }

    fn biases(&self) -> [Bias; 2] {
        let of = |terms: &[Term], params: &Tensor| Bias {
            terms: terms.to_vec(),
            params: params.clone(),
            metric: Metric::Euclidean,
        };
        [of(&SPACE, &self.bias), of(&self.terms, &self.time)]
    }

    /// Scores with both biases, written out: the reference.
    fn written_out(&self) -> Tensor {
        let keys = Keys::pack(&self.k, &self.v, &self.sk, &self.mask).unwrap();
        let [space, time] = self.biases();
        let time = InTime { bias: &time, targets: &self.tq, context: &self.tk };
        full_in_time(&self.q, &self.sq, &keys, Some(&space), Some(time)).unwrap()
    }

    /// Queries and keys by way of rounds.
    fn marked(&self) -> (Tensor, Tensor, Bias) {
        let rounds = Rounds::of(&self.tk, 8).unwrap().unwrap();
        let [space, time] = self.biases();
        (rounds.ask(&self.q, &self.tq, &time).unwrap(), rounds.mark(&self.k).unwrap(), space)
    }
}

#[test]
fn marked_rounds_are_the_bias_written_out() {
    let mut rng = Stream::new(3, "rounds", 0);
    for terms in families() {
        for size in [[1, 1], [5, 9], [17, 40]] {
            for score in [0.5, 30.0] {
                let case = Case::new(&mut rng, &terms, size, score);
                let expected = case.written_out();
                let (q, k, bias) = case.marked();
                let keys = Keys::pack(&k, &case.v, &case.sk, &case.mask).unwrap();
                let found = full(&q, &case.sq, &keys, Some(&bias)).unwrap();
                let name = format!(
                    "{:?} {size:?} {score}",
                    terms.iter().map(|t| t.name()).collect::<Vec<_>>()
                );
                assert!(gap(&found, &expected) < 1e-11, "{name}: {:e}", gap(&found, &expected));
                // Chunk by chunk, for times of any number.
                let keys = Keys::pack(&case.k, &case.v, &case.sk, &case.mask).unwrap();
                let [space, time] = case.biases();
                let time = InTime { bias: &time, targets: &case.tq, context: &case.tk };
                for chunk in [1, 7, 512] {
                    let scanned =
                        scan_in_time(&case.q, &case.sq, &keys, Some(&space), chunk, time).unwrap();
                    assert!(gap(&scanned, &expected) < 1e-12, "{name}, chunks of {chunk}");
                }
                // In f32, by the fused kernels: for learning, and for reading alone.
                let few = case.cast();
                let (q, k, bias) = few.marked();
                let keys = Keys::pack(&k, &few.v, &few.sk, &few.mask).unwrap();
                let learnt =
                    scan(&q, &few.sq, &keys, Some(&bias), 512, Default::default()).unwrap();
                let way = Reading::default();
                let reader = Reader::new(&k, &few.v, &few.sk, &few.mask, Some(&bias), way).unwrap();
                let read = reader.read(&q, &few.sq).unwrap();
                // Rounding of f32 moves a score by about its size times 2⁻²⁴, and a weight as much.
                let close = if score > 1.0 { 3e-4 } else { 1e-5 };
                for (how, found) in [("learnt", learnt), ("read", read)] {
                    assert!(
                        gap(&found, &expected) < close,
                        "{name} {how}: {:e}",
                        gap(&found, &expected)
                    );
                }
            }
        }
    }
}

#[test]
fn gradients_pass_through_marked_rounds() {
    let mut rng = Stream::new(4, "rounds", 0);
    for terms in families() {
        let mut case = Case::new(&mut rng, &terms, [6, 11], 0.7);
        let weight = normal(&mut rng, &[2, 6, 3, 3], 1.0);
        let vars = [&case.q, &case.k, &case.v, &case.bias, &case.time]
            .map(|x| Var::from_tensor(x).unwrap());
        let [q, k, v, bias, time] = vars.each_ref().map(|var| var.as_tensor().clone());
        (case.q, case.k, case.v, case.bias, case.time) = (q, k, v, bias, time);
        let slope = |out: &Tensor| (out * &weight).unwrap().sum_all().unwrap().backward().unwrap();
        let expected = slope(&case.written_out());
        let (q, k, space) = case.marked();
        let keys = Keys::pack(&k, &case.v, &case.sk, &case.mask).unwrap();
        let found = slope(&full(&q, &case.sq, &keys, Some(&space)).unwrap());
        for (i, var) in vars.iter().enumerate() {
            let [a, b] = [&expected, &found].map(|g| g.get(var.as_tensor()).unwrap().clone());
            assert!(host(&a).iter().any(|g| *g != 0.0), "{terms:?}: argument {i} has no slope");
            assert!(gap(&a, &b) < 1e-11, "{terms:?}: argument {i}: {:e}", gap(&a, &b));
        }
    }
}

#[test]
fn only_few_times_are_rounds() {
    let times = |n: usize| {
        let t: Vec<f64> = (0..60).map(|i| (i % n) as f64).collect();
        Tensor::from_vec(t, (2, 30, 1), &CPU).unwrap()
    };
    assert_eq!(Rounds::of(&times(8), 8).unwrap().unwrap().len(), 8);
    assert!(Rounds::of(&times(9), 8).unwrap().is_none());
    let bad = Tensor::from_vec(vec![0.0, f64::NAN], (1, 2, 1), &CPU).unwrap();
    assert!(Rounds::of(&bad, 8).unwrap_err().to_string().contains("not a number"));
}

type Model = Box<dyn Process + Send + Sync>;

/// A model that reads time, of some weights; time has a say in them from the start.
fn model(kind: &str, params: &mut Params) -> Model {
    let entry = model::MODELS.iter().find(|e| e.name == kind).unwrap();
    let mut table: toml::Table = entry.tiny.parse().unwrap();
    let terms = ["exponential", "scalar", "periodic"].map(toml::Value::from);
    table.insert("time_bias".into(), toml::Value::Array(terms.to_vec()));
    let binomial = likelihood::find("binomial").unwrap();
    (entry.build)(&table, Problem::new(2, binomial), params).unwrap()
}

/// Weights in which time matters.
fn weights() -> BTreeMap<String, Tensor> {
    let mut params = Params::new(5, &CPU, DType::F32);
    model("tnp-kr", &mut params);
    let mut rng = Stream::new(6, "time", 0);
    let loud = |(path, var): (&String, &Var)| {
        let tensor = match path.ends_with("time_bias") {
            true => normal(&mut rng, var.dims(), 1.0).to_dtype(DType::F32).unwrap(),
            false => var.as_tensor().clone(),
        };
        (path.clone(), tensor)
    };
    params.vars().iter().map(loud).collect()
}

fn visits(n: usize, rounds: usize, shift: f64) -> (Observations, Sites) {
    let mut rng = Stream::new(9, "visits", 0);
    let places =
        |rng: &mut Stream, n: usize| normal(rng, &[1, n, 2], 0.6).to_dtype(DType::F32).unwrap();
    let times = |n: usize, of: usize| {
        let t: Vec<f32> =
            (0..n).map(|i| ((i % of) as f64 * 2.0 / of as f64 - 1.0 + shift) as f32).collect();
        Some(Tensor::from_vec(t, (1, n, 1), &CPU).unwrap())
    };
    let context = Sites { s: places(&mut rng, n), t: times(n, rounds), x: None };
    let y: Vec<f32> = (0..n).map(|i| (i % 9) as f32).collect();
    let y = Tensor::from_vec(y, (1, n, 1), &CPU).unwrap();
    let tested = Tensor::full(12f32, (1, n), &CPU).unwrap();
    let context = Observations::new(context, y, Some(tested)).unwrap();
    (context, Sites { s: places(&mut rng, 21), t: times(21, 5), x: None })
}

fn ask(model: &Model, context: &Observations, targets: &Sites) -> Result<Vec<f64>> {
    let marginals = model.condition(context)?.at(targets)?.marginals(0, Of::Surface)?;
    Ok([marginals.mean, marginals.sd].concat())
}

fn apart(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// Dense, in rounds, chunk by chunk, fused or of stock operations, frozen or to be learnt: one answer.
#[test]
fn a_model_reads_time_alike_however_it_computes() -> Result<()> {
    let weights = weights();
    let frozen = |kind: &str| model(kind, &mut Params::frozen(weights.clone(), &CPU, DType::F32));
    let learning = |kind: &str| model(kind, &mut Params::saved(weights.clone(), &CPU, DType::F32));
    let wide = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
    let double = weights.iter().map(|(path, x)| (path.clone(), wide(x))).collect();
    let double = model("tnp-kr-full", &mut Params::frozen(double, &CPU, DType::F64));
    // Rounds, and more different times than are marked on keys.
    for rounds in [1, 4, 70] {
        let (context, targets) = visits(140, rounds, 0.0);
        let exact = {
            let sites = |s: &Sites| s.map(|x| Ok(wide(x)));
            let context = Observations {
                sites: sites(&context.sites)?,
                y: wide(&context.y),
                mask: wide(&context.mask),
                trials: context.trials.as_ref().map(wide),
            };
            ask(&double, &context, &sites(&targets)?)?
        };
        for kind in ["tnp-kr", "tnp-kr-full"] {
            for (how, model) in [("frozen", frozen(kind)), ("learning", learning(kind))] {
                for plain in [false, true] {
                    let found = fused::plain(plain, || ask(&model, &context, &targets))?;
                    let moved = apart(&found, &exact);
                    assert!(moved < 2e-5, "{kind} {how}, stock {plain}, {rounds} times: {moved:e}");
                }
            }
        }
        // Tiles change nothing; when a map is of does.
        let model = frozen("tnp-kr");
        let posterior = model.condition(&context)?;
        let whole = posterior.at(&targets)?.marginals(0, Of::Surface)?.mean;
        let tile = posterior.at(&targets.narrow(7, 3)?)?.marginals(0, Of::Surface)?.mean;
        let components = whole.len() / targets.len();
        let moved = apart(&tile, &whole[7 * components..10 * components]);
        assert!(moved < 2e-6, "{rounds} times: tiles move it by {moved:e}");
        let later = Sites { t: Some((targets.t.as_ref().unwrap() + 0.5)?), ..targets.clone() };
        let moved = apart(&posterior.at(&later)?.marginals(0, Of::Surface)?.mean, &whole);
        assert!(moved > 1e-4, "{rounds} times: half a unit later moves it by {moved:e}");
        // Only differences of time count.
        let (shifted, targets) = visits(140, rounds, 4.0);
        let found = ask(&model, &shifted, &targets)?;
        assert!(apart(&found, &exact) < 1e-4, "a shift in time: {:e}", apart(&found, &exact));
    }
    Ok(())
}

#[test]
fn a_model_of_times_wants_them() -> Result<()> {
    let model = model("tnp-kr", &mut Params::frozen(weights(), &CPU, DType::F32));
    let (context, targets) = visits(12, 3, 0.0);
    let bare = |s: &Sites| Sites { t: None, ..s.clone() };
    let without = Observations { sites: bare(&context.sites), ..context.clone() };
    assert!(model.condition(&without).is_err());
    let error = model.condition(&context)?.at(&bare(&targets)).unwrap_err().to_string();
    assert!(error.contains("times"), "{error}");
    Ok(())
}

#[test]
fn a_bias_on_time_that_makes_no_model_is_refused() {
    for (kind, term, help) in [
        ("tnp-kr", "sink", "exponential"),
        ("tnp-kr", "wendland", "exponential"),
        ("tnp-kr-dka", "scalar", "tnp-kr"),
        ("tnp-kr-performer", "scalar", "tnp-kr"),
    ] {
        let entry = model::MODELS.iter().find(|e| e.name == kind).unwrap();
        let mut table: toml::Table = entry.tiny.parse().unwrap();
        table.insert("time_bias".into(), toml::Value::Array(vec![term.into()]));
        let problem = Problem::new(2, likelihood::find("binomial").unwrap());
        let built = (entry.build)(&table, problem, &mut Params::new(1, &CPU, DType::F32));
        let Err(error) = built else { panic!("{kind} with {term}") };
        assert!(error.help().unwrap().contains(help), "{kind} {term}: {error}");
    }
}
