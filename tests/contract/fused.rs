//! Laws of fused layers: in value and gradient they equal their composed f64 twins, which agree with
//! finite differences, for any width and for inputs that are not contiguous.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor, Var};
use isopleth::{
    Observations, Sites, Stream,
    fused::{
        conv,
        conv::Window,
        depthwise, gelu, layer_norm, linear,
        set_conv::{Lattice, from_lattice, to_lattice},
    },
    likelihood,
    model::{
        MODELS, Problem,
        layer::{Activation, Chain, Dense, Mlp, Norm, Summary},
        params::{Init, Params},
    },
};

const CPU: Device = Device::Cpu;

/// Widths around the eight and sixteen lanes of the loops, and rows around their blocks of 256.
const WIDTHS: [usize; 9] = [1, 2, 3, 7, 8, 9, 17, 33, 64];
const ROWS: [usize; 4] = [1, 2, 5, 259];

fn normal(rng: &mut Stream, shape: &[usize], scale: f64) -> Tensor {
    let n = shape.iter().product();
    let values: Vec<f64> = rng.normals(n).into_iter().map(|v| v * scale).collect();
    Tensor::from_vec(values, shape, &CPU).unwrap()
}

fn host(x: &Tensor) -> Vec<f64> {
    x.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

/// Largest difference, relative to the largest value; 0.1 where all are smaller, since what is left
/// of a sum that cancels has the rounding of its terms.
fn relative(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().all(|v| v.is_finite()), "not finite");
    let top = b.iter().fold(0.1f64, |m, v| m.max(v.abs()));
    a.iter().zip(b).fold(0.0f64, |m, (x, y)| m.max((x - y).abs())) / top
}

type Layer = fn(&[Tensor]) -> Result<Tensor>;

/// Value, then the gradient of `Σ weigh · layer(inputs)` with respect to each input.
fn learn(layer: Layer, inputs: &[Tensor], weigh: &Tensor, dtype: DType) -> Result<Vec<Vec<f64>>> {
    let vars =
        inputs.iter().map(|x| Var::from_tensor(&x.to_dtype(dtype)?)).collect::<Result<Vec<_>>>()?;
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let out = layer(&tensors)?;
    let grads = (&out * weigh.to_dtype(dtype)?)?.sum_all()?.backward()?;
    let slopes = vars.iter().map(|v| host(grads.get(v.as_tensor()).expect("a gradient")));
    Ok([host(&out)].into_iter().chain(slopes).collect())
}

/// The fused layer against its twin, and the twin against finite differences of itself.
fn check(name: &str, layer: Layer, inputs: &[Tensor], weigh: &Tensor) -> Result<()> {
    let fast = learn(layer, inputs, weigh, DType::F32)?;
    let twin = learn(layer, inputs, weigh, DType::F64)?;
    for (i, (a, b)) in fast.iter().zip(&twin).enumerate() {
        let what = if i == 0 { "value".into() } else { format!("gradient of input {}", i - 1) };
        let apart = relative(a, b);
        assert!(apart < 1e-5, "{name}: the {what} is off by {apart:e}");
    }
    for (i, input) in inputs.iter().enumerate() {
        let values = host(input);
        // A few entries, spread over the tensor.
        for at in (0..values.len()).step_by(values.len().div_ceil(7)) {
            let step = |h: f64| -> Result<f64> {
                let (mut there, mut moved) = (inputs.to_vec(), values.clone());
                moved[at] += h;
                there[i] = Tensor::from_vec(moved, input.shape(), &CPU)?;
                Ok(host(&(layer(&there)? * weigh)?.sum_all()?)[0])
            };
            let h = 1e-5;
            let numeric = (step(h)? - step(-h)?) / (2.0 * h);
            let apart = (numeric - twin[i + 1][at]).abs();
            let scale = twin[i + 1].iter().fold(1.0f64, |m, v| m.max(v.abs()));
            assert!(
                apart < 3e-6 * scale,
                "{name}: entry {at} of input {i}: slope {numeric}, gradient {}",
                twin[i + 1][at]
            );
        }
    }
    Ok(())
}

