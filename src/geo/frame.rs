//! `Frame`: the one door between the world's units and the model's.
//!
//! World: f64, coordinates of any CRS, outcomes in their own units. Model: f32, sites within
//! [−1, 1] on a plane (or beyond a plane's reach, [`Geometry`]), a continuous outcome with mean 0 and sd 1. Between them lies a local
//! equal-area plane (Lambert azimuthal, [`Crs::local_equal_area`]) centred on the sites: it
//! keeps distances within 0.5 % out to 1,000 km from its centre, where the error is 1 − cos(c/2)
//! for the angle c from it (Snyder 1987, USGS Professional Paper 1395, ch. 24).

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::{
    covariates::Design,
    crs::{Crs, EARTH_RADIUS},
    displacement::Displacement,
    geometry::{Geometry, plane},
    survey::{Outcome, Survey},
    time::Clock,
};
use crate::{
    error::{Error, Result},
    predictive::Marginals,
    sites::{Observations, Sites, log_rate, mean_sd, span},
};

/// How world coordinates and outcomes become model units and back; goes into the run record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Frame {
    /// The plane on which distances are measured, and maps are drawn.
    pub plane: Crs,
    /// What distances are measured on where that is no plane.
    #[serde(default, skip_serializing_if = "Geometry::is_plane")]
    pub geometry: Geometry,
    /// Centre of the sites' bounding box, units of the plane; metres in another geometry.
    pub centre: Vec<f64>,
    /// Metres in one model unit: half the longer side of the sites' bounding box.
    pub metres_per_unit: f64,
    /// Mean taken off a continuous outcome, its own units, or off its logarithm; for cases the log of
    /// the overall rate; 0 for positives among tested.
    pub y_mean: f64,
    /// Sd a continuous outcome, or its logarithm, is divided by; 1 for counts.
    pub y_sd: f64,
    /// Days and model units, where the survey has times.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock: Option<Clock>,
    /// How covariates become features of a site, where the survey has some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub covariates: Option<Design>,
}

impl Frame {
    /// The frame of a survey: a plane centred on its sites, scaled so that they span [−1, 1].
    ///
    /// # Errors
    /// [`Error::Input`] if the sites do not span a box, or cannot be moved to a plane.
    pub fn fit(survey: &Survey) -> Result<Self> {
        let (plane, geometry) = (plane(survey)?, survey.geometry.clone());
        let places = geometry.places(&survey.crs, &plane, &survey.x, &survey.y)?;
        let (centre, unit) = span(&places, geometry.dim()).ok_or_else(|| flat(survey))?;
        let (y_mean, y_sd) = match &survey.outcome {
            Outcome::Counts { .. } => (0.0, 1.0),
            Outcome::Cases { cases, exposure, .. } => (log_rate(cases, exposure), 1.0),
            Outcome::Values(values) => mean_sd(values),
            Outcome::Positive(values) => {
                mean_sd(&values.iter().map(|v| v.ln()).collect::<Vec<_>>())
            }
        };
        let metres = if geometry.is_plane() { plane.metres_per_unit() } else { 1.0 };
        let metres_per_unit = unit * metres;
        let covariates = survey.covariates.as_ref().map(Design::fit);
        let clock = survey.times.as_ref().map(Clock::fit);
        Ok(Frame { plane, geometry, centre, metres_per_unit, y_mean, y_sd, clock, covariates })
    }

