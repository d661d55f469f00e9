//! AdamW and Yogi, on the host, over named parameters.

use std::collections::BTreeMap;

use candle_core::{Tensor, Var, backprop::GradStore};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Which rule turns gradients into steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101).
    Adamw,
    /// Yogi (Zaheer et al. 2018): ε 1e-3, accumulators start at 1e-6.
    Yogi,
}

/// First and second moments of every parameter.
#[derive(Debug, Clone)]
pub struct Optimiser {
    rule: Rule,
    decay: f64,
    /// Steps taken.
    pub step: u64,
    /// First and second moments by path.
    pub moments: BTreeMap<String, (Vec<f32>, Vec<f32>)>,
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
        let mut host: Vec<(&String, &Var, Vec<f32>)> = Vec::with_capacity(vars.len());
        let mut squares = 0.0f64;
        for (path, var) in vars {
            let mut grad = vec![0.0f32; var.elem_count()];
            for part in grads {
                let part = part.get(var.as_tensor()).ok_or_else(|| {
                    Error::input(format!("parameter `{path}` received no gradient"))
                        .try_this("this is a bug in the model: please report it")
                })?;
                let part = part.flatten_all()?.to_vec1::<f32>()?;
                grad.iter_mut().zip(part).for_each(|(g, p)| *g += p);
            }
            squares += grad.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>();
            host.push((path, var, grad));
        }
        let norm = squares.sqrt();
        if !norm.is_finite() {
            return Err(Error::input("the gradient is not finite")
                .fact("step", self.step)
                .try_this("lower the learning rate, or resume from the last checkpoint"));
        }
        self.step += 1;
        let scale = if norm > clip { (clip / norm) as f32 } else { 1.0 };
        let correct = |b: f64| 1.0 - b.powi(self.step.min(1_000_000) as i32);
        let (c1, c2) = (correct(B1) as f32, correct(B2) as f32);
        let (b1, b2, rate) = (B1 as f32, B2 as f32, rate as f32);
        let shrink = 1.0 - rate * self.decay as f32;
        for (path, var, grad) in host {
            let (m, v) = self.moments.get_mut(path).expect("one pair of moments per parameter");
            let mut w = var.flatten_all()?.to_vec1::<f32>()?;
            for i in 0..w.len() {
                let g = grad[i] * scale;
                m[i] = b1 * m[i] + (1.0 - b1) * g;
                match self.rule {
                    Rule::Adamw => {
                        v[i] = b2 * v[i] + (1.0 - b2) * g * g;
                        w[i] = shrink * w[i] - rate * (m[i] / c1) / ((v[i] / c2).sqrt() + 1e-8);
                    }
                    Rule::Yogi => {
                        let g2 = g * g;
                        v[i] -= (1.0 - b2) * (v[i] - g2).signum() * g2;
                        w[i] -= rate * (m[i] / c1) / ((v[i] / c2).max(0.0).sqrt() + 1e-3);
                    }
                }
            }
            var.set(&Tensor::from_vec(w, var.shape(), var.device())?)?;
        }
        Ok(norm)
    }
}