#[test]
fn linear_equals_its_twin() -> Result<()> {
    let mut rng = Stream::new(1, "linear", 0);
    for inputs in WIDTHS {
        for (rows, outputs) in ROWS.into_iter().zip([5, 1, 16, 33]) {
            let x = normal(&mut rng, &[rows, inputs], 1.0);
            let (w, b) =
                (normal(&mut rng, &[inputs, outputs], 1.0), normal(&mut rng, &[outputs], 1.0));
            let weigh = normal(&mut rng, &[rows, outputs], 1.0);
            let name = format!("linear {rows} × {inputs} → {outputs}");
            check(&name, |t| linear(&t[0], &t[1], &t[2]), &[x, w, b], &weigh)?;
        }
    }
    Ok(())
}

#[test]
fn layer_norm_equals_its_twin() -> Result<()> {
    let mut rng = Stream::new(2, "layer norm", 0);
    for width in WIDTHS {
        for rows in ROWS {
            // Far from zero compared with its spread: a variance by E[x²] − E[x]² would fail here.
            let x = (normal(&mut rng, &[rows, width], 1.0) + 3.0)?;
            let (scale, shift) = (normal(&mut rng, &[width], 1.0), normal(&mut rng, &[width], 1.0));
            let weigh = normal(&mut rng, &[rows, width], 1.0);
            // One number per row has no spread: its slope is 0 and only rounding is left of it.
            if width == 1 {
                let y = layer_norm(
                    &x.to_dtype(DType::F32)?,
                    &scale.to_dtype(DType::F32)?,
                    &shift.to_dtype(DType::F32)?,
                )?;
                let shift = host(&shift)[0];
                assert!(host(&y).iter().all(|y| (y - shift).abs() < 1e-6), "one wide: the shift");
                continue;
            }
            let name = format!("layer norm {rows} × {width}");
            // With two or three numbers a row can be nearly constant, and its slope steep.
            let x = if width < 7 { spread(&x)? } else { x };
            check(&name, |t| layer_norm(&t[0], &t[1], &t[2]), &[x, scale, shift], &weigh)?;
        }
    }
    Ok(())
}

/// Each column moved apart from the next, so that no row is nearly constant.
fn spread(x: &Tensor) -> Result<Tensor> {
    let (_, width) = x.dims2()?;
    let steps: Vec<f64> = (0..width).map(|i| 8.0 * i as f64).collect();
    x.broadcast_add(&Tensor::from_vec(steps, width, &CPU)?)
}

#[test]
fn a_constant_row_is_normalised_to_the_shift() -> Result<()> {
    for width in WIDTHS {
        let one = |v: f32| Tensor::full(v, width, &CPU);
        let x = Var::from_tensor(&Tensor::full(7f32, (3, width), &CPU)?)?;
        let y = layer_norm(x.as_tensor(), &one(2.0)?, &one(-0.5)?)?;
        assert!(host(&y).iter().all(|y| *y == -0.5), "{width} wide");
        let grads = y.sqr()?.sum_all()?.backward()?;
        assert!(
            host(grads.get(x.as_tensor()).unwrap()).iter().all(|g| g.is_finite()),
            "{width} wide"
        );
    }
    Ok(())
}

#[test]
fn gelu_equals_its_twin() -> Result<()> {
    let mut rng = Stream::new(3, "gelu", 0);
    // The last is longer than a block of the loop.
    for n in WIDTHS.into_iter().chain([259, (1 << 14) + 3]) {
        let (x, weigh) = (normal(&mut rng, &[n], 2.0), normal(&mut rng, &[n], 1.0));
        check(&format!("gelu {n}"), |t| gelu(&t[0]), &[x], &weigh)?;
    }
    let far = Tensor::new(&[-1e4f32, -30.0, 0.0, 30.0, 1e4], &CPU)?;
    assert_eq!(host(&gelu(&far)?), [0.0, 0.0, 0.0, 30.0, 1e4]);
    Ok(())
}