    /// A survey in model units: sites `[1, site, 2]`, `y` `[1, site, 1]`, and for counts
    /// `trials` `[1, site]`: the tested, or the cases expected at the overall rate.
    pub fn observations(&self, survey: &Survey, device: &Device) -> Result<Observations> {
        let sites = self.sites_of(survey, device)?;
        let tensor = |values: Vec<f32>| Tensor::from_vec(values, (1, survey.len()), device);
        let (y, trials) = match &survey.outcome {
            Outcome::Values(values) => {
                let scaled = values.iter().map(|v| ((v - self.y_mean) / self.y_sd) as f32);
                (tensor(scaled.collect())?, None)
            }
            Outcome::Positive(values) => {
                let scaled = values.iter().map(|v| ((v.ln() - self.y_mean) / self.y_sd) as f32);
                (tensor(scaled.collect())?, None)
            }
            Outcome::Cases { cases, exposure, .. } => {
                let rate = self.y_mean.exp();
                let expected = exposure.iter().map(|n| (n * rate) as f32);
                let cases = cases.iter().map(|v| *v as f32);
                (tensor(cases.collect())?, Some(tensor(expected.collect())?))
            }
            Outcome::Counts { positive, tested } => (
                tensor(positive.iter().map(|v| *v as f32).collect())?,
                Some(tensor(tested.iter().map(|v| *v as f32).collect())?),
            ),
        };
        Observations::new(sites, y.unsqueeze(2)?, trials)
    }

    /// The places of a survey with its own covariates: of this frame's, or of sites held out of it.
    ///
    /// # Errors
    /// As [`Frame::sites`]; [`Error::Axis`] if it has other covariates than the frame.
    pub fn sites_of(&self, survey: &Survey, device: &Device) -> Result<Sites> {
        let values = survey.covariates.as_ref().map_or(&[][..], |c| &c.values);
        let mut sites = self.placed(&survey.crs, &survey.x, &survey.y, values, device)?;
        sites.t = match (&self.clock, &survey.times) {
            (Some(clock), Some(times)) => Some(clock.tensor(&times.days, device)?),
            (None, None) => None,
            _ => return Err(Error::axis("times of the survey and the frame", "with", "without")),
        };
        Ok(sites)
    }

    /// The same frame at one time: places that have no time of their own are of that day.
    ///
    /// # Errors
    /// [`Error::Input`] for a survey without times, which knows none.
    pub fn on(&self, day: f64) -> Result<Self> {
        let Some(clock) = self.clock else {
            return Err(Error::input("the survey has no times to map one of")
                .try_this("name their column with --time COLUMN"));
        };
        Ok(Frame { clock: Some(Clock { now: Some(day), ..clock }), ..self.clone() })
    }

    /// Places in model units, `[1, site, 2]`; `x` and `y` in units of `crs`. One transformation
    /// for all of them; centred and scaled in f64, then cast. Covariates are read from their rasters, and
    /// the time is the frame's own ([`Frame::on`]).
    ///
    /// # Errors
    /// [`Error::Axis`] if `x` and `y` differ in length; [`Error::Input`] if a place is not
    /// finite, or cannot be moved to the plane, or has no data for a covariate, or if the survey has
    /// times and the frame is [`on`](Frame::on) none.
    pub fn sites(&self, crs: &Crs, x: &[f64], y: &[f64], device: &Device) -> Result<Sites> {
        let values = match &self.covariates {
            Some(design) => design.rasters(crs, x, y)?,
            None => Vec::new(),
        };
        self.sites_with(crs, x, y, &values, device)
    }

    /// The same with covariates that are known already, `[covariate][site]`.
    ///
    /// # Errors
    /// As [`Frame::sites`], and [`Error::Axis`] for more or fewer covariates than the frame's.
    pub fn sites_with(
        &self,
        crs: &Crs,
        x: &[f64],
        y: &[f64],
        values: &[Vec<f64>],
        device: &Device,
    ) -> Result<Sites> {
        let mut sites = self.placed(crs, x, y, values, device)?;
        if let Some(clock) = &self.clock {
            let now = clock.now.ok_or_else(|| {
                Error::input("the survey has times, and these places have none")
                    .try_this("say when with --at, or leave --time out")
            })?;
            sites.t = Some(clock.tensor(&vec![now; x.len()], device)?);
        }
        Ok(sites)
    }

