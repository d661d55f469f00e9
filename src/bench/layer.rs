//! One layer's attention alone, forward, on random queries, keys and values.

use std::{cell::Cell, rc::Rc};

use candle_core::{DType, Device, Tensor};

use super::{
    Attention, Layout, Plan, Report, Subject, available, machine, pixels, sites, time,
    under_ceiling,
    work::{Kind, Shape},
};
use crate::{
    attention::{Bias, CHUNK, Keys, Metric, Reader, Start, Tally, Term, full, scan},
    error::Result,
    mapping::plan,
    model::{
        layer::{Activation, Mlp, Norm},
        params::{Init, Params},
    },
    rng::Stream,
    sites::Sites,
};

/// Sizes of the layer.
#[derive(Debug, Clone)]
pub struct Layer {
    /// How it is computed.
    pub attention: Attention,
    /// Context sites.
    pub contexts: usize,
    /// Targets.
    pub targets: usize,
    /// Heads.
    pub heads: usize,
    /// Key width of a head.
    pub key_width: usize,
    /// Value width of a head.
    pub value_width: usize,
    /// Terms of the bias.
    pub bias: Vec<Term>,
    /// Widest and narrowest length scale of the terms, model units.
    pub reach: Option<[f64; 2]>,
    /// Where the context lies; targets are the pixels of a map.
    pub layout: Layout,
}

/// Targets that are asked about at once.
const TARGETS: usize = 8192;
/// Token width of deep kernel attention, as published.
const TOKEN: usize = 64;
/// Its features, as published.
const FEATURES: usize = 128;

/// Reads the context at targets, tile after tile.
type Ask = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

/// Packs the context: with deep kernel attention that is most of the work, so it is timed.
type Prepare = Box<dyn Fn() -> Result<Ask>>;

/// Times the layer.
///
/// # Errors
/// As [`available`].
pub fn run(plan: &Plan, layer: &Layer) -> Result<Report> {
    available(layer.attention, plan)?;
    let kind = match layer.attention {
        Attention::Dka => Kind::Kernel { dim: 2, width: TOKEN, features: FEATURES },
        _ => Kind::Softmax { heads: layer.heads, d: layer.key_width, w: layer.value_width },
    };
    let shape = Shape { layers: 1, kind };
    let at = sites(layer.layout, layer.contexts, &mut Stream::new(plan.seed, "sites", 0));
    let context = Sites::plane(&at, &plan.device)?;
    let tile = layer.targets.min(TARGETS);
    let tally = Rc::new(Cell::new(Tally::default()));
    let prepare = match layer.attention {
        Attention::Dka => kernel(plan, layer, tile, context)?,
        _ => softmax(plan, layer, tile, context, tally.clone())?,
    };
    let asked = pixels(layer.targets, plan::TILE);
    let (timed, ceiling) = under_ceiling(plan.threads, || {
        time(plan, || {
            let read = prepare()?;
            let mut total = 0.0;
            for part in asked.chunks(tile) {
                total += average(&read(&Sites::plane(part, &plan.device)?.s)?)? * part.len() as f64;
            }
            Ok(total / layer.targets as f64)
        })
    })?;
    let subject = Subject {
        command: "attention",
        attention: layer.attention,
        model: None,
        parameters: None,
        batch: 1,
        contexts: layer.contexts,
        targets: layer.targets,
        layout: layer.layout,
        shape,
        bias: layer.bias.clone(),
        work: shape.layer(layer.contexts, layer.targets),
    };
    let mut report = Report::new(plan, subject, timed, ceiling, machine::peak_rss_mib());
    report.skipped(tally.get());
    Ok(report)
}

fn average(x: &Tensor) -> Result<f64> {
    Ok(f64::from(x.mean_all()?.to_scalar::<f32>()?))
}

/// Standard normal numbers.
fn normal(shape: &[usize], rng: &mut Stream, device: &Device) -> Result<Tensor> {
    let n = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|_| rng.normal() as f32).collect();
    Ok(Tensor::from_vec(values, shape, device)?)
}