/// Layers are fed slices and transposes; they must not read them as if they were whole.
#[test]
fn inputs_need_not_be_contiguous() -> Result<()> {
    let mut rng = Stream::new(4, "strides", 0);
    let wide = normal(&mut rng, &[2, 11, 9], 1.0);
    let (w, b) = (normal(&mut rng, &[5, 6], 1.0), normal(&mut rng, &[6], 1.0));
    type Layer<'a> = (&'a str, &'a dyn Fn(&Tensor, DType) -> Result<Tensor>);
    let layers: [Layer; 3] = [
        ("linear", &|x, d| linear(x, &w.to_dtype(d)?, &b.to_dtype(d)?)),
        ("layer norm", &|x, d| {
            layer_norm(x, &b.narrow(0, 0, 5)?.to_dtype(d)?, &b.narrow(0, 1, 5)?.to_dtype(d)?)
        }),
        ("gelu", &|x, _| gelu(x)),
    ];
    for (name, layer) in layers {
        for cut in [0, 1] {
            let view = |d: DType| -> Result<Tensor> {
                let x = wide.to_dtype(d)?;
                if cut == 0 { x.narrow(2, 3, 5) } else { x.narrow(1, 2, 5)?.transpose(1, 2) }
            };
            let fast = layer(&view(DType::F32)?, DType::F32)?;
            let twin = layer(&view(DType::F64)?, DType::F64)?;
            assert_eq!(fast.dims(), twin.dims(), "{name}");
            let apart = relative(&host(&fast), &host(&twin));
            assert!(apart < 1e-5, "{name}: off by {apart:e}");
        }
    }
    Ok(())
}

/// An empty batch goes through as an empty batch.
#[test]
fn nothing_in_nothing_out() -> Result<()> {
    let x = Tensor::zeros((2, 0, 4), DType::F32, &CPU)?;
    let (w, b) = (Tensor::ones((4, 3), DType::F32, &CPU)?, Tensor::ones(3, DType::F32, &CPU)?);
    let four = Tensor::ones(4, DType::F32, &CPU)?;
    assert_eq!(linear(&x, &w, &b)?.dims(), [2, 0, 3]);
    assert_eq!(layer_norm(&x, &four, &four)?.dims(), [2, 0, 4]);
    assert_eq!(gelu(&x)?.dims(), [2, 0, 4]);
    Ok(())
}

/// Layers of every sort, and what they read.
struct Net {
    before: Norm,
    phi: Mlp,
    inner: Norm,
    feed: Mlp,
    out: Dense,
    summary: Summary,
    x: Tensor,
    sites: Tensor,
    mask: Tensor,
}

/// Weights and inputs that are the same for every kind of number.
struct Drawn {
    weights: BTreeMap<String, Tensor>,
    inputs: [Tensor; 4],
    widths: [usize; 4],
}

impl Drawn {
    /// `widths`: of a token, a place, hidden features and the output.
    fn new(batch: usize, sites: usize, widths: [usize; 4]) -> Self {
        let [width, dim, hidden, _] = widths;
        let mut rng = Stream::new(7, "run", (sites * 64 + width) as u64);
        let mut params = Params::new(1, &CPU, DType::F64);
        layers(&mut params, widths);
        let weights = params.vars().iter().map(|(path, var)| {
            let fan = var.dims().iter().rev().nth(1).copied().unwrap_or(2) as f64;
            (path.clone(), normal(&mut rng, var.dims(), fan.powf(-0.5)))
        });
        let weights = weights.collect();
        let inputs = [
            normal(&mut rng, &[batch, sites, width], 1.0),
            normal(&mut rng, &[batch, sites, dim], 1.0),
            normal(&mut rng, &[batch, hidden, width], (hidden as f64).powf(-0.5)),
            (normal(&mut rng, &[batch, sites, 1], 1.0)).ge(0.0).unwrap(),
        ];
        Drawn { weights, inputs, widths }
    }

    /// Only asked: nothing of it may learn.
    fn net(&self, dtype: DType) -> Net {
        let mut params = Params::frozen(self.weights.clone(), &CPU, dtype);
        let (before, phi, inner, feed, out) = layers(&mut params, self.widths);
        let [x, sites, matrix, mask] = self.inputs.each_ref().map(|x| x.to_dtype(dtype).unwrap());
        let summary = Summary::new(matrix, &phi).unwrap();
        Net { before, phi, inner, feed, out, summary, x, sites, mask }
    }
}

fn layers(
    params: &mut Params,
    [width, dim, hidden, out]: [usize; 4],
) -> (Norm, Mlp, Norm, Mlp, Dense) {
    let (mut scope, init) = (params.scope(), Init::Orthogonal);
    let (phi, feed) = ([dim + width, hidden, hidden], [width, 2 * hidden, width]);
    (
        Norm::new(&mut scope.at("before"), width).unwrap(),
        Mlp::new(&mut scope.at("phi"), &phi, Activation::Gelu, &init).unwrap(),
        Norm::new(&mut scope.at("inner"), width).unwrap(),
        Mlp::new(&mut scope.at("feed"), &feed, Activation::Relu, &init).unwrap(),
        Dense::new(&mut scope.at("out"), width, out, &init).unwrap(),
    )
}