    /// The same with a day for each place, whatever the frame's own time.
    ///
    /// # Errors
    /// As [`Frame::sites_with`]; [`Error::Axis`] if a place has no day, or the survey had no times.
    pub fn sites_when(
        &self,
        crs: &Crs,
        [x, y]: [&[f64]; 2],
        days: &[f64],
        values: &[Vec<f64>],
        device: &Device,
    ) -> Result<Sites> {
        let Some(clock) = self.clock.as_ref().filter(|_| days.len() == x.len()) else {
            return Err(Error::axis("days and places", days.len(), x.len()));
        };
        let t = Some(clock.tensor(days, device)?);
        Ok(Sites { t, ..self.placed(crs, x, y, values, device)? })
    }

    /// Places with covariates, without times.
    fn placed(
        &self,
        crs: &Crs,
        x: &[f64],
        y: &[f64],
        values: &[Vec<f64>],
        device: &Device,
    ) -> Result<Sites> {
        let wanted = self.covariates.as_ref().map_or(0, |design| design.terms.len());
        if values.len() != wanted {
            return Err(Error::axis("covariates given and of the frame", values.len(), wanted));
        }
        let mut places = self.geometry.places(crs, &self.plane, x, y)?;
        let metres = if self.geometry.is_plane() { self.plane.metres_per_unit() } else { 1.0 };
        let unit = self.metres_per_unit / metres;
        for (i, c) in places.iter_mut().enumerate() {
            *c = (*c - self.centre[i % self.centre.len()]) / unit;
        }
        let mut sites = Sites::flat(&places, self.centre.len(), device)?;
        sites.x = self.covariates.as_ref().map(|d| d.tensor(values, device)).transpose()?;
        Ok(sites)
    }

    /// Marginals in the outcome's own units: undoes the standardisation of a continuous outcome or its
    /// logarithm, gives rates their level back, and leaves positives among tested as they are.
    pub fn outcome(&self, marginals: Marginals) -> Marginals {
        marginals.rescale(self.y_mean, self.y_sd)
    }

    /// A displacement in model units.
    pub fn displacement(&self, moved: &Displacement) -> Displacement {
        moved.scaled(1000.0 / self.metres_per_unit)
    }

    /// The longer side of the sites' bounding box, km along the ground.
    pub fn extent_km(&self) -> f64 {
        self.km(2.0)
    }

    /// Whether sites lie so far around the globe that no plane shows them well: more than 60° from their
    /// middle.
    pub fn is_worldwide(&self) -> bool {
        const EDGE: f64 = 0.866; // sin 60°
        matches!(self.geometry, Geometry::Globe(_)) && self.metres_per_unit > EDGE * EARTH_RADIUS
    }

    /// A length in model units, such as a length scale ℓ, in km along the ground.
    pub fn km(&self, length: f64) -> f64 {
        self.geometry.ground(length * self.metres_per_unit) / 1000.0
    }

    /// Places in km, `[place][dimension]`, between which straight lines are distances.
    ///
    /// # Errors
    /// If the tensor cannot be read.
    pub fn places_km(&self, sites: &Sites) -> Result<Vec<Vec<f64>>> {
        let unit = self.metres_per_unit / 1000.0;
        let one = |site: Vec<f64>| site.into_iter().map(|c| unit * c).collect();
        Ok(sites.host()?.into_iter().flatten().map(one).collect())
    }
}

