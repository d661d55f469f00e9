//! Covariates on a lattice of places: what the regions of a training are cut from, once the rasters are read.
//!
//! A node holds what the rasters say at its place, read as a map reads them, and a place takes the values
//! of the node nearest to it: what is read at points keeps its spread, which an average would lose.
//! Nodes without data take the values of the nearest node that has some, so that every place has one; a
//! region is laid where there is little of that. A lattice is a small file of its own and a part of
//! every model trained on it: neither needs rasters, or GDAL, again.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    path::Path,
};

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use super::{Source, Spec, sample};
use crate::{
    error::{Error, Result},
    geo::{crs::Crs, geotiff::Raster},
    rng::Stream,
    whole,
};

/// Names of a lattice's tensors, in its file and in a model's.
pub const VALUES: &str = "covariates.values";
/// 1 where a node's values were read, 0 where they are a neighbour's.
pub const KNOWN: &str = "covariates.known";
/// The fewest nodes with data that regions are cut from.
const FEWEST: usize = 100;
/// Share of a region's places that have data of their own, at least.
const LEAST_KNOWN: f64 = 0.6;

/// What a lattice says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Head {
    /// Its covariates, with files as the recipe names them.
    pub specs: Vec<Spec>,
    /// What was asked for: west, south, east, north in degrees; nothing for all of the first raster.
    pub window: Option<[f64; 4]>,
    /// How many nodes were asked for.
    pub nodes: usize,
    /// The plane on which nodes stand.
    pub plane: Crs,
    /// The first node: west and north, metres.
    pub origin: [f64; 2],
    /// Metres between nodes.
    pub step: f64,
}

/// Covariates at the nodes of a lattice.
#[derive(Debug, Clone, PartialEq)]
pub struct Lattice {
    /// What it is of, and where it lies.
    pub head: Head,
    rows: usize,
    cols: usize,
    /// `[covariate][node]`, row-major from the north-west.
    values: Vec<Vec<f32>>,
    known: Vec<bool>,
}

/// A square of a lattice's plane, turned and perhaps mirrored, which a region from −1 to 1 is laid on.
#[derive(Debug, Clone, Copy)]
pub struct Region {
    centre: [f64; 2],
    /// Metres of half a side.
    pub half: f64,
    turn: [f64; 2],
    mirror: f64,
}

impl Lattice {
    /// Reads rasters over a window, at about so many nodes.
    ///
    /// `files` gives the place of a file that the specs name.
    ///
    /// # Errors
    /// As covariates are read; [`Error::Input`] for a covariate that is a column or categorical, or
    /// where next to no node has every covariate.
    pub fn read(
        specs: &[Spec],
        window: Option<[f64; 4]>,
        nodes: usize,
        files: &dyn Fn(&Path) -> std::path::PathBuf,
    ) -> Result<Self> {
        let placed = specs.iter().map(|spec| {
            let mut spec = spec.clone();
            if let Source::Raster { file, .. } = &mut spec.source {
                *file = files(file);
            }
            spec
        });
        let placed: Vec<Spec> = placed.collect();
        let (plane, [west, south, east, north]) = frame(&placed, window)?;
        let (wide, high) = (east - west, north - south);
        let step = (wide * high / nodes.max(4) as f64).sqrt();
        let cols = ((wide / step).floor() as usize).max(1) + 1;
        let rows = ((high / step).floor() as usize).max(1) + 1;
        let (mut x, mut y) = (Vec::new(), Vec::new());
        for i in 0..rows * cols {
            x.push(west + step * (i % cols) as f64);
            y.push(north - step * (i / cols) as f64);
        }
        let mut values = Vec::with_capacity(placed.len());
        for spec in &placed {
            let found = sample::at(spec, &plane, &x, &y)?;
            let known = |v: f64| if spec.scaled(v).is_finite() { v as f32 } else { f32::NAN };
            values.push(found.into_iter().map(known).collect::<Vec<f32>>());
        }
        let known: Vec<bool> =
            (0..rows * cols).map(|i| values.iter().all(|v| !v[i].is_nan())).collect();
        let with = known.iter().filter(|k| **k).count();
        if with < FEWEST.min(rows * cols) {
            let error = Error::input("next to no place of the window has every covariate")
                .fact("places with", format!("{with} of {}", rows * cols));
            let error = placed.iter().fold(error, |e, spec| e.fact("covariate", spec));
            return Err(error.try_this("check `window` under [covariates], and the rasters' CRS"));
        }
        let head =
            Head { specs: specs.to_vec(), window, nodes, plane, origin: [west, north], step };
        let mut lattice = Lattice { head, rows, cols, values, known };
        lattice.fill();
        Ok(lattice)
    }

