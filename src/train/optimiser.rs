//! AdamW and Yogi, on the host, over named parameters.

use std::collections::BTreeMap;

use candle_core::{Tensor, Var, backprop::GradStore};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    fused::simd,
};

/// Which rule turns gradients into steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101).
    Adamw,
    /// Yogi (Zaheer et al. 2018): ε 1e-3, accumulators start at 1e-6.
    Yogi,
}

/// First and second moments by path.
pub type Moments = BTreeMap<String, (Vec<f32>, Vec<f32>)>;

/// Numbers of one step that every rule takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scalars {
    /// Learning rate.
    pub rate: f32,
    /// What weights are multiplied with: AdamW's decay.
    pub shrink: f32,
    /// Sum of the weights in the first moment.
    pub c1: f32,
    /// The same of the second.
    pub c2: f32,
}

/// First and second moments of every parameter.
#[derive(Debug, Clone)]
pub struct Optimiser {
    rule: Rule,
    decay: f64,
    /// Steps taken.
    pub step: u64,
    /// First and second moments by path.
    pub moments: Moments,
}

const B1: f64 = 0.9;
const B2: f64 = 0.999;

impl Optimiser {
    /// Fresh moments for `vars`; `decay` is AdamW's weight decay.
    pub fn new(rule: Rule, decay: f64, vars: &BTreeMap<String, Var>) -> Self {
        let start = if rule == Rule::Yogi { 1e-6 } else { 0.0 };
        let moments = vars
            .iter()
            .map(|(path, var)| {
                let n = var.elem_count();
                (path.clone(), (vec![start; n], vec![start; n]))
            })
            .collect();
        Optimiser { rule, decay, step: 0, moments }
    }

    /// Numbers of the step just counted, at learning rate `rate`.
    pub fn scalars(&self, rate: f64) -> Scalars {
        let correct = |b: f64| (1.0 - b.powi(self.step.min(1_000_000) as i32)) as f32;
        let shrink = 1.0 - rate as f32 * self.decay as f32;
        Scalars { rate: rate as f32, shrink, c1: correct(B1), c2: correct(B2) }
    }

    /// One step at learning rate `rate`. The gradients of the parts are added, then clipped to a
    /// global norm of `clip`.
    /// Returns the norm before clipping.
    ///
    /// # Errors
    /// [`Error::Input`] if a gradient is missing or not finite: training must not go on blindly.
    pub fn update(
        &mut self,
        vars: &BTreeMap<String, Var>,
        grads: &[GradStore],
        rate: f64,
        clip: f64,
    ) -> Result<f64> {
        // Parameters side by side; sums of squares are added in the order of paths.
        let sums: Vec<(Vec<f32>, f64)> = vars
            .par_iter()
            .map(|(path, var)| {
                let mut sum = vec![0.0f32; var.elem_count()];
                for part in grads {
                    let part = part.get(var.as_tensor()).ok_or_else(|| {
                        Error::input(format!("parameter `{path}` received no gradient"))
                            .try_this("this is a bug in the model: please report it")
                    })?;
                    add(&mut sum, &part.flatten_all()?.to_vec1::<f32>()?);
                }
                let squares = sum.iter().map(|g| f64::from(*g) * f64::from(*g)).sum();
                Ok((sum, squares))
            })
            .collect::<Result<_>>()?;
        let squares: f64 = sums.iter().map(|(_, squares)| squares).sum();
        let norm = squares.sqrt();
        if !norm.is_finite() {
            return Err(Error::input("the gradient is not finite")
                .fact("step", self.step)
                .try_this("lower the learning rate, or resume from the last checkpoint"));
        }
        self.step += 1;
        let scale = if norm > clip { (clip / norm) as f32 } else { 1.0 };
        let Scalars { rate, shrink, c1, c2 } = self.scalars(rate);
        let pace = Pace { scale, rate, shrink, c1, c2 };
        // Moments and parameters are both in the order of paths.
        let each: Vec<_> = self.moments.iter_mut().zip(vars).zip(&sums).collect();
        each.into_par_iter().try_for_each(
            |(((path, (m, v)), (other, var)), (grad, _))| -> Result<()> {
                assert_eq!(path, other, "one pair of moments per parameter");
                let mut w = var.flatten_all()?.to_vec1::<f32>()?;
                match self.rule {
                    Rule::Adamw => adamw(&pace, grad, m, v, &mut w),
                    Rule::Yogi => yogi(&pace, grad, m, v, &mut w),
                }
                Ok(var.set(&Tensor::from_vec(w, var.shape(), var.device())?)?)
            },
        )?;
        Ok(norm)
    }
}

/// Numbers of one step.
pub struct Pace {
    /// What gradients are multiplied with.
    scale: f32,
    rate: f32,
    /// What weights are multiplied with.
    shrink: f32,
    /// Sums of the weights in the two moments.
    c1: f32,
    c2: f32,
}

simd::vectorised! {
    /// `sum += part`.
    pub fn add(sum: &mut [f32], part: &[f32]) {
        for (sum, part) in sum.iter_mut().zip(part) {
            *sum += part;
        }
    }
}

simd::vectorised! {
    /// One step of AdamW for weights `w` with moments `m` and `v`.
    pub fn adamw(pace: &Pace, g: &[f32], m: &mut [f32], v: &mut [f32], w: &mut [f32]) {
        let (b1, b2) = (B1 as f32, B2 as f32);
        for (((g, m), v), w) in g.iter().zip(m).zip(v).zip(w) {
            let g = g * pace.scale;
            *m = b1 * *m + (1.0 - b1) * g;
            *v = b2 * *v + (1.0 - b2) * g * g;
            *w = pace.shrink * *w - pace.rate * (*m / pace.c1) / ((*v / pace.c2).sqrt() + 1e-8);
        }
    }
}

simd::vectorised! {
    /// One step of Yogi for weights `w` with moments `m` and `v`.
    pub fn yogi(pace: &Pace, g: &[f32], m: &mut [f32], v: &mut [f32], w: &mut [f32]) {
        let (b1, b2) = (B1 as f32, B2 as f32);
        for (((g, m), v), w) in g.iter().zip(m).zip(v).zip(w) {
            let g = g * pace.scale;
            *m = b1 * *m + (1.0 - b1) * g;
            let g2 = g * g;
            *v -= (1.0 - b2) * (*v - g2).signum() * g2;
            *w -= pace.rate * (*m / pace.c1) / ((*v / pace.c2).max(0.0).sqrt() + 1e-3);
        }
    }
}
