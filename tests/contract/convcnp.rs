//! What is particular to processes on rasters: they move with the map, and end somewhere.

use candle_core::{DType, Device, Tensor};
use isopleth::{
    Observations, Predictive, Process, Result, Sites, Stream,
    likelihood::{self, Likelihood},
    model::{self, Problem, params::Params},
};

const CPU: Device = Device::Cpu;

type Model = Box<dyn Process + Send + Sync>;

fn gaussian() -> &'static dyn Likelihood {
    likelihood::find("gaussian").unwrap()
}

fn build(settings: &str, dim: usize) -> (Model, usize) {
    let mut params = Params::new(4, &CPU, DType::F32);
    let problem = Problem::new(dim, gaussian());
    let model = model::build(&settings.parse().unwrap(), problem, &mut params).unwrap();
    (model, params.count())
}

/// `n` sites within `half` of the origin, moved by `shift`.
fn sites(n: usize, dim: usize, half: f64, shift: f64) -> Sites {
    let mut rng = Stream::new(2, "sites", n as u64);
    let s: Vec<f32> = (0..n * dim).map(|_| (rng.uniform(-half, half) + shift) as f32).collect();
    Sites::new(Tensor::from_vec(s, (1, n, dim), &CPU).unwrap())
}

fn observed(sites: Sites) -> Observations {
    let y = Stream::new(3, "values", 0).normals(sites.len());
    let y = y.into_iter().map(|y| y as f32).collect();
    let y = Tensor::from_vec(y, (1, sites.len(), 1), &CPU).unwrap();
    Observations::new(sites, y, None).unwrap()
}

fn ask(model: &Model, context: &Observations, targets: &Sites) -> Result<Predictive> {
    model.condition(context)?.at(targets)
}

fn gap(a: &Predictive, b: &Predictive) -> f64 {
    let parts = |p: &Predictive| {
        let tensors = [&p.mean, &p.surface_sd, &p.observation_sd];
        let all = tensors.iter().flat_map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        all.collect::<Vec<f32>>()
    };
    let (a, b) = (parts(a), parts(b));
    assert_eq!(a.len(), b.len());
    assert!(a.iter().chain(&b).all(|v| v.is_finite()), "not finite");
    a.iter().zip(&b).fold(0.0, |most, (a, b)| most.max(f64::from((a - b).abs())))
}

/// Everything moved by whole cells is the same map elsewhere: by any number of them for the plain
/// network, by steps of its coarsest raster for a U-Net; by less than a cell it is not.
#[test]
fn convolutions_move_with_the_map() -> Result<()> {
    let plain = "kind = 'convcnp'\nnetwork = 'plain'\npoints_per_unit = 8\nreach = 6.0";
    let unet = "kind = 'convcnp'\nlevels = 3\npoints_per_unit = 8\nreach = 12.0\nmargin = 1.0";
    let flat = "kind = 'convcnp'\nlevels = 2\nkernel = 3\npoints_per_unit = 4\nreach = 6.0";
    for (settings, dim, shift) in
        [(plain, 1, 0.125), (plain, 1, 1.5), (unet, 1, 0.5), (unet, 1, 2.0), (flat, 2, 1.0)]
    {
        let (model, _) = build(settings, dim);
        let ask =
            |by: f64| ask(&model, &observed(sites(9, dim, 1.0, by)), &sites(30, dim, 1.2, by));
        let here = ask(0.0)?;
        let moved = gap(&here, &ask(shift)?);
        assert!(moved < 1e-5, "{settings}: a shift by {shift} moved the predictive by {moved:e}");
        let off = gap(&here, &ask(shift + 0.0625)?);
        assert!(off > 1e-5, "{settings}: half a cell is nothing, so this test sees nothing");
    }
    Ok(())
}

/// Targets beyond the raster are answered as if nothing had been observed, whoever else is asked: what was
/// seen at the edge says nothing of them. A context that reaches further takes the raster with it, and
/// leaves its neighbours in the batch alone.
#[test]
fn the_raster_ends_where_it_says() -> Result<()> {
    let (model, _) = build("kind = 'convcnp'\nreach = 1.5\npoints_per_unit = 16", 1);
    let context = observed(sites(9, 1, 1.0, 0.0));
    let at = |s: &[f32]| {
        let sites = Tensor::new(s, &CPU).unwrap().reshape((1, s.len(), 1)).unwrap();
        ask(&model, &context, &Sites::new(sites))
    };
    let edge = at(&[1.5, -1.5, 1.4])?;
    // The raster ends on a multiple of its coarsest step: at 2 and beyond, less the margin.
    let (far, farther) = (at(&[30.0, -7.0, 1.4])?, at(&[1e6, -1e9, 1.4])?);
    assert_eq!(gap(&far, &farther), 0.0);
    assert!(gap(&edge, &far).is_finite());
    let mut unseen = observed(sites(9, 1, 1.0, 0.0));
    unseen.mask = unseen.mask.zeros_like()?;
    let middle = Sites::new(Tensor::zeros((1, 3, 1), candle_core::DType::F32, &CPU)?);
    let nothing = ask(&model, &unseen, &middle)?;
    let first = |p: &Predictive| -> Result<f32> {
        Ok(p.mean.flatten_all()?.to_vec1::<f32>()?[0]
            + p.surface_sd.flatten_all()?.to_vec1::<f32>()?[0])
    };
    assert_eq!(first(&far)?, first(&nothing)?);

    let wide = observed(sites(9, 1, 1.0, 9.0));
    let both = |a: &Tensor, b: &Tensor| Tensor::cat(&[a, b, a], 0);
    let batch = Observations {
        sites: Sites::new(both(&context.sites.s, &wide.sites.s)?),
        y: both(&context.y, &wide.y)?,
        mask: both(&context.mask, &wide.mask)?,
        trials: None,
    };
    let (near, there) = (sites(7, 1, 1.0, 0.0), sites(7, 1, 1.0, 9.0));
    let targets = Sites::new(both(&near.s, &there.s)?);
    let whole = ask(&model, &batch, &targets)?;
    for (row, context, sites) in [(0, &context, &near), (1, &wide, &there), (2, &context, &near)] {
        let alone = ask(&model, context, sites)?;
        let cut = |x: &Tensor| x.narrow(0, row, 1);
        let here = Predictive {
            link: whole.link,
            log_weight: cut(&whole.log_weight)?,
            mean: cut(&whole.mean)?,
            surface_sd: cut(&whole.surface_sd)?,
            observation_sd: cut(&whole.observation_sd)?,
            lift: None,
            law: None,
        };
        let moved = gap(&alone, &here);
        assert!(moved < 1e-5, "row {row} alone differs by {moved:e}");
    }
    Ok(())
}