    /// Gives nodes without data the values of the nearest node with some, step by step.
    fn fill(&mut self) {
        let mut from: Vec<Option<usize>> =
            self.known.iter().enumerate().map(|(i, known)| known.then_some(i)).collect();
        let mut next: VecDeque<usize> = (0..from.len()).filter(|i| self.known[*i]).collect();
        while let Some(i) = next.pop_front() {
            let (row, col) = (i / self.cols, i % self.cols);
            let around = [
                (row > 0).then(|| i - self.cols),
                (row + 1 < self.rows).then(|| i + self.cols),
                (col > 0).then(|| i - 1),
                (col + 1 < self.cols).then(|| i + 1),
            ];
            for j in around.into_iter().flatten() {
                if from[j].is_none() {
                    from[j] = from[i];
                    next.push_back(j);
                }
            }
        }
        for values in &mut self.values {
            for (i, from) in from.iter().enumerate() {
                values[i] = values[from.unwrap_or(i)];
            }
        }
    }

    /// Kilometres along its shorter and its longer side.
    pub fn sides_km(&self) -> [f64; 2] {
        let [a, b] = [self.rows, self.cols].map(|n| (n - 1) as f64 * self.head.step / 1000.0);
        [a.min(b), a.max(b)]
    }

    /// How many nodes, and how many of them have data.
    pub fn nodes(&self) -> [usize; 2] {
        [self.known.len(), self.known.iter().filter(|known| **known).count()]
    }

    /// Lays a region of `side` kilometres somewhere with data, any way up.
    pub fn region(&self, side: f64, rng: &mut Stream) -> Region {
        let half = 500.0 * side;
        let mut best: Option<(f64, Region)> = None;
        for _ in 0..30 {
            let node = rng.below(self.known.len());
            let (row, col) = (node / self.cols, node % self.cols);
            let angle = rng.uniform(0.0, std::f64::consts::TAU);
            let mirror = if rng.unit() < 0.5 { 1.0 } else { -1.0 };
            let (turn, step) = ([angle.cos(), angle.sin()], self.head.step);
            let centre = [step * col as f64, step * row as f64];
            let region = Region { centre, half, turn, mirror };
            let seen = (0..100).filter(|i| {
                let along = |k: usize| 0.2 * k as f64 - 0.9;
                let node = self.node(&region, [along(i % 10), along(i / 10)]);
                node.is_some_and(|node| self.known[node])
            });
            let seen = seen.count() as f64 / 100.0;
            if best.as_ref().is_none_or(|(most, _)| seen > *most) {
                best = Some((seen, region));
            }
            if seen >= LEAST_KNOWN {
                break;
            }
        }
        best.expect("there were tries").1
    }

    /// The node nearest to a place of a region; nothing beyond the lattice.
    fn node(&self, region: &Region, [x, y]: [f64; 2]) -> Option<usize> {
        let ([cos, sin], x) = (region.turn, region.mirror * x);
        let u = (region.centre[0] + region.half * (cos * x - sin * y)) / self.head.step;
        let v = (region.centre[1] + region.half * (sin * x + cos * y)) / self.head.step;
        let (col, row) = (u.round(), v.round());
        let inside =
            (0.0..self.cols as f64).contains(&col) && (0.0..self.rows as f64).contains(&row);
        inside.then(|| row as usize * self.cols + col as usize)
    }

    /// The covariates at places of a region, `[covariate][place]`. Beyond its edges the lattice goes on
    /// as its mirror image.
    pub fn at(&self, region: &Region, xy: &[[f64; 2]]) -> Vec<Vec<f64>> {
        let reflected = |at: f64, n: usize| -> usize {
            let last = (n - 1) as f64;
            let turned = at.rem_euclid(2.0 * last.max(1.0));
            (turned.min(2.0 * last - turned).max(0.0).round() as usize).min(n - 1)
        };
        let node = |[x, y]: &[f64; 2]| {
            let ([cos, sin], x) = (region.turn, region.mirror * x);
            let u = (region.centre[0] + region.half * (cos * x - sin * y)) / self.head.step;
            let v = (region.centre[1] + region.half * (sin * x + cos * y)) / self.head.step;
            reflected(v, self.rows) * self.cols + reflected(u, self.cols)
        };
        let nodes: Vec<usize> = xy.iter().map(node).collect();
        let of = |values: &Vec<f32>| nodes.iter().map(|i| f64::from(values[*i])).collect();
        self.values.iter().map(of).collect()
    }