impl Net {
    /// Runs that use each step, alone and together.
    fn runs(&self) -> [(&'static str, Chain<'_>); 6] {
        let x = || Chain::new(&self.x);
        let features = || x().join(&self.sites).mlp(&self.phi);
        let block = x().keep().norm(&self.before).join(&self.sites);
        let block = block.summary(&self.phi, &self.summary).norm(&self.inner).add_kept();
        let block = block.keep().norm(&self.before).mlp(&self.feed).add_kept();
        [
            ("dense", x().dense(&self.out)),
            ("norm", x().norm(&self.before).plus(&self.x)),
            ("features", features().scale(&self.mask)),
            ("features, joined", features().join(&self.sites).join(&self.x)),
            ("feed forward", x().mlp(&self.feed).plus(&self.x)),
            ("block", block.dense(&self.out)),
        ]
    }
}

/// What a model does when it is only asked, against the same layers one by one in f64.
#[test]
fn a_run_equals_its_twin() -> isopleth::Result<()> {
    let mut worst = 0f64;
    for (batch, sites) in [(1, 1), (1, 5), (1, 31), (1, 32), (2, 33), (3, 100), (1, 259), (2, 300)]
    {
        for widths in [[1, 1, 1, 1], [3, 2, 7, 5], [8, 1, 9, 16], [17, 2, 33, 3], [64, 2, 128, 66]]
        {
            let drawn = Drawn::new(batch, sites, widths);
            let (fast, twin) = (drawn.net(DType::F32), drawn.net(DType::F64));
            for ((name, fast), (_, twin)) in fast.runs().iter().zip(twin.runs()) {
                // Few numbers may be nearly equal, and a norm makes much of their rounding.
                if widths[0] < 8 && ["norm", "block"].contains(name) {
                    continue;
                }
                let twin = twin.composed()?;
                let (fast, plain) = (fast.run()?, fast.composed()?);
                assert_eq!(fast.dims(), twin.dims(), "{name}");
                let apart = relative(&host(&fast), &host(&twin));
                let plain = relative(&host(&plain), &host(&twin));
                worst = worst.max(apart);
                let what = format!("{name} of {batch} × {sites}, {widths:?}");
                // Where rounding is made much of, as much as of the plain layers' rounding.
                assert!(
                    apart < 2e-6f64.max(2.0 * plain),
                    "{what}: off by {apart:e}, plain {plain:e}"
                );
            }
        }
    }
    println!("at most {worst:e} from the twin");
    Ok(())
}

/// Rows do not meet, nor does it matter which thread takes which.
#[test]
fn a_row_is_the_same_in_any_company() -> isopleth::Result<()> {
    let drawn = Drawn::new(1, 300, [17, 2, 33, 3]);
    let net = drawn.net(DType::F32);
    let whole: Vec<Vec<f64>> =
        net.runs().iter().map(|(_, run)| Ok(host(&run.run()?))).collect::<isopleth::Result<_>>()?;
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        for ((name, run), whole) in net.runs().iter().zip(&whole) {
            assert_eq!(&host(&pool.install(|| run.run())?), whole, "{name}, {threads} threads");
        }
    }
    for (start, len) in [(0, 1), (31, 2), (255, 45)] {
        let mut part = drawn.net(DType::F32);
        for x in [&mut part.x, &mut part.sites, &mut part.mask] {
            *x = x.narrow(1, start, len)?;
        }
        for ((name, run), whole) in part.runs().iter().zip(&whole) {
            let part = host(&run.run()?);
            let width = part.len() / len;
            assert_eq!(
                part,
                whole[start * width..(start + len) * width],
                "{name}, {start} + {len}"
            );
        }
    }
    Ok(())
}