fn flat(survey: &Survey) -> Error {
    Error::input("the sites do not span an area")
        .fact("file", survey.source.display())
        .fact("sites", survey.len())
        .try_this("a map needs at least two sites apart")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::predictive::{Link, Of};

    fn survey(crs: &str, x: Vec<f64>, y: Vec<f64>, outcome: Outcome) -> Survey {
        Survey {
            source: "test".into(),
            crs: Crs::from_user(crs).unwrap(),
            rows: (1..=x.len()).collect(),
            x,
            y,
            outcome,
            times: None,
            covariates: None,
            dropped: Vec::new(),
            displacement: None,
            geometry: Geometry::Plane,
            notes: Vec::new(),
        }
    }

    fn model(frame: &Frame, crs: &Crs, x: &[f64], y: &[f64]) -> Vec<Vec<f64>> {
        frame.sites(crs, x, y, &Device::Cpu).unwrap().host().unwrap().remove(0)
    }

    #[test]
    fn local_planes_stay_as_they_are() {
        let values = Outcome::Values(vec![1.0, 2.0, 6.0]);
        let km = survey("local:km", vec![10.0, 14.0, 11.0], vec![0.0, 1.0, 2.0], values);
        let frame = Frame::fit(&km).unwrap();
        assert_eq!(frame.centre, [12.0, 1.0]);
        assert_eq!(frame.metres_per_unit, 2000.0);
        assert_eq!(frame.extent_km(), 4.0);
        assert_eq!(frame.km(0.5), 1.0);
        assert_eq!(frame.y_mean, 3.0);
        let seen = model(&frame, &km.crs, &[10.0, 13.0], &[1.0, 2.0]);
        assert_eq!(seen, vec![vec![-1.0, 0.0], vec![0.5, 0.5]]);
        // The same places in metres.
        let metres = Crs::from_user("local:m").unwrap();
        assert_eq!(model(&frame, &metres, &[10e3, 13e3], &[1e3, 2e3]), seen);
    }

    #[test]
    fn a_continuous_outcome_goes_in_standardised_and_comes_out_in_its_units() {
        let values = Outcome::Values(vec![10.0, 20.0, 60.0]);
        let survey = survey("local:m", vec![0.0, 4.0, 1.0], vec![0.0, 1.0, 2.0], values);
        let frame = Frame::fit(&survey).unwrap();
        let seen = frame.observations(&survey, &Device::Cpu).unwrap();
        assert!(seen.trials.is_none());
        let y = seen.y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let back: Vec<f64> = y.iter().map(|v| frame.y_mean + frame.y_sd * *v as f64).collect();
        for (b, v) in back.iter().zip([10.0, 20.0, 60.0]) {
            assert!((b - v).abs() < 1e-4, "{back:?}");
        }
        let marginals = |link| Marginals {
            link,
            of: Of::Surface,
            components: 1,
            weight: vec![1.0],
            mean: vec![1.0],
            sd: vec![0.5],
        };
        let out = frame.outcome(marginals(Link::Identity));
        assert!((out.mean[0] - (30.0 + frame.y_sd)).abs() < 1e-12);
        assert!((out.sd[0] - 0.5 * frame.y_sd).abs() < 1e-12);
    }

    #[test]
    fn counts_go_in_as_counts() {
        let counts = Outcome::Counts { positive: vec![0.0, 3.0, 7.0], tested: vec![5.0, 9.0, 7.0] };
        let survey = survey("local:m", vec![0.0, 4.0, 1.0], vec![0.0, 1.0, 2.0], counts);
        let frame = Frame::fit(&survey).unwrap();
        assert_eq!((frame.y_mean, frame.y_sd), (0.0, 1.0));
        let seen = frame.observations(&survey, &Device::Cpu).unwrap();
        assert_eq!(seen.y.dims(), [1, 3, 1]);
        assert_eq!(seen.y.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [0.0, 3.0, 7.0]);
        assert_eq!(seen.trials.unwrap().to_vec2::<f32>().unwrap(), [[5.0, 9.0, 7.0]]);
        let (weight, mean, sd) = (vec![1.0], vec![1.0], vec![0.5]);
        let logit =
            Marginals { link: Link::Logit, of: Of::Surface, components: 1, weight, mean, sd };
        assert_eq!(frame.outcome(logit.clone()), logit);
    }

    /// Cases go in with what the overall rate expects, and rates come out at their own level; values
    /// above 0 go in as standardised logarithms.
    #[test]
    fn rates_and_logarithms_come_back() {
        let (cases, exposure) = (vec![2.0, 0.0, 5.5], vec![1000.0, 500.0, 500.0]);
        let rates = Outcome::Cases { cases, exposure, per: "person".into() };
        let at = |outcome| survey("local:m", vec![0.0, 4.0, 1.0], vec![0.0, 1.0, 2.0], outcome);
        let rates = at(rates);
        let frame = Frame::fit(&rates).unwrap();
        assert!((frame.y_mean - (8.0f64 / 2000.0).ln()).abs() < 1e-12);
        let expected = frame.observations(&rates, &Device::Cpu).unwrap().trials.unwrap();
        for (e, n) in expected.to_vec2::<f32>().unwrap()[0].iter().zip([4.0, 2.0, 2.0]) {
            assert!((e - n).abs() < 1e-5, "{e} of {n}");
        }
        let (weight, mean, sd) = (vec![1.0], vec![2f64.ln()], vec![1e-9]);
        let twice = Marginals { link: Link::Log, of: Of::Surface, components: 1, weight, mean, sd };
        assert!((frame.outcome(twice.clone()).mean_sd(0).0 - 0.008).abs() < 1e-9);
        let values = at(Outcome::Positive(vec![1.0, 10.0, 100.0]));
        let frame = Frame::fit(&values).unwrap();
        let y = frame.observations(&values, &Device::Cpu).unwrap().y;
        let y = y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (y, v) in y.iter().zip([1.0f64, 10.0, 100.0]) {
            assert!((frame.y_mean + frame.y_sd * f64::from(*y) - v.ln()).abs() < 1e-5);
        }
        let back = frame.outcome(twice).mean_sd(0).0;
        assert!((back / (frame.y_mean + frame.y_sd * 2f64.ln()).exp() - 1.0).abs() < 1e-6);
    }

    mod globe {
        use geo::{Destination, Distance, Geodesic, Point};

        use super::*;

        /// Sites in a ring around a centre, 200 km away, and one in the centre.
        fn ring(lon: f64, lat: f64, metres: f64) -> (Vec<f64>, Vec<f64>) {
            let mut sites = vec![Point::new(lon, lat)];
            sites.extend(
                (0..8).map(|k| Geodesic.destination(Point::new(lon, lat), 45.0 * k as f64, metres)),
            );
            sites.iter().map(|p| (p.x(), p.y())).unzip()
        }

        fn counts(n: usize) -> Outcome {
            Outcome::Counts { positive: vec![1.0; n], tested: vec![2.0; n] }
        }

        /// The promise of the module: distances on the plane are geodesics, within 0.5 %.
        #[test]
        fn distances_agree_with_geodesics() {
            // The equator, a high latitude, and across the antimeridian.
            for (lon, lat) in [(10.0, 0.0), (25.0, 70.0), (179.6, -17.0), (-3.0, 52.0)] {
                for (reach, tolerance) in [(200e3, 0.0005), (1000e3, 0.005)] {
                    let (x, y) = ring(lon, lat, reach);
                    let survey = survey("EPSG:4326", x.clone(), y.clone(), counts(x.len()));
                    let frame = Frame::fit(&survey).unwrap();
                    let seen = model(&frame, &survey.crs, &x, &y);
                    for i in 0..x.len() {
                        assert!(seen[i].iter().all(|v| v.abs() <= 1.0 + 1e-6), "{:?}", seen[i]);
                        for j in 0..i {
                            let flat = frame.metres_per_unit
                                * (seen[i][0] - seen[j][0]).hypot(seen[i][1] - seen[j][1]);
                            let truth =
                                Geodesic.distance(Point::new(x[i], y[i]), Point::new(x[j], y[j]));
                            let error = (flat / truth - 1.0).abs();
                            assert!(error < tolerance, "{lon} {lat} {i} {j}: {flat} {truth}");
                        }
                    }
                }
            }
        }

        /// The same places, however they are written, are the same model coordinates.
        #[cfg(feature = "gdal")]
        #[test]
        fn projected_and_geographic_surveys_meet() {
            let (x, y) = ring(-16.0, 13.4, 100e3);
            let lonlat = survey("EPSG:4326", x.clone(), y.clone(), counts(9));
            let utm = Crs::from_user("EPSG:32628").unwrap();
            let (mut east, mut north) = (x.clone(), y.clone());
            lonlat.crs.transform(&utm, &mut east, &mut north).unwrap();
            let projected = survey("EPSG:32628", east.clone(), north.clone(), counts(9));
            let (a, b) = (Frame::fit(&lonlat).unwrap(), Frame::fit(&projected).unwrap());
            assert!((a.metres_per_unit / b.metres_per_unit - 1.0).abs() < 1e-6);
            let (a, b) = (model(&a, &lonlat.crs, &x, &y), model(&b, &utm, &east, &north));
            for (p, q) in a.iter().zip(&b) {
                assert!((p[0] - q[0]).abs() < 1e-5 && (p[1] - q[1]).abs() < 1e-5, "{p:?} {q:?}");
            }
        }

        #[test]
        fn the_frame_survives_the_run_record() {
            let (x, y) = ring(30.0, -2.0, 50e3);
            let survey = survey("EPSG:4326", x, y, counts(9));
            let frame = Frame::fit(&survey).unwrap();
            let text = serde_json::to_string(&frame).unwrap();
            assert_eq!(serde_json::from_str::<Frame>(&text).unwrap(), frame);
            assert!((frame.extent_km() - 100.0).abs() < 0.5, "{}", frame.extent_km());
        }

        #[test]
        fn a_million_places_take_one_transformation() {
            let n = 1_000_000;
            let x: Vec<f64> = (0..n).map(|i| 10.0 + (i % 1000) as f64 * 1e-3).collect();
            let y: Vec<f64> = (0..n).map(|i| 5.0 + (i / 1000) as f64 * 1e-3).collect();
            let ends = [0, 999, n - 1000, n - 1];
            let survey = survey(
                "EPSG:4326",
                ends.iter().map(|i| x[*i]).collect(),
                ends.iter().map(|i| y[*i]).collect(),
                counts(4),
            );
            let frame = Frame::fit(&survey).unwrap();
            let sites = frame.sites(&survey.crs, &x, &y, &Device::Cpu).unwrap();
            assert_eq!(sites.s.dims(), [1, n, 2]);
        }
    }

    /// Sites a metre apart, 8,000 km from the origin of their plane, stay a metre apart: centred
    /// in f64 before the cast (f32 metres resolve half a metre there).
    #[test]
    fn centring_happens_before_the_cast() {
        let (x, y) = (vec![5e5, 500_001.0, 5e5], vec![8e6, 8e6, 8_000_001.2]);
        let survey = survey("local:m", x.clone(), y.clone(), Outcome::Values(vec![0.0; 3]));
        let frame = Frame::fit(&survey).unwrap();
        let seen = model(&frame, &survey.crs, &x, &y);
        let metres = |i: usize, j: usize| {
            frame.metres_per_unit * (seen[i][0] - seen[j][0]).hypot(seen[i][1] - seen[j][1])
        };
        assert!((metres(0, 1) - 1.0).abs() < 1e-5, "{}", metres(0, 1));
        assert!((metres(0, 2) - 1.2).abs() < 1e-5, "{}", metres(0, 2));
    }

    #[test]
    fn one_place_is_no_frame() {
        let survey = survey("local:m", vec![1.0; 3], vec![2.0; 3], Outcome::Values(vec![0.0; 3]));
        assert!(Frame::fit(&survey).unwrap_err().to_string().contains("do not span"));
    }
}