/// Sites in metres would ask for more cells than there is memory: an error that says so.
#[test]
fn a_raster_without_end_is_refused() {
    let (model, _) = build("kind = 'convcnp'", 1);
    let far = observed(sites(5, 1, 1e7, 0.0));
    let error = model.condition(&far).err().expect("ten million units").to_string();
    assert!(error.contains("too far"), "{error}");
}

/// 6,532 and 50,612 parameters in the authors' code, with a length scale for every channel each
/// way: 2 to the raster, and 8 (16 in the U-Net) from it for each of the two outputs. Here it is one
/// each way.
#[test]
fn the_published_sizes() {
    let head = "\nhead = { components = 1, nugget = false }";
    let small = format!("kind = 'convcnp'\nnetwork = 'plain'{head}");
    assert_eq!(build(&small, 1).1, 6_532 - (2 + 2 * 8) + 2);
    assert_eq!(build(&format!("kind = 'convcnp'{head}"), 1).1, 50_612 - (2 + 2 * 16) + 2);
}

/// On the grid a site is its pixel: where in it does not matter, several of one pixel count as their
/// mean, and a hidden pixel is one that is missing. All of it moves by whole pixels.
#[test]
fn on_the_grid_sites_are_their_pixels() -> Result<()> {
    for (dim, origin) in [(1, 0.0), (2, 0.0), (2, 0.05)] {
        let settings = format!(
            "kind = 'convcnp-grid'\nstep = 0.1\norigin = {origin}\nreach = 3.0\nwidth = 8\n\
             kernel = 3\nkernel_in = 5\nblocks = 2"
        );
        let (model, _) = build(&settings, dim);
        let snap = |sites: &Sites, by: f64| -> Result<Sites> {
            let cell = ((&sites.s - origin)? / 0.1)?.round()?;
            Ok(Sites::new((((cell * 0.1)? + origin)? + by)?))
        };
        let (context, targets) = (sites(20, dim, 1.0, 0.0), sites(30, dim, 1.2, 0.0));
        let here = ask(&model, &observed(context.clone()), &targets)?;
        let middle = ask(&model, &observed(snap(&context, 0.0)?), &snap(&targets, 0.02)?)?;
        let moved = gap(&here, &middle);
        assert!(moved < 1e-5, "the middle of a pixel is another place: {moved:e}");
        let shifted = ask(&model, &observed(snap(&context, 0.7)?), &snap(&targets, 0.7)?)?;
        let moved = gap(&here, &shifted);
        assert!(moved < 1e-5, "seven pixels on the map is another: {moved:e}");
        let off = ask(&model, &observed(snap(&context, 0.1)?), &snap(&targets, 0.0)?)?;
        assert!(gap(&here, &off) > 1e-4, "a pixel to the side is the same: this test sees nothing");

        // Every site twice, with values that have the same mean: the same.
        let once = observed(context.clone());
        let twice = Observations::new(
            Sites::new(Tensor::cat(&[&context.s, &context.s], 1)?),
            Tensor::cat(&[&(&once.y + 0.5)?, &(&once.y - 0.5)?], 1)?,
            None,
        )?;
        let moved = gap(&here, &ask(&model, &twice, &targets)?);
        assert!(moved < 1e-5, "two of a pixel are not their mean: {moved:e}");

        // Hidden pixels, even those that hold no number, are missing pixels.
        let mut hidden = twice.clone();
        let seen = Tensor::ones((1, 20), DType::F32, &CPU)?;
        hidden.mask = Tensor::cat(&[&seen, &seen.zeros_like()?], 1)?;
        hidden.y = Tensor::cat(&[&once.y, &(&once.y * f64::NAN)?], 1)?;
        assert_eq!(gap(&here, &ask(&model, &hidden, &targets)?), 0.0);
    }
    Ok(())
}

/// Off the grid too, what stands at a site that is hidden need not be a number.
#[test]
fn hidden_sites_may_hold_anything() -> Result<()> {
    let (model, _) = build("kind = 'convcnp'\npoints_per_unit = 8", 1);
    let (once, targets) = (observed(sites(9, 1, 1.0, 0.0)), sites(7, 1, 1.0, 0.0));
    let mut more = once.clone();
    let seen = Tensor::ones((1, 9), DType::F32, &CPU)?;
    more.sites = Sites::new(Tensor::cat(&[&once.sites.s, &(&once.sites.s * 1e9)?], 1)?);
    more.y = Tensor::cat(&[&once.y, &(&once.y * f64::NAN)?], 1)?;
    more.mask = Tensor::cat(&[&seen, &seen.zeros_like()?], 1)?;
    assert_eq!(gap(&ask(&model, &once, &targets)?, &ask(&model, &more, &targets)?), 0.0);
    Ok(())
}