    /// Its numbers as tensors: values `[covariate, row, col]`, and what is known `[row, col]`.
    ///
    /// # Errors
    /// None but candle's.
    pub fn tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let (k, shape) = (self.values.len(), (self.rows, self.cols));
        let known: Vec<f32> = self.known.iter().map(|k| f32::from(u8::from(*k))).collect();
        let cpu = &Device::Cpu;
        Ok(BTreeMap::from([
            (VALUES.into(), Tensor::from_vec(self.values.concat(), (k, shape.0, shape.1), cpu)?),
            (KNOWN.into(), Tensor::from_vec(known, shape, cpu)?),
        ]))
    }

    /// A lattice from its head and its tensors.
    ///
    /// # Errors
    /// [`Error::Input`] where one is missing or they do not fit each other.
    pub fn of(head: Head, tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        let broken = || {
            Error::input("covariates that were kept cannot be read")
                .try_this("make them again: `isopleth sample` on the recipe, where the rasters are")
        };
        let get = |name: &str| tensors.get(name).ok_or_else(broken);
        let (values, known) = (get(VALUES)?, get(KNOWN)?);
        let ([k, rows, cols], shape) = match values.dims() {
            [k, rows, cols] => ([*k, *rows, *cols], known.dims()),
            _ => return Err(broken()),
        };
        if k != head.specs.len() || shape != [rows, cols] || rows * cols == 0 {
            return Err(broken());
        }
        let host = |x: &Tensor| -> Result<Vec<f32>> {
            Ok(x.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?)
        };
        let flat = host(values)?;
        let values = flat.chunks(rows * cols).map(<[f32]>::to_vec).collect();
        let known = host(known)?.into_iter().map(|k| k > 0.5).collect();
        Ok(Lattice { head, rows, cols, values, known })
    }

    /// Writes it to a file of its own (.safetensors), whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses.
    pub fn write(&self, path: &Path) -> Result<()> {
        let failed = |e: String| Error::io("write", path, std::io::Error::other(e));
        let mut raw = Vec::new();
        for (name, tensor) in self.tensors()? {
            let values = tensor.flatten_all()?.to_vec1::<f32>()?;
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            raw.push((name, tensor.dims().to_vec(), bytes));
        }
        let views = raw.iter().map(|(name, shape, bytes)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
            view.map(|view| (name.clone(), view)).map_err(|e| failed(format!("{e:?}")))
        });
        let head = serde_json::to_string(&self.head).map_err(|e| failed(e.to_string()))?;
        let head = HashMap::from([("isopleth-covariates".to_string(), head)]);
        let bytes = safetensors::serialize(views.collect::<Result<Vec<_>>>()?, Some(head))
            .map_err(|e| failed(format!("{e:?}")))?;
        whole::write_bytes(path, &bytes)
    }

    /// Opens such a file.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::Input`] if it is no such file.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
        let broken = |reason: String| {
            Error::input("the file of kept covariates cannot be read")
                .fact("file", path.display())
                .fact("reason", reason)
                .try_this("make it again: `isopleth sample` on the recipe, where the rasters are")
        };
        let (_, header) =
            SafeTensors::read_metadata(&bytes).map_err(|e| broken(format!("{e:?}")))?;
        let metadata = header.metadata().as_ref();
        let head = metadata.and_then(|m| m.get("isopleth-covariates"));
        let head = head.ok_or_else(|| broken("it holds no covariates".into()))?;
        let head = serde_json::from_str(head).map_err(|e| broken(e.to_string()))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| broken(format!("{e:?}")))?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.tensors() {
            let values: Vec<f32> = view
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect();
            if view.dtype() != Dtype::F32 || values.iter().any(|v| !v.is_finite()) {
                return Err(broken(format!("`{name}` holds no finite numbers")));
            }
            tensors.insert(name, Tensor::from_vec(values, view.shape(), &Device::Cpu)?);
        }
        Lattice::of(head, &tensors).map_err(|e| e.fact("file", path.display()))
    }
}

