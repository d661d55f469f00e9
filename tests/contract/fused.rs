//! Laws of fused layers: in value and gradient they equal their composed f64 twins, which agree with
//! finite differences, for any width and for inputs that are not contiguous.

use candle_core::{DType, Device, Result, Tensor, Var};
use isopleth::{
    Stream,
    fused::{gelu, layer_norm, linear},
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
