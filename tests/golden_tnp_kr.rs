//! TNP-KR against an independent float64 evaluation of the published formulas, and against the
//! published parameter counts. Weights follow the hash rule below.

use candle_core::{DType, Device, Tensor};
use isopleth::{
    Observations, Of, Process, Sites, likelihood,
    model::{self, Problem, params::Params},
};

const CPU: Device = Device::Cpu;

/// A number in [−1, 1) for (id, a, b).
fn val(id: u32, a: u32, b: u32) -> f64 {
    let mut x = id.wrapping_mul(1_000_003).wrapping_add(a.wrapping_mul(1009)).wrapping_add(b);
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^= x >> 16;
    2.0 * f64::from(x) / 4_294_967_296.0 - 1.0
}

#[test]
fn weight_rule_is_the_published_one() {
    assert_eq!(val(0, 0, 0), -1.0);
    assert_eq!(val(1, 2, 3), 0.599_077_839_870_005_8);
    assert_eq!(val(205, 900, 1), -0.832_256_524_823_606);
}

/// The id of a layer, from its path.
fn id(path: &str, dka: bool) -> u32 {
    let parts: Vec<&str> = path.split('.').collect();
    match parts[0] {
        "observed" => 0,
        "embed" => 1 + parts[1].parse::<u32>().unwrap(),
        "embed_norm" => 4,
        "norm" => 200,
        "head" => 201 + parts[1].parse::<u32>().unwrap(),
        "block" => {
            let base = 10 + 20 * parts[1].parse::<u32>().unwrap();
            base + match &parts[2..] {
                ["before", ..] => 0,
                ["attention", "phi", i, _] if dka => 1 + i.parse::<u32>().unwrap(),
                ["attention", "psi", i, _] if dka => 3 + i.parse::<u32>().unwrap(),
                ["attention", "norm", _] if dka => 5,
                ["attention", "query", _] => 1,
                ["attention", "key", _] => 2,
                ["attention", "value", "0", _] => 3,
                ["attention", "out", _] => 4,
                ["attention", "bias"] => 5,
                ["between", ..] => 6,
                ["feed_forward", i, _] => 7 + i.parse::<u32>().unwrap(),
                other => panic!("no id for {other:?}"),
            }
        }
        other => panic!("no id for {other}"),
    }
}

fn fill(params: &Params, dka: bool) {
    for (path, var) in params.vars() {
        let id = id(path, dka);
        let dims = var.dims().to_vec();
        let at = |i: u32, j: u32, k: u32| -> f64 {
            match path.rsplit('.').next().unwrap() {
                "observed" => 0.5 * val(0, i, j),
                "weight" => val(id, i, j) * (3.0 / dims[0] as f64).sqrt(),
                "scale" => 1.0 + 0.1 * val(id, 901, i),
                "bias" if dims.len() == 3 && k == 0 => 1.0 + 0.2 * val(id, 910 + i, j),
                "bias" if dims.len() == 3 && k == 1 => 1.0 + 0.3 * val(id, 920 + i, j),
                "bias" if dims.len() == 3 => 0.0,
                // The shift of a norm and the bias of a dense layer have rows of their own.
                "bias"
                    if path.ends_with("norm.bias")
                        || path.contains("before")
                        || path.contains("between") =>
                {
                    0.05 * val(id, 902, i)
                }
                "bias" => 0.05 * val(id, 900, i),
                other => panic!("{other}"),
            }
        };
        let mut values = Vec::new();
        let (rows, cols, deep) = (
            dims[0] as u32,
            dims.get(1).copied().unwrap_or(1) as u32,
            dims.get(2).copied().unwrap_or(1) as u32,
        );
        for i in 0..rows {
            for j in 0..cols {
                for k in 0..deep {
                    values.push(at(i, j, k) as f32);
                }
            }
        }
        var.set(&Tensor::from_vec(values, dims, &CPU).unwrap()).unwrap();
    }
}

