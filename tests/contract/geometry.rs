//! The globe has no seam and no edge: whoever reads distances says the same wherever a map is cut.

use candle_core::Device;
use isopleth::{
    Link, Of, Process, Result, Stream,
    baseline::{ExactGp, NearestGp},
    checkpoint::{Checkpoint, shipped},
    geo::{
        crs::Crs,
        frame::Frame,
        geometry::{Choice, Geometry, Middle},
        survey::{Outcome, Survey},
    },
    kernel::{Matern, Metric, Smoothness},
    likelihood,
};

fn lonlat() -> Crs {
    Crs::from_user("EPSG:4326").expect("known without GDAL")
}

fn choice(distance: &str) -> Choice {
    Choice { distance: Some(distance.into()), ..Default::default() }
}

/// Counts that rise to the north and in one half of the world, at sites all over it and crowded along the
/// date line and the pole; its longitudes turned by so many degrees.
fn world(turned: f64, distance: &str) -> Result<Survey> {
    let mut rng = Stream::new(6, "world", 0);
    let (mut x, mut y, mut positive) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..90 {
        let (lon, lat) = match i % 3 {
            0 => (rng.uniform(-180.0, 180.0), rng.uniform(-1.0, 1.0).asin().to_degrees()),
            1 => (180.0 + rng.uniform(-8.0, 8.0), rng.uniform(-40.0, 40.0)),
            _ => (rng.uniform(-180.0, 180.0), rng.uniform(70.0, 90.0)),
        };
        let eta = 0.02 * lat + (lon - 170.0).to_radians().cos() - 1.0 + 0.2 * rng.normal();
        positive.push(rng.binomial(50, Link::Logit.outcome(eta)) as f64);
        x.push((lon + turned + 540.0).rem_euclid(360.0) - 180.0);
        y.push(lat);
    }
    let survey = Survey {
        source: "world".into(),
        crs: lonlat(),
        rows: (1..=x.len()).collect(),
        outcome: Outcome::Counts { positive, tested: vec![50.0; x.len()] },
        x,
        y,
        covariates: None,
        times: None,
        dropped: Vec::new(),
        displacement: None,
        geometry: Geometry::Plane,
        notes: Vec::new(),
    };
    let geometry = Geometry::of(&choice(distance), &survey)?.0;
    Ok(Survey { geometry, ..survey })
}

/// Means and sds on the link scale.
fn ask(process: &dyn Process, survey: &Survey, x: &[f64], y: &[f64]) -> Result<[Vec<f64>; 2]> {
    let frame = Frame::fit(survey)?;
    let context = frame.observations(survey, &Device::Cpu)?;
    let sites = frame.sites(&survey.crs, x, y, &Device::Cpu)?;
    let said = process.condition(&context)?.at(&sites)?.marginals(0, Of::Surface)?;
    let first = |v: &[f64]| v.iter().step_by(said.components).copied().collect();
    Ok([first(&said.mean), first(&said.sd)])
}

fn processes() -> Result<Vec<(&'static str, Box<dyn Process + Send + Sync>)>> {
    let counts = likelihood::find("binomial")?;
    let kernel = || {
        let (smoothness, metric) = (Smoothness::ThreeHalves, Metric::Euclidean);
        Box::new(Matern { smoothness, length_scale: 0.5, sill: 1.0, metric })
    };
    let exact = ExactGp::new(kernel(), 0.05, -1.0, counts)?;
    let nearest = NearestGp::new(kernel(), 0.05, -1.0, counts)?.neighbours(90, 90);
    let mut all: Vec<(&str, Box<dyn Process + Send + Sync>)> =
        vec![("gp", Box::new(exact)), ("vecchia", Box::new(nearest))];
    if shipped().iter().any(|(name, _)| *name == "prevalence") {
        all.push(("prevalence", Checkpoint::resolve("prevalence")?.process(&Device::Cpu)?));
    }
    Ok(all)
}