fn softmax(
    plan: &Plan,
    layer: &Layer,
    tile: usize,
    context: Sites,
    tally: Rc<Cell<Tally>>,
) -> Result<Prepare> {
    let (heads, n, device) = (layer.heads, layer.contexts, &plan.device);
    let draw = |name: &str, sites: usize, width: usize| {
        normal(&[1, sites, heads, width], &mut Stream::new(plan.seed, name, 0), device)
    };
    // One tile's queries serve every tile: what they are does not change how long they take.
    let q = draw("queries", tile, layer.key_width)?;
    let (k, v) = (draw("keys", n, layer.key_width)?, draw("values", n, layer.value_width)?);
    let mask = Tensor::ones((1, n), DType::F32, device)?;
    let bias = bias(layer, device)?;
    let (attention, reading) = (layer.attention, plan.reading(layer.attention));
    Ok(Box::new(move || {
        let (q, bias) = (q.clone(), bias.clone());
        let asked = move |sites: &Tensor| q.narrow(1, 0, sites.dims()[1]);
        // As a model does: the same reader on the processor and on cards.
        if attention != Attention::Full && Reader::takes(&k) {
            let reader = Reader::new(&k, &v, &context.s, &mask, bias.as_ref(), reading)?;
            let tally = tally.clone();
            return Ok(Box::new(move |sites| {
                let before = reader.tally();
                let read = reader.read(&asked(sites)?, sites)?;
                let after = reader.tally();
                tally.set(tally.get() + after.since(before));
                Ok(read)
            }));
        }
        let keys = Keys::pack(&k, &v, &context.s, &mask)?;
        Ok(Box::new(move |sites| match attention {
            Attention::Full => full(&asked(sites)?, sites, &keys, bias.as_ref()),
            _ => scan(&asked(sites)?, sites, &keys, bias.as_ref(), CHUNK, Start::Exact),
        }))
    }))
}

/// Terms of unit height, with a reach of its own for each head, as a model starts.
fn bias(layer: &Layer, device: &Device) -> Result<Option<Bias>> {
    let terms = layer.bias.clone();
    if terms.is_empty() {
        return Ok(None);
    }
    let each = layer.heads * terms.len();
    let params = (0..each)
        .flat_map(|i| {
            let term = terms[i % terms.len()];
            let usual = if term == Term::Wendland { [3.0, 0.3] } else { [1.5, 0.05] };
            let [wide, narrow] = layer.reach.unwrap_or(usual);
            let reach = (wide * (narrow / wide).powf(i as f64 / each as f64)) as f32;
            match term {
                Term::Scalar => [-0.5 / reach, 0.0, 0.0],
                Term::Sink => [0.0; 3],
                Term::Rbf | Term::Tisa => [1.0, 1.0 / (reach * reach), 0.0],
                _ => [1.0, 1.0 / reach, 0.0],
            }
        })
        .collect();
    let params = Tensor::from_vec(params, (layer.heads, terms.len(), 3), device)?;
    Ok(Some(Bias { terms, params, metric: Metric::Euclidean }))
}

/// The formula of `tnp-kr-dka`, which stands in `model/tnp_kr.rs`, on random tokens.
fn kernel(plan: &Plan, layer: &Layer, tile: usize, context: Sites) -> Result<Prepare> {
    let mut params = Params::new(plan.seed, &plan.device, DType::F32);
    let mut scope = params.scope();
    let mut mlp = |name: &str, widths: &[usize]| {
        Mlp::new(&mut scope.at(name), widths, Activation::Gelu, &Init::Orthogonal)
    };
    let phi = mlp("phi", &[2 + TOKEN, FEATURES, FEATURES])?;
    let psi = mlp("psi", &[TOKEN, FEATURES, TOKEN])?;
    let norm = Norm::new(&mut params.scope().at("norm"), TOKEN)?;
    let network = Rc::new((phi, psi, norm));
    let draw = |name: &str, sites: usize| {
        normal(&[1, sites, TOKEN], &mut Stream::new(plan.seed, name, 0), &plan.device)
    };
    let (queries, keys) = (draw("queries", tile)?, draw("keys", layer.contexts)?);
    let scale = (TOKEN as f64).powf(0.25);
    let features = move |phi: &Mlp, sites: &Tensor, tokens: &Tensor| -> Result<Tensor> {
        Ok((phi.forward(&Tensor::cat(&[sites, tokens], 2)?)? / scale)?)
    };
    Ok(Box::new(move || {
        let (phi, psi, _) = &*network;
        let k = features(phi, &context.s, &keys)?;
        let v = (psi.forward(&keys)? / keys.dims()[1] as f64)?;
        let matrix = k.transpose(1, 2)?.contiguous()?.matmul(&v)?;
        let (network, queries) = (network.clone(), queries.clone());
        Ok(Box::new(move |sites| {
            let (phi, _, norm) = &*network;
            let q = features(phi, sites, &queries.narrow(1, 0, sites.dims()[1])?)?;
            norm.forward(&q.matmul(&matrix)?)
        }))
    }))
}
