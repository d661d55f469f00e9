//! Named parameters: created with a seeded law, or taken from a checkpoint.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};

use crate::{
    error::{Error, Result},
    rng::Stream,
};

/// How a parameter starts.
#[derive(Debug, Clone)]
pub enum Init {
    /// One number everywhere.
    Constant(f64),
    /// Normal with mean 0 and this sd.
    Normal(f64),
    /// LeCun normal: truncated at two sds, variance 1 / rows.
    LeCun,
    /// Rows or columns orthonormal.
    Orthogonal,
    /// Exactly these values, row-major.
    Values(Vec<f64>),
}

/// The parameters of one network, by path: `block.0.attention.query.weight`.
#[derive(Debug)]
pub struct Params {
    vars: BTreeMap<String, Var>,
    saved: Option<BTreeMap<String, Tensor>>,
    frozen: bool,
    seed: u64,
    device: Device,
    dtype: DType,
}

impl Params {
    /// Fresh parameters under `seed`.
    pub fn new(seed: u64, device: &Device, dtype: DType) -> Self {
        let (vars, device) = (BTreeMap::new(), device.clone());
        Params { vars, saved: None, frozen: false, seed, device, dtype }
    }

    /// Parameters from a checkpoint: every `get` must find its name and shape.
    pub fn saved(tensors: BTreeMap<String, Tensor>, device: &Device, dtype: DType) -> Self {
        Params {
            vars: BTreeMap::new(),
            saved: Some(tensors),
            frozen: false,
            seed: 0,
            device: device.clone(),
            dtype,
        }
    }

    /// Parameters from a checkpoint for a model that is only asked. Nothing is recorded for
    /// gradients: where weights may learn, every intermediate result is kept until the last is
    /// dropped.
    pub fn frozen(tensors: BTreeMap<String, Tensor>, device: &Device, dtype: DType) -> Self {
        Params { frozen: true, ..Params::saved(tensors, device, dtype) }
    }

    /// The parameter at `path`, created on first use.
    ///
    /// # Errors
    /// [`Error::Input`] if a checkpoint lacks it or has another shape.
    pub fn get(&mut self, path: &str, shape: &[usize], init: &Init) -> Result<Tensor> {
        let tensor = match &mut self.saved {
            Some(saved) => {
                let found = saved.remove(path).ok_or_else(|| {
                    Error::input(format!("the checkpoint has no parameter `{path}`"))
                        .try_this("the file was written for another model; train or fetch it again")
                })?;
                if found.dims() != shape {
                    return Err(Error::input(format!("parameter `{path}` has another shape"))
                        .fact("in the checkpoint", format!("{:?}", found.dims()))
                        .fact("in the model", format!("{shape:?}"))
                        .try_this("the recipe in the card does not fit these weights"));
                }
                found.to_device(&self.device)?.to_dtype(self.dtype)?
            }
            None => {
                let values = draw(init, shape, &mut Stream::new(self.seed, path, 0));
                Tensor::from_vec(values, shape, &Device::Cpu)?
                    .to_dtype(self.dtype)?
                    .to_device(&self.device)?
            }
        };
        if self.frozen {
            return Ok(tensor.detach());
        }
        let var = Var::from_tensor(&tensor)?;
        let tensor = var.as_tensor().clone();
        self.vars.insert(path.to_string(), var);
        Ok(tensor)
    }

    /// Every parameter by path.
    pub fn vars(&self) -> &BTreeMap<String, Var> {
        &self.vars
    }

    /// Names left over in the checkpoint after the model was built.
    pub fn unused(&self) -> Vec<String> {
        self.saved.iter().flat_map(|s| s.keys().cloned()).collect()
    }

    /// How many numbers are learned.
    pub fn count(&self) -> usize {
        self.vars.values().map(|v| v.elem_count()).sum()
    }

    /// A scope at the root.
    pub fn scope(&mut self) -> Scope<'_> {
        Scope { params: self, path: String::new() }
    }
}

fn draw(init: &Init, shape: &[usize], rng: &mut Stream) -> Vec<f64> {
    let n: usize = shape.iter().product();
    match init {
        Init::Constant(c) => vec![*c; n],
        Init::Normal(sd) => rng.normals(n).into_iter().map(|v| v * sd).collect(),
        Init::LeCun => {
            // 0.8796…: the sd of a normal truncated at ±2.
            let sd = (1.0 / shape[0] as f64).sqrt() / 0.879_625_661_034_239_8;
            (0..n)
                .map(|_| {
                    loop {
                        let v = rng.normal();
                        if v.abs() <= 2.0 {
                            break v * sd;
                        }
                    }
                })
                .collect()
        }
        Init::Orthogonal => orthogonal(shape[0], shape[1], rng),
        Init::Values(values) => values.clone(),
    }
}

/// Gram–Schmidt, twice for accuracy, on the shorter side.
fn orthogonal(rows: usize, cols: usize, rng: &mut Stream) -> Vec<f64> {
    let (count, len) = (rows.min(cols), rows.max(cols));
    let mut basis: Vec<Vec<f64>> = Vec::with_capacity(count);
    while basis.len() < count {
        let mut v = rng.normals(len);
        for _ in 0..2 {
            for b in &basis {
                let dot: f64 = v.iter().zip(b).map(|(x, y)| x * y).sum();
                v.iter_mut().zip(b).for_each(|(x, y)| *x -= dot * y);
            }
        }
        let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt();
        v.iter_mut().for_each(|x| *x /= norm);
        basis.push(v);
    }
    let mut out = vec![0.0; rows * cols];
    for (i, b) in basis.iter().enumerate() {
        for (j, v) in b.iter().enumerate() {
            let at = if rows <= cols { i * cols + j } else { j * cols + i };
            out[at] = *v;
        }
    }
    out
}

/// A place in the parameter tree.
pub struct Scope<'a> {
    params: &'a mut Params,
    path: String,
}

impl Scope<'_> {
    /// A child scope: `scope.at("block.0")`.
    pub fn at(&mut self, name: &str) -> Scope<'_> {
        let path =
            if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) };
        Scope { params: self.params, path }
    }

    /// The parameter `name` in this scope.
    pub fn get(&mut self, name: &str, shape: &[usize], init: &Init) -> Result<Tensor> {
        let path = if self.path.is_empty() { name.into() } else { format!("{}.{name}", self.path) };
        self.params.get(&path, shape, init)
    }
}