fn gap(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// Either side of the date line, and the pole by whatever longitude, are one place; and where longitude
/// begins is nobody's concern. On a plane all of it fails.
#[test]
fn a_map_of_the_globe_has_no_seam() -> Result<()> {
    let lat = [-60.0, -20.0, 0.0, 35.0, 80.0];
    let east: Vec<f64> = lat.iter().map(|_| 180.0 - 1e-7).chain([0.0, 0.0, 0.0]).collect();
    let west: Vec<f64> = lat.iter().map(|_| -180.0 + 1e-7).chain([90.0, -120.0, 180.0]).collect();
    let north: Vec<f64> = lat.iter().copied().chain([90.0; 3]).collect();
    for (name, process) in processes()? {
        let globe = world(0.0, "globe")?;
        assert_eq!(globe.geometry.dim(), 3);
        let [here, there] = [&east, &west].map(|x| ask(&*process, &globe, x, &north));
        let (here, there) = (here?, there?);
        let seam = gap(&here[0], &there[0]).max(gap(&here[1], &there[1]));
        assert!(seam < 1e-4, "{name}: a seam of {seam}");
        // f32 rounds turned coordinates differently.
        let turned: Vec<f64> = east.iter().map(|x| x - 137.0).collect();
        let other = ask(&*process, &world(-137.0, "globe")?, &turned, &north)?;
        let moved = gap(&here[0], &other[0]).max(gap(&here[1], &other[1]));
        assert!(moved < 1e-4, "{name}: turned, the map moves by {moved}");
        // Two kilometres apart, across from the middle of the sites: an edge of every plane about them.
        let plane = world(0.0, "plane")?;
        let Middle { lon, lat, .. } = Middle::of(&plane.x, &plane.y)?;
        let torn = |survey: &Survey| -> Result<f64> {
            let said = ask(&*process, survey, &[lon + 180.02, lon + 179.98], &[-lat, -lat])?;
            Ok((said[0][0] - said[0][1]).abs())
        };
        let (globe, plane) = (torn(&globe)?, torn(&plane)?);
        assert!(globe < 5e-3 && plane > 0.02, "{name}: {globe}, and {plane} on a plane");
    }
    Ok(())
}

/// What is near a plane is as on it; what a plane cannot hold is on the globe, unless it is asked for; and
/// what the globe cannot hold is refused.
#[test]
fn the_geometry_is_chosen_by_what_a_plane_gets_wrong() -> Result<()> {
    let spread = |half: f64| -> Result<Survey> {
        let around =
            [[-half, 0.0], [half, 0.0], [0.0, -half], [0.0, half], [0.3 * half, 0.2 * half]];
        let [x, y] = [0, 1].map(|d| around.iter().map(|p| p[d]).collect::<Vec<f64>>());
        let outcome = Outcome::Values(vec![0.0; 5]);
        Ok(Survey { x, y, rows: (1..=5).collect(), outcome, ..world(0.0, "plane")? })
    };
    let none = Choice::default();
    // 1 % is at 16.1° from the middle.
    assert!(Geometry::of(&none, &spread(15.9)?)?.0.is_plane());
    let (geometry, said) = Geometry::of(&none, &spread(17.0)?)?;
    assert!(!geometry.is_plane() && said[0].contains("1.1 %"), "{said:?}");
    assert!(Geometry::of(&choice("plane"), &spread(80.0)?)?.0.is_plane());

    let near = spread(1.5)?;
    let globe = Survey { geometry: Geometry::of(&choice("globe"), &near)?.0, ..near.clone() };
    let km = |survey: &Survey| -> Result<Vec<f64>> {
        let frame = Frame::fit(survey)?;
        let places = frame.places_km(&frame.sites_of(survey, &Device::Cpu)?)?;
        let pair = |(i, j): (usize, usize)| Metric::Euclidean.distance(&places[i], &places[j]);
        Ok((0..5).flat_map(|i| (0..i).map(move |j| (i, j))).map(pair).collect())
    };
    for (plane, globe) in km(&near)?.iter().zip(km(&globe)?) {
        assert!((globe / plane - 1.0).abs() < 2e-4, "{globe} km, {plane} km on a plane");
    }

    let local = Survey { crs: Crs::from_user("local:km")?, ..near };
    let error = Geometry::of(&choice("globe"), &local).unwrap_err();
    assert!(error.to_string().contains("no place on the globe"), "{error}");
    let error = Geometry::of(&choice("flat"), &local).unwrap_err();
    assert!(error.to_string().contains("on a plane or on the globe"), "{error}");
    Ok(())
}

/// Draws of the globe are those of the posterior, and one on both sides of the date line.
#[test]
fn draws_go_around_the_globe() -> Result<()> {
    const DRAWS: usize = 600;
    let survey = world(0.0, "globe")?;
    let frame = Frame::fit(&survey)?;
    let context = frame.observations(&survey, &Device::Cpu)?;
    let (x, y) = ([180.0 - 1e-7, -180.0 + 1e-7, 30.0, -70.0, 5.0], [10.0, 10.0, -80.0, 0.0, 90.0]);
    let sites = frame.sites(&survey.crs, &x, &y, &Device::Cpu)?;
    for (name, process) in processes()?.into_iter().take(2) {
        let posterior = process.condition(&context)?;
        let said = posterior.at(&sites)?.marginals(0, Of::Surface)?;
        let drawn = posterior.field(DRAWS, 4, 2.0)?.at(&sites)?;
        for i in 0..x.len() {
            let of = &drawn.deviations[i * DRAWS..][..DRAWS];
            let mean = of.iter().map(|d| f64::from(*d)).sum::<f64>() / DRAWS as f64;
            let sd = (of.iter().map(|d| f64::from(*d).powi(2)).sum::<f64>() / DRAWS as f64).sqrt();
            assert!((drawn.mean[i] - said.mean[i]).abs() < 1e-5, "{name}");
            assert!(mean.abs() < 4.0 * said.sd[i] / (DRAWS as f64).sqrt(), "{name} at {i}: {mean}");
            // Four standard errors.
            assert!((sd / said.sd[i] - 1.0).abs() < 0.12, "{name} at {i}: {sd} of {}", said.sd[i]);
        }
        let (a, b) = drawn.deviations[..2 * DRAWS].split_at(DRAWS);
        let seam = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(seam < 1e-3, "{name}: {seam}");
    }
    Ok(())
}