/// The equal-area plane about the window, and the window's box on it: west, south, east, north.
fn frame(specs: &[Spec], window: Option<[f64; 4]>) -> Result<(Crs, [f64; 4])> {
    let globe = Crs::from_user("EPSG:4326")?;
    // Edges are curves on another plane: looked at where they bulge, too.
    let edges = |[west, south, east, north]: [f64; 4]| -> [Vec<f64>; 2] {
        let (mut x, mut y) = (Vec::new(), Vec::new());
        for i in 0..=16 {
            let part = f64::from(i) / 16.0;
            let (a, b) = (west + part * (east - west), south + part * (north - south));
            x.extend([a, a, west, east]);
            y.extend([south, north, b, b]);
        }
        [x, y]
    };
    let span = |v: &[f64]| {
        v.iter().fold([f64::INFINITY, f64::NEG_INFINITY], |[a, b], v| [a.min(*v), b.max(*v)])
    };
    let [mut lon, mut lat] = match window {
        Some(window) => edges(window),
        None => {
            let Some(Spec { source: Source::Raster { file, .. }, .. }) = specs.first() else {
                return Err(Error::input("no raster of a covariate was named"));
            };
            let header = Raster::open(file)?.header;
            let Some(crs) = header.crs.filter(|crs| !crs.is_local()) else {
                return Err(Error::input("a covariate's raster has no place on the globe")
                    .fact("file", file.display())
                    .try_this(
                        "give it a CRS, for example with gdal_edit.py -a_srs EPSG:32631 FILE",
                    ));
            };
            let ([west, north], [dx, dy]) = (header.origin, header.pixel);
            let far = [west + dx * header.cols as f64, north + dy * header.rows as f64];
            let [mut x, mut y] = edges([west, far[1], far[0], north]);
            crs.transform(&globe, &mut x, &mut y)?;
            [x, y]
        }
    };
    let ([west, east], [south, north]) = (span(&lon), span(&lat));
    if !(east > west && north > south && south >= -90.0 && north <= 90.0 && east - west < 180.0) {
        return Err(Error::input("`window` under [covariates] is none")
            .fact("west, south, east, north", format!("{west}, {south}, {east}, {north}"))
            .try_this("give degrees of a part of the globe: window = [8.0, 3.0, 16.0, 8.0]"));
    }
    let plane = Crs::local_equal_area(0.5 * (west + east), 0.5 * (south + north))?;
    globe.transform(&plane, &mut lon, &mut lat)?;
    let ([west, east], [south, north]) = (span(&lon), span(&lat));
    Ok((plane, [west, south, east, north]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three by four nodes, the last without data.
    fn lattice() -> Lattice {
        let values = (0..12).map(|i| if i == 11 { f32::NAN } else { i as f32 }).collect();
        let head = Head {
            specs: vec!["e=e.tif,knot:2".parse().unwrap()],
            window: None,
            nodes: 12,
            plane: Crs::from_user("local:m").unwrap(),
            origin: [0.0, 0.0],
            step: 1000.0,
        };
        let known = (0..12).map(|i| i != 11).collect();
        let mut lattice = Lattice { head, rows: 3, cols: 4, values: vec![values], known };
        lattice.fill();
        lattice
    }

    #[test]
    fn places_take_the_nearest_node_and_every_one_has_a_value() {
        let lattice = lattice();
        let region = Region { centre: [0.0, 0.0], half: 1000.0, turn: [1.0, 0.0], mirror: 1.0 };
        let at = |x: f64, y: f64| lattice.at(&region, &[[x, y]])[0][0];
        assert_eq!([at(0.0, 0.0), at(1.4, 0.0), at(1.6, 1.0)], [0.0, 1.0, 6.0]);
        // The last node has no data: its neighbour's, from above or from the left.
        assert!([7.0, 10.0].contains(&at(3.0, 2.0)));
        // Beyond the edge: the mirror image, and never nothing.
        assert_eq!([at(-1.0, 0.0), at(4.0, 0.0), at(0.0, -2.0)], [1.0, 2.0, 8.0]);
        assert!(at(1e4, -3e4).is_finite());
        // Turned by a right angle, x runs down the rows; mirrored, up.
        let turned = Region { turn: [0.0, 1.0], ..region };
        assert_eq!(lattice.at(&turned, &[[1.0, 0.0]])[0][0], 4.0);
        let mirrored = Region { mirror: -1.0, centre: [2000.0, 0.0], ..region };
        assert_eq!(lattice.at(&mirrored, &[[1.0, 0.0]])[0][0], 1.0);
        assert_eq!(lattice.sides_km(), [2.0, 3.0]);
        assert_eq!(lattice.nodes(), [12, 11]);
    }

    #[test]
    fn a_lattice_comes_back_from_its_file() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("kept.safetensors");
        let lattice = lattice();
        lattice.write(&path).unwrap();
        assert_eq!(Lattice::open(&path).unwrap(), lattice);
        std::fs::write(&path, b"no lattice").unwrap();
        assert!(Lattice::open(&path).unwrap_err().to_string().contains("cannot be read"));
    }
}
