//! The logarithm of the gamma function and its derivatives, element by element.
//!
//! candle has none of them. Values are worked out in f64 on the host, whatever the precision and
//! the device: what they are asked for is small.

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};
use statrs::function::gamma::{digamma as host_digamma, ln_gamma};

/// ln Γ(x), for x > 0; the same shape.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let x = Tensor::new(&[0.5f64, 5.0], &Device::Cpu).unwrap();
/// let y = isopleth::fused::special::log_gamma(&x).unwrap().to_vec1::<f64>().unwrap();
/// assert!((y[0] - std::f64::consts::PI.sqrt().ln()).abs() < 1e-12);
/// assert!((y[1] - 24f64.ln()).abs() < 1e-12);
/// ```
pub fn log_gamma(x: &Tensor) -> Result<Tensor> {
    apply(x, Order::LogGamma)
}

/// ψ(x), the derivative of ln Γ, for x > 0; the same shape.
pub fn digamma(x: &Tensor) -> Result<Tensor> {
    apply(x, Order::Digamma)
}

/// ψ′(x), the derivative of ψ, for x > 0; the same shape. Its gradient has none of its own.
pub fn trigamma(x: &Tensor) -> Result<Tensor> {
    apply(x, Order::Trigamma)
}

/// ψ′(x): the recurrence ψ′(x) = ψ′(x + 1) + 1/x² up to 10, then Abramowitz & Stegun 6.4.12.
///
/// ```
/// use isopleth::fused::special::host_trigamma;
/// let pi = std::f64::consts::PI;
/// assert!((host_trigamma(1.0) - pi * pi / 6.0).abs() < 1e-13);
/// assert!((host_trigamma(0.5) - pi * pi / 2.0).abs() < 1e-13);
/// ```
pub fn host_trigamma(x: f64) -> f64 {
    let (mut x, mut sum) = (x, 0.0);
    while x < 10.0 {
        sum += 1.0 / (x * x);
        x += 1.0;
    }
    let y = 1.0 / (x * x);
    // B₂ … B₁₂ over powers of x.
    let tail =
        y * (1.0 / 6.0 - y * (1.0 / 30.0 - y * (1.0 / 42.0 - y * (1.0 / 30.0 - y * (5.0 / 66.0)))));
    sum + (1.0 + 0.5 / x + tail) / x
}

/// ψ″(x), by the same recurrence and the derivative of the same series.
///
/// ```
/// use isopleth::fused::special::{host_tetragamma, host_trigamma};
/// let numeric = (host_trigamma(0.7 + 1e-5) - host_trigamma(0.7 - 1e-5)) / 2e-5;
/// assert!((host_tetragamma(0.7) - numeric).abs() < 1e-7);
/// ```
pub fn host_tetragamma(x: f64) -> f64 {
    let (mut x, mut sum) = (x, 0.0);
    while x < 10.0 {
        sum -= 2.0 / (x * x * x);
        x += 1.0;
    }
    let y = 1.0 / (x * x);
    let tail = y * (0.5 - y * (1.0 / 6.0 - y * (1.0 / 6.0 - y * (0.3 - y * (5.0 / 6.0)))));
    sum - y * (1.0 + 1.0 / x + tail)
}

#[derive(Debug, Clone, Copy)]
enum Order {
    LogGamma,
    Digamma,
    Trigamma,
    Tetragamma,
}

impl Order {
    fn at(self, x: f64) -> f64 {
        match self {
            Order::LogGamma => ln_gamma(x),
            Order::Digamma => host_digamma(x),
            Order::Trigamma => host_trigamma(x),
            Order::Tetragamma => host_tetragamma(x),
        }
    }
}

fn apply(x: &Tensor, order: Order) -> Result<Tensor> {
    let there = x.to_device(&Device::Cpu)?.contiguous()?.apply_op1(Elementwise(order))?;
    there.to_device(x.device())
}

struct Elementwise(Order);

impl CustomOp1 for Elementwise {
    fn name(&self) -> &'static str {
        match self.0 {
            Order::LogGamma => "log-gamma",
            Order::Digamma => "digamma",
            Order::Trigamma => "trigamma",
            Order::Tetragamma => "tetragamma",
        }
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("{} needs contiguous input", self.name())
        };
        let out = match storage {
            CpuStorage::F32(x) => CpuStorage::F32(
                x[start..end].iter().map(|x| self.0.at(f64::from(*x)) as f32).collect(),
            ),
            CpuStorage::F64(x) => {
                CpuStorage::F64(x[start..end].iter().map(|x| self.0.at(*x)).collect())
            }
            _ => candle_core::bail!("{} knows f32 and f64", self.name()),
        };
        Ok((out, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let slope = match self.0 {
            Order::LogGamma => digamma(&x.detach())?,
            Order::Digamma => trigamma(&x.detach())?,
            Order::Trigamma => apply(&x.detach(), Order::Tetragamma)?,
            Order::Tetragamma => candle_core::bail!("tetragamma has no gradient here"),
        };
        Ok(Some((grad * slope)?))
    }
}