/// Far out GELU is the line or 0, and a number that is none stays in its row.
#[test]
fn a_run_of_huge_tiny_and_missing_numbers() -> isopleth::Result<()> {
    let drawn = Drawn::new(1, 40, [9, 2, 8, 3]);
    let (mut fast, mut twin) = (drawn.net(DType::F32), drawn.net(DType::F64));
    let sizes: Vec<f64> = (0..40).map(|i| 10f64.powi(i - 20)).collect();
    let sizes = Tensor::from_vec(sizes, (1, 40, 1), &CPU)?;
    twin.x = twin.x.broadcast_mul(&sizes)?;
    fast.x = twin.x.to_dtype(DType::F32)?;
    // The variance of the largest is more than f32 holds.
    for ((name, fast), (_, twin)) in fast.runs().iter().zip(twin.runs()) {
        let (fast, twin) = (fast.run()?, twin.composed()?);
        let width = fast.dim(2)?;
        for (row, (a, b)) in
            host(&fast).chunks(width).zip(host(&twin).chunks(width)).enumerate().take(38)
        {
            let top = b.iter().fold(0f64, |m, v| m.max(v.abs()));
            let apart = a.iter().zip(b).fold(0f64, |m, (a, b)| m.max((a - b).abs()));
            assert!(apart <= 5e-6 * top.max(0.1), "{name}, row {row}: {a:?} for {b:?}");
        }
    }
    let whole = drawn.net(DType::F32);
    let mut holed = drawn.net(DType::F32);
    let mut values = host(&holed.x);
    values[9 * 20 + 4] = f64::NAN;
    holed.x = Tensor::from_vec(values, (1, 40, 9), &CPU)?.to_dtype(DType::F32)?;
    for ((name, holed), (_, whole)) in holed.runs().iter().zip(whole.runs()) {
        let (holed, whole) = (host(&holed.run()?), host(&whole.run()?));
        let width = whole.len() / 40;
        for (row, (a, b)) in holed.chunks(width).zip(whole.chunks(width)).enumerate() {
            match row {
                // What is joined from elsewhere is still there.
                20 => assert!(a.iter().any(|v| v.is_nan()), "{name}: {a:?}"),
                _ => assert_eq!(a, b, "{name}, row {row}"),
            }
            if row == 20 && !name.contains("joined") {
                assert!(a.iter().all(|v| v.is_nan()), "{name}: {a:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_run_of_nothing_and_of_what_does_not_fit() -> isopleth::Result<()> {
    let drawn = Drawn::new(2, 3, [9, 2, 8, 3]);
    let mut net = drawn.net(DType::F32);
    let other = Drawn::new(2, 4, [9, 2, 8, 3]).net(DType::F32);
    let another = Drawn::new(2, 3, [8, 2, 8, 3]).net(DType::F32);
    for x in [&other.x, &another.x, &net.sites] {
        assert!(Chain::new(&net.x).plus(x).run().is_err(), "{:?}", x.dims());
        assert!(Chain::new(x).keep().mlp(&net.feed).plus(&net.x).run().is_err(), "{:?}", x.dims());
    }
    assert!(Chain::new(&net.x).summary(&net.phi, &net.summary).run().is_err());
    let summary = Summary::new(net.x.clone(), &net.phi)?;
    assert!(Chain::new(&net.x).join(&net.sites).summary(&net.phi, &summary).run().is_err());
    for x in [&mut net.x, &mut net.sites, &mut net.mask] {
        *x = x.narrow(1, 0, 0)?;
    }
    for (name, run) in net.runs() {
        let empty = run.run()?;
        assert_eq!(empty.dims()[..2], [2, 0], "{name}");
    }
    Ok(())
}

/// A layer that learns is never read from what was packed before it learned.
#[test]
fn a_layer_that_learns_is_read_as_it_is() -> isopleth::Result<()> {
    let mut params = Params::new(3, &CPU, DType::F32);
    let (_, mlp, ..) = layers(&mut params, [4, 1, 5, 2]);
    let x = Tensor::ones((1, 3, 5), DType::F32, &CPU)?;
    let before = mlp.forward(&x)?;
    assert!(before.track_op(), "gradients are recorded");
    for var in params.vars().values() {
        var.set(&(var.as_tensor() + 1.0)?)?;
    }
    assert_ne!(host(&before), host(&mlp.forward(&x)?));
    Ok(())
}

/// Models as they are asked, against the same ones as they learn, and against f64.
#[test]
fn an_asked_model_equals_one_that_learns() -> isopleth::Result<()> {
    let problem = Problem::new(2, likelihood::find("gaussian")?);
    let places = |n: usize, seed: u64| -> isopleth::Result<Sites> {
        let xy = Stream::new(seed, "places", 0).normals(4 * n);
        Ok(Sites::new(Tensor::from_vec(xy, (2, n, 2), &CPU)?))
    };
    for entry in MODELS {
        let settings: toml::Table = entry.tiny.parse().unwrap();
        let mut params = Params::new(5, &CPU, DType::F64);
        (entry.build)(&settings, problem, &mut params)?;
        let weights: BTreeMap<String, Tensor> =
            params.vars().iter().map(|(p, v)| (p.clone(), v.as_tensor().clone())).collect();
        // More sites than are summed at once, where that is the model's way.
        let n = if entry.name.contains("dka") { 5000 } else { 40 };
        let (context, targets) = (places(n, 1)?, places(70, 2)?);
        let y = context.s.narrow(2, 0, 1)?.sin()?;
        let mask: Vec<f64> = (0..2 * n).map(|i| f64::from(i % 3 > 0 || i > n)).collect();
        let mask = Tensor::from_vec(mask, (2, n), &CPU)?;
        let ask = |params: &mut Params, dtype: DType| -> isopleth::Result<Vec<f64>> {
            let process = (entry.build)(&settings, problem, params)?;
            let sites = |x: &Sites| isopleth::Result::Ok(Sites::new(x.s.to_dtype(dtype)?));
            let mut context = Observations::new(sites(&context)?, y.to_dtype(dtype)?, None)?;
            context.mask = mask.to_dtype(dtype)?;
            let predictive = process.condition(&context)?.at(&sites(&targets)?)?;
            Ok([host(&predictive.mean), host(&predictive.surface_sd)].concat())
        };
        let truth = ask(&mut Params::frozen(weights.clone(), &CPU, DType::F64), DType::F64)?;
        let asked = ask(&mut Params::frozen(weights.clone(), &CPU, DType::F32), DType::F32)?;
        let learning = ask(&mut Params::saved(weights, &CPU, DType::F32), DType::F32)?;
        let (asked, learning) = (relative(&asked, &truth), relative(&learning, &truth));
        println!("{}: asked {asked:e}, learning {learning:e}", entry.name);
        // Kriging of a smooth surface without noise makes much of the last digits of a coordinate.
        let close = if entry.name == "kriging" { 5e-3 } else { 1e-5 };
        assert!(asked < close && learning < close, "{}: {asked:e}, {learning:e}", entry.name);
    }
    Ok(())
}

/// What a run gives, and its gradient by its two inputs and by every parameter.
fn taught(drawn: &Drawn, which: usize, composed: bool) -> isopleth::Result<Vec<Vec<f64>>> {
    let dtype = if composed { DType::F64 } else { DType::F32 };
    let mut params = Params::saved(drawn.weights.clone(), &CPU, dtype);
    let (before, phi, inner, feed, out) = layers(&mut params, drawn.widths);
    let inputs = [0, 0].map(|i| drawn.inputs[i].to_dtype(dtype).unwrap());
    let vars = inputs.map(|x| Var::from_tensor(&x).unwrap());
    let [x, other] = vars.each_ref().map(|v| v.as_tensor());
    let run = match which {
        0 => Chain::new(x).dense(&out),
        1 => Chain::new(x).norm(&before).plus(other),
        2 => Chain::new(x).keep().mlp(&feed).plus(other).keep().norm(&inner).add_kept(),
        _ => Chain::new(x).plus(other).keep().norm(&before).mlp(&feed).add_kept().dense(&out),
    };
    let y = if composed { run.composed()? } else { run.run()? };
    // Any direction, the same for both kinds of number.
    let n = y.elem_count();
    let weigh: Vec<f64> = (0..n).map(|i| (0.37 * i as f64).sin()).collect();
    let weigh = Tensor::from_vec(weigh, y.dims(), &CPU)?.to_dtype(dtype)?;
    let grads = (&y * weigh)?.sum_all()?.backward()?;
    let learns = params.vars().values().chain(&vars);
    let slopes = learns.map(|v| grads.get(v.as_tensor()).map_or(vec![0.0], host));
    drop(phi);
    Ok([host(&y)].into_iter().chain(slopes).collect())
}

/// A run that learns, against the same layers one by one in f64; and whatever the threads.
#[test]
fn a_run_that_learns_equals_its_twin() -> isopleth::Result<()> {
    let threads = |n: usize| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
    let (one, many) = (threads(1), threads(3));
    for (batch, sites, widths) in [
        (1, 1, [8, 1, 9, 16]),
        (1, 255, [17, 2, 33, 3]),
        (2, 257, [9, 1, 5, 1]),
        (1, 2049, [8, 1, 9, 7]),
        (3, 1500, [64, 2, 32, 66]),
    ] {
        let drawn = Drawn::new(batch, sites, widths);
        for which in 0..4 {
            let truth = taught(&drawn, which, true)?;
            let fast = one.install(|| taught(&drawn, which, false))?;
            for (i, (fast, truth)) in fast.iter().zip(&truth).enumerate() {
                let apart = relative(fast, truth);
                let name = format!("number {i} of run {which}, {batch} × {sites}, {widths:?}");
                // Sums over thousands of rows, and norms of few numbers.
                assert!(apart < 2e-5, "{name}: off by {apart:e}");
            }
            assert_eq!(fast, many.install(|| taught(&drawn, which, false))?, "threads");
        }
    }
    Ok(())
}

/// The gradient by every parameter of every model, fused in f32, against composed f64.
#[test]
fn a_model_learns_what_its_twin_learns() -> isopleth::Result<()> {
    let problem = Problem::new(2, likelihood::find("gaussian")?);
    let n = 40;
    let draw = |seed: u64, width: usize| {
        let x = Stream::new(seed, "learn", 0).normals(2 * n * width);
        Tensor::from_vec(x, (2, n, width), &CPU)
    };
    let (places, asked, y) = (draw(1, 2)?, draw(2, 2)?, draw(3, 1)?);
    let mask: Vec<f64> = (0..2 * n).map(|i| f64::from(i % 3 > 0)).collect();
    let mask = Tensor::from_vec(mask, (2, n), &CPU)?;
    // What kriging answers carries no gradient: it learns by its objective alone.
    for entry in MODELS.iter().filter(|e| e.name != "kriging") {
        let settings: toml::Table = entry.tiny.parse().unwrap();
        let mut params = Params::new(5, &CPU, DType::F64);
        (entry.build)(&settings, problem, &mut params)?;
        let weights: BTreeMap<String, Tensor> =
            params.vars().iter().map(|(p, v)| (p.clone(), v.as_tensor().clone())).collect();
        let learn = |dtype: DType| -> isopleth::Result<BTreeMap<String, Vec<f64>>> {
            let mut params = Params::saved(weights.clone(), &CPU, dtype);
            let process = (entry.build)(&settings, problem, &mut params)?;
            let sites = |x: &Tensor| isopleth::Result::Ok(Sites::new(x.to_dtype(dtype)?));
            let mut context = Observations::new(sites(&places)?, y.to_dtype(dtype)?, None)?;
            context.mask = mask.to_dtype(dtype)?;
            let answer = process.condition(&context)?.at(&sites(&asked)?)?;
            let sum = (answer.mean.sqr()?.sum_all()? + answer.surface_sd.sum_all()?)?;
            let grads = sum.backward()?;
            let by = |(path, var): (&String, &Var)| {
                Some((path.clone(), host(grads.get(var.as_tensor())?)))
            };
            Ok(params.vars().iter().filter_map(by).collect())
        };
        let (truth, fast) = (learn(DType::F64)?, learn(DType::F32)?);
        assert!(truth.len() > 4 && truth.keys().eq(fast.keys()), "{}", entry.name);
        for (path, truth) in truth {
            let apart = relative(&fast[&path], &truth);
            assert!(apart < 1e-4, "{}: `{path}` is off by {apart:e}", entry.name);
        }
    }
    Ok(())
}

/// Convolutions that keep, halve and double a raster, on a line and in the plane.
#[test]
fn convolutions_equal_candle_s() -> Result<()> {
    type Case = (&'static str, [usize; 3], [usize; 2], Layer);
    fn with(x: &[Tensor], window: Window, relu: bool) -> Result<Tensor> {
        conv(&x[0], &x[1], &x[2], window, relu)
    }
    const LINE: [usize; 2] = [1, 5];
    const PLANE: [usize; 2] = [3, 3];
    let cases: [Case; 6] = [
        ("a line", [1, 9, 3], LINE, |x| with(x, Window::new(LINE), true)),
        ("a line, halved", [1, 8, 3], LINE, |x| {
            with(x, Window { stride: [1, 2], ..Window::new(LINE) }, true)
        }),
        ("a line, doubled", [1, 6, 2], LINE, |x| {
            with(x, Window { repeat: [1, 2], ..Window::new(LINE) }, false)
        }),
        ("a plane", [5, 7, 3], PLANE, |x| with(x, Window::new(PLANE), true)),
        ("a plane, halved", [6, 4, 2], PLANE, |x| {
            with(x, Window { stride: [2; 2], ..Window::new(PLANE) }, false)
        }),
        ("a plane, doubled", [3, 4, 2], PLANE, |x| {
            with(x, Window { repeat: [2; 2], ..Window::new(PLANE) }, true)
        }),
    ];
    let mut rng = Stream::new(6, "convolutions", 0);
    for (name, [rows, columns, inputs], [tall, wide], layer) in cases {
        for outputs in [1, 4, 17] {
            let x = normal(&mut rng, &[2, rows, columns, inputs], 1.0);
            let weight = normal(&mut rng, &[tall * wide * inputs, outputs], 0.5);
            let bias = normal(&mut rng, &[outputs], 1.0);
            let inputs = [x, weight, bias];
            let weigh = normal(&mut rng, layer(&inputs)?.dims(), 1.0);
            check(&format!("{name}, {outputs} outputs"), layer, &inputs, &weigh)?;
        }
    }
    Ok(())
}

/// Set convolutions that leave out what weighs nothing equal those that sum over all cells: sites
/// inside, on the edge, far outside; lengths below a cell and as long as the lattice.
#[test]
fn set_convolutions_equal_the_sum_over_all_cells() -> Result<()> {
    const LINE: Lattice = Lattice { per_unit: 4, cells: [1, 13], first: [0, -6] };
    const PLANE: Lattice = Lattice { per_unit: 2, cells: [5, 7], first: [-2, -4] };
    type Case = (&'static str, [usize; 2], [Layer; 2]);
    let mut rng = Stream::new(7, "set convolutions", 0);
    for log_length in [-2.5, -0.7, 1.0] {
        let log_length = Tensor::new(&[log_length], &CPU)?;
        for channels in [1, 3, 9] {
            // Sites are data, and fixed: gradients are of values and length.
            let cases: [Case; 2] = [
                (
                    "a line",
                    LINE.cells,
                    [
                        |x| to_lattice(&line(x)?, &x[0], &x[1], LINE),
                        |x| from_lattice(&line(x)?, &x[0], &x[1], LINE),
                    ],
                ),
                (
                    "a plane",
                    PLANE.cells,
                    [
                        |x| to_lattice(&plane(x)?, &x[0], &x[1], PLANE),
                        |x| from_lattice(&plane(x)?, &x[0], &x[1], PLANE),
                    ],
                ),
            ];
            for (name, [rows, columns], [there, back]) in cases {
                // All of one sign: the gradient of ln ℓ is one sum, which must not cancel.
                let values = normal(&mut rng, &[2, 4, channels], 1.0).abs()?;
                let field = normal(&mut rng, &[2, rows, columns, channels], 1.0).abs()?;
                let name = format!("{name}, {channels} channels, ln ℓ = {log_length}");
                let inputs = [values.clone(), log_length.clone()];
                check(&format!("to {name}"), there, &inputs, &field)?;
                let inputs = [field, log_length.clone()];
                check(&format!("from {name}"), back, &inputs, &values)?;
            }
        }
    }
    Ok(())
}

fn line(x: &[Tensor]) -> Result<Tensor> {
    let s = [[[0.1], [-1.5], [0.75], [1.7]], [[0.0], [40.0], [-1.6], [0.33]]];
    Tensor::new(&s, &CPU)?.to_dtype(x[0].dtype())
}

fn plane(x: &[Tensor]) -> Result<Tensor> {
    let s = [
        [[0.1, 0.2], [-1.5, 1.0], [0.75, -0.9], [1.7, 0.5]],
        [[0.0, 0.0], [40.0, 0.1], [-1.6, 0.6], [0.33, -0.4]],
    ];
    Tensor::new(&s, &CPU)?.to_dtype(x[0].dtype())
}

#[test]
fn depthwise_convolutions_equal_candle_s() -> Result<()> {
    let mut rng = Stream::new(8, "depthwise", 0);
    for (rows, columns, side) in [(1, 7, 3), (5, 4, 3), (6, 7, 5)] {
        for channels in [1, 3, 16] {
            let x = normal(&mut rng, &[2, rows, columns, channels], 1.0);
            let weight = normal(&mut rng, &[side, side, channels], 0.5);
            let weigh = normal(&mut rng, x.dims(), 1.0);
            let name = format!("{rows} × {columns}, side {side}, {channels} channels");
            check(&name, |x| depthwise(&x[0], &x[1]), &[x, weight], &weigh)?;
        }
    }
    Ok(())
}