fn sites(n: usize, f: impl Fn(f64) -> [f64; 2]) -> Sites {
    let xy: Vec<[f64; 2]> = (0..n).map(|i| f(i as f64)).collect();
    Sites::plane(&xy, &CPU).unwrap()
}

fn build(settings: &str, params: &mut Params) -> Box<dyn Process + Send + Sync> {
    let problem = Problem::new(2, likelihood::find("gaussian").unwrap());
    model::build(&settings.parse::<toml::Table>().unwrap(), problem, params).unwrap()
}

const BSA: &str = "kind = 'tnp-kr'\nbias = ['rbf', 'rbf', 'rbf', 'rbf', 'rbf']\nbias_start = 'equal'\n\
    bias_constraint = 'free'\nhead = { components = 1, nugget = false }";
const DKA: &str =
    "kind = 'tnp-kr-dka'\nembed_location = true\nhead = { components = 1, nugget = false }";

fn check(settings: &str, mean: [f64; 3], sd: [f64; 3]) {
    let mut params = Params::new(0, &CPU, DType::F32);
    let learning = build(settings, &mut params);
    fill(&params, settings.contains("dka"));
    // A model that is only asked goes other ways.
    let weights = params.vars().iter().map(|(path, var)| (path.clone(), var.as_tensor().clone()));
    let asked = build(settings, &mut Params::frozen(weights.collect(), &CPU, DType::F32));
    let place = |i: f64| [1.5 * (1.7 * i + 0.2).sin(), 1.5 * (2.3 * i + 0.5).cos()];
    let y: Vec<f32> = (0..5).map(|i| (3.1 * i as f64 + 0.7).sin() as f32).collect();
    let y = Tensor::from_vec(y, (1, 5, 1), &CPU).unwrap();
    let mut context = Observations::new(sites(5, place), y, None).unwrap();
    context.mask = Tensor::new(&[[1f32, 1., 1., 1., 0.]], &CPU).unwrap();
    let targets = sites(3, |j| [1.5 * (0.9 * j + 1.0).sin(), 1.5 * (1.9 * j - 0.4).cos()]);
    for process in [learning, asked] {
        let p = process.condition(&context).unwrap().at(&targets).unwrap();
        let m = p.marginals(0, Of::Surface).unwrap();
        for i in 0..3 {
            assert!((m.mean[i] - mean[i]).abs() < 1e-5, "mean {} against {}", m.mean[i], mean[i]);
            // The 1e-6 that keeps the sd from 0 is ours.
            assert!((m.sd[i] - 1e-6 - sd[i]).abs() < 1e-5, "sd {} against {}", m.sd[i], sd[i]);
        }
    }
}

#[test]
fn biased_scan_attention_2026() {
    let mean = [-0.4700559, -0.3739521, -0.4540573];
    let sd = [0.4573397, 0.5203516, 0.5807591];
    check(BSA, mean, sd);
    check(&BSA.replace("'tnp-kr'", "'tnp-kr-full'"), mean, sd);
    check(&format!("{BSA}\npublished_start = true"), mean, sd);
}

#[test]
fn deep_kernel_attention() {
    check(DKA, [-0.1980882, -0.2082146, -0.1578936], [0.4919220, 0.4736767, 0.4363434]);
}

#[test]
fn published_parameter_counts() {
    let count = |settings: &str| {
        let mut params = Params::new(0, &CPU, DType::F32);
        build(settings, &mut params);
        params.count()
    };
    // Our bias tensor also holds the unused c of every RBF term: 6 blocks × 4 heads × 5 terms.
    assert_eq!(count(BSA), 475_770 + 120);
    assert_eq!(count(&format!("{}\nembed_location = true", BSA.replace("rbf", "tisa"))), 476_402);
    assert_eq!(count(DKA), 527_498);
    // 2025: values by an MLP 128-64 with ReLU, 16 wide, location embedded, shifted RBF.
    let sa2025 = format!(
        "{}\nembed_location = true\nvalue = 'mlp'\nvalue_width = 16\nweights = 'lecun'",
        BSA.replace("rbf", "tisa").replace("free", "abs")
    );
    assert_eq!(count(&sa2025), 501_362);
}
