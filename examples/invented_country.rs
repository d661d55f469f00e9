//! Invents a country and surveys it: writes the bundled example in `data/`.
//!
//! ```text
//! cargo run --release --example invented_country [DIRECTORY]
//! ```
//!
//! The prevalence surface is a draw of this library's own kernels plus an effect of elevation, so the
//! truth is known at every pixel. Same seed, same country.

use std::{error::Error, fs, path::Path};

use gdal::{
    DriverManager,
    raster::{Buffer, GdalType, RasterCreationOptions},
    spatial_ref::{AxisMappingStrategy, CoordTransform, SpatialRef},
    vector::{Geometry, LayerAccess, LayerOptions, OGRwkbGeometryType},
};
use isopleth::{
    Stream,
    kernel::{self, Kernel, Matern, Metric, Smoothness, Sum},
    linalg::Cholesky,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;
type Point = [f64; 2]; // km east and north of the south-west corner of the grid

const SEED: u64 = 11;
const EPSG: u32 = 32630; // UTM 30N: the sea south of Ghana, where no country is in the way
const CORNER: [f64; 2] = [260_000.0, 0.0]; // south-west corner of the grid, metres
const PIXEL: f64 = 2.0; // km
const COLS: usize = 230;
const ROWS: usize = 250;
const LATTICE: f64 = 5.0; // km between the nodes where surfaces are drawn

const VILLAGES: usize = 140;
const TOWNS: usize = 9;
const MEAN_LOGIT: f64 = -1.3; // at sea level
const PER_KM_UP: f64 = -1.2; // logits: the vector does not like the cold
const VILLAGE_SD: f64 = 0.45; // logits, between neighbouring villages

// ---- the land --------------------------------------------------------------------------------

/// How an edge of the outline looks: sea coast, river, or a line some treaty drew.
#[derive(Clone, Copy)]
enum Edge {
    Coast,
    River,
    Treaty,
}

/// Corners in order, each with the kind of edge that leaves it.
const MAINLAND: &[(f64, f64, Edge)] = &[
    (62.0, 118.0, Edge::Coast),
    (98.0, 72.0, Edge::Coast),
    (150.0, 58.0, Edge::Coast),
    (200.0, 84.0, Edge::Coast),
    (236.0, 50.0, Edge::Coast),
    (300.0, 36.0, Edge::Coast),
    (345.0, 66.0, Edge::Coast),
    (388.0, 44.0, Edge::River),
    (402.0, 120.0, Edge::River),
    (366.0, 190.0, Edge::River),
    (412.0, 258.0, Edge::River),
    (404.0, 330.0, Edge::Treaty),
    (436.0, 432.0, Edge::Treaty),
    (300.0, 466.0, Edge::River),
    (232.0, 438.0, Edge::River),
    (172.0, 468.0, Edge::Coast),
    (120.0, 452.0, Edge::Coast),
    (98.0, 402.0, Edge::Coast),
    (132.0, 348.0, Edge::Coast),
    (78.0, 312.0, Edge::Coast),
    (34.0, 268.0, Edge::Coast),
    (54.0, 212.0, Edge::Coast),
    (22.0, 168.0, Edge::Coast),
];
const ISLAND: &[(f64, f64, Edge)] = &[
    (36.0, 372.0, Edge::Coast),
    (60.0, 384.0, Edge::Coast),
    (56.0, 412.0, Edge::Coast),
    (30.0, 402.0, Edge::Coast),
];
const LAKE: &[(f64, f64, Edge)] = &[
    (252.0, 292.0, Edge::Coast),
    (288.0, 300.0, Edge::Coast),
    (300.0, 330.0, Edge::Coast),
    (270.0, 322.0, Edge::Coast),
];

/// A closed outline, roughened by moving the middle of every edge, again and again.
fn roughen(corners: &[(f64, f64, Edge)], rng: &mut Stream) -> Vec<Point> {
    let mut line: Vec<(Point, Edge)> = corners.iter().map(|&(x, y, e)| ([x, y], e)).collect();
    for _ in 0..6 {
        let mut finer = Vec::with_capacity(2 * line.len());
        for (i, &(a, edge)) in line.iter().enumerate() {
            let (b, _) = line[(i + 1) % line.len()];
            let aside = match edge {
                Edge::Coast => 0.17 * rng.normal().clamp(-2.0, 2.0),
                Edge::River => 0.09 * rng.normal().clamp(-2.0, 2.0),
                Edge::Treaty => 0.0,
            };
            let middle = [
                0.5 * (a[0] + b[0]) - aside * (b[1] - a[1]),
                0.5 * (a[1] + b[1]) + aside * (b[0] - a[0]),
            ];
            finer.extend([(a, edge), (middle, edge)]);
        }
        line = finer;
    }
    // Decametres: nobody surveyed it better.
    line.iter().map(|(p, _)| p.map(|c| (100.0 * c).round() / 100.0)).collect()
}

/// Inside an odd number of rings: the lake is not land.
fn is_land(rings: &[Vec<Point>], p: Point) -> bool {
    rings.iter().fold(false, |inside, ring| {
        let crossings = (0..ring.len()).filter(|&i| {
            let (a, b) = (ring[i], ring[(i + 1) % ring.len()]);
            (a[1] > p[1]) != (b[1] > p[1])
                && p[0] < a[0] + (p[1] - a[1]) / (b[1] - a[1]) * (b[0] - a[0])
        });
        inside ^ (crossings.count() % 2 == 1)
    })
}

fn distance(a: Point, b: Point) -> f64 {
    (a[0] - b[0]).hypot(a[1] - b[1])
}

// ---- surfaces --------------------------------------------------------------------------------

/// A lattice over the land and some way beyond, with the surfaces drawn on it.
struct Lattice {
    nodes: Vec<Vec<f64>>,
    index: Vec<Option<usize>>,
    cols: usize,
}

impl Lattice {
    /// The corners of every cell that holds a pixel of land or a vertex of the shore.
    fn new(rings: &[Vec<Point>], land: &[Point]) -> Self {
        let cols = (COLS as f64 * PIXEL / LATTICE) as usize + 2;
        let rows = (ROWS as f64 * PIXEL / LATTICE) as usize + 2;
        let mut index = vec![None; rows * cols];
        let mut nodes = Vec::new();
        for p in land.iter().chain(rings.iter().flatten()) {
            let (i, j) = ((p[0] / LATTICE) as usize, (p[1] / LATTICE) as usize);
            for (i, j) in [(i, j), (i + 1, j), (i, j + 1), (i + 1, j + 1)] {
                index[j * cols + i].get_or_insert_with(|| {
                    nodes.push(vec![i as f64 * LATTICE, j as f64 * LATTICE]);
                    nodes.len() - 1
                });
            }
        }
        Lattice { nodes, index, cols }
    }

    /// One draw of a Gaussian process at the nodes.
    fn draw(&self, kernel: &dyn Kernel, rng: &mut Stream) -> Result<Vec<f64>> {
        let covariance = kernel::matrix(kernel, &self.nodes, &self.nodes);
        Ok(Cholesky::factor(covariance)?.colour(&rng.normals(self.nodes.len())))
    }

    /// Bilinear between the four nodes around `p`, which must be near land.
    fn at(&self, values: &[f64], p: Point) -> f64 {
        let (u, v) = (p[0] / LATTICE, p[1] / LATTICE);
        let (i, j) = (u as usize, v as usize);
        let (fu, fv) = (u.fract(), v.fract());
        let node = |i: usize, j: usize| {
            values[self.index[j * self.cols + i].expect("the lattice covers the land")]
        };
        (1.0 - fv) * ((1.0 - fu) * node(i, j) + fu * node(i + 1, j))
            + fv * ((1.0 - fu) * node(i, j + 1) + fu * node(i + 1, j + 1))
    }
}

fn matern(smoothness: Smoothness, length_scale: f64, sill: f64) -> Matern {
    Matern { smoothness, length_scale, sill, metric: Metric::Euclidean }
}

// ---- people ----------------------------------------------------------------------------------

struct Town {
    name: String,
    at: Point,
    people: f64,
}

fn place_name(rng: &mut Stream) -> String {
    const START: &[&str] =
        &["A", "Be", "Da", "E", "Ka", "Lo", "Ma", "Mo", "Na", "O", "Sa", "Te", "To", "Wa"];
    const MIDDLE: &[&str] =
        &["ba", "de", "gu", "ki", "la", "mi", "ndo", "re", "ru", "shi", "ta", "wo"];
    const END: &[&str] = &["", "ba", "ko", "ma", "ne", "no", "ra", "ri", "so", "ve"];
    [START, MIDDLE, END].map(|part| part[rng.below(part.len())]).concat()
}

/// A name not given before.
fn new_name(taken: &mut Vec<String>, rng: &mut Stream) -> String {
    loop {
        let name = place_name(rng);
        if !taken.contains(&name) {
            taken.push(name.clone());
            return name;
        }
    }
}

fn anywhere(rings: &[Vec<Point>], rng: &mut Stream) -> Point {
    loop {
        let p = [rng.uniform(0.0, COLS as f64 * PIXEL), rng.uniform(0.0, ROWS as f64 * PIXEL)];
        if is_land(rings, p) {
            return p;
        }
    }
}

fn main() -> Result<()> {
    let directory = std::env::args().nth(1).unwrap_or_else(|| "data".into());
    let directory = Path::new(&directory);
    fs::create_dir_all(directory)?;
    // GeoPackage writes the date: the same bytes on every day.
    gdal::config::set_config_option("OGR_CURRENT_DATE", "2026-01-01T00:00:00.000Z")?;

    let rng = |purpose| Stream::new(SEED, purpose, 0);
    // A rough outline may cross itself: take the first that does not.
    let (rings, shape) = (0..)
        .map(|attempt| {
            let mut rng = Stream::new(SEED, "outline", attempt);
            let rings = [MAINLAND, ISLAND, LAKE].map(|corners| roughen(corners, &mut rng));
            let shape = outline(&rings);
            (rings, shape)
        })
        .find(|(_, shape)| shape.as_ref().map_or(true, Geometry::is_valid))
        .expect("attempts do not end");

    let pixels: Vec<Option<Point>> = (0..ROWS * COLS)
        .map(|k| {
            let centre = [(k % COLS) as f64 + 0.5, (ROWS - k / COLS) as f64 - 0.5];
            Some(centre.map(|c| c * PIXEL)).filter(|&p| is_land(&rings, p))
        })
        .collect();
    let land: Vec<Point> = pixels.iter().flatten().copied().collect();

    // Surfaces: how high, how many people, how much disease.
    let lattice = Lattice::new(&rings, &land);
    let hills = lattice.draw(&matern(Smoothness::FiveHalves, 35.0, 1.0), &mut rng("hills"))?;
    let crowd = lattice.draw(&matern(Smoothness::Half, 25.0, 1.0), &mut rng("crowd"))?;
    let disease: Vec<Box<dyn Kernel>> = vec![
        Box::new(matern(Smoothness::ThreeHalves, 60.0, 0.8)),
        Box::new(matern(Smoothness::Half, 40.0, 0.4)),
    ];
    let risk = lattice.draw(&Sum(disease), &mut rng("risk"))?;

    let shore = |p: Point| rings.iter().flatten().map(|&q| distance(p, q)).fold(f64::MAX, f64::min);
    let elevation = |p: Point| {
        // One range along the east, one massif in the north, plains that rise from the shore. Metres.
        let range = 900.0 * (-((p[0] - 330.0 - 0.25 * (p[1] - 250.0)) / 38.0).powi(2) / 2.0).exp();
        let massif = 700.0 * (-(distance(p, [190.0, 400.0]) / 45.0).powi(2) / 2.0).exp();
        let rise = (shore(p) / 25.0).min(1.0);
        5.0 + rise * (80.0 + range + massif) * (0.5 * lattice.at(&hills, p)).exp()
    };
    let logit = |p: Point| MEAN_LOGIT + PER_KM_UP * elevation(p) / 1000.0 + lattice.at(&risk, p);
    let logistic = |x: f64| 1.0 / (1.0 + (-x).exp());

    // Towns, well apart and not on the mountains; each smaller than the one before.
    let mut names = rng("names");
    let mut taken = Vec::new();
    let mut place = rng("towns");
    let mut towns: Vec<Town> = Vec::new();
    while towns.len() < TOWNS {
        let at = anywhere(&rings, &mut place);
        if elevation(at) < 500.0 && towns.iter().all(|town| distance(town.at, at) > 70.0) {
            let people = 900_000.0 / (1.0 + towns.len() as f64);
            towns.push(Town { name: new_name(&mut taken, &mut names), at, people });
        }
    }
    // A town of 9 km spreads over 2π 9² ≈ 500 km².
    let people = |p: Point| {
        let urban: f64 = towns
            .iter()
            .map(|town| town.people * PIXEL * PIXEL / 500.0 * (-distance(town.at, p) / 9.0).exp())
            .sum();
        let rural = 90.0 * (-elevation(p) / 900.0).exp();
        (urban + rural) * (0.7 * lattice.at(&crowd, p)).exp()
    };

    // The survey: most teams go where a day's drive from a town takes them.
    let mut visit = rng("survey");
    let mut survey = String::from("village,district,lon,lat,tested,positive\n");
    let to_lonlat = CoordTransform::new(&crs(EPSG)?, &crs(4326)?)?;
    let (mut all_tested, mut all_positive, mut sites) = (0, 0, Vec::new());
    while sites.len() < VILLAGES {
        let p = if visit.unit() < 0.55 {
            let town = &towns[visit.below(TOWNS)];
            [town.at[0] + 22.0 * visit.normal(), town.at[1] + 22.0 * visit.normal()]
        } else {
            anywhere(&rings, &mut visit)
        };
        if !is_land(&rings, p) || sites.iter().any(|&q| distance(p, q) < 1.5) {
            continue;
        }
        let tested = visit.log_uniform(20.0, 121.0) as u64;
        let village_effect = VILLAGE_SD * visit.normal();
        let positive = visit.binomial(tested, logistic(logit(p) + village_effect));
        // Two villages had left for the dry season: real tables have such rows.
        let (tested, positive) =
            if [36, 101].contains(&sites.len()) { (0, 0) } else { (tested, positive) };
        let nearest = towns.iter().min_by(|a, b| distance(a.at, p).total_cmp(&distance(b.at, p)));
        let district = &nearest.expect("there are towns").name;
        let village = new_name(&mut taken, &mut names);
        let mut lon = [CORNER[0] + 1000.0 * p[0]];
        let mut lat = [CORNER[1] + 1000.0 * p[1]];
        to_lonlat.transform_coords(&mut lon, &mut lat, &mut [])?;
        survey +=
            &format!("{village},{district},{:.5},{:.5},{tested},{positive}\n", lon[0], lat[0]);
        all_tested += tested;
        all_positive += positive;
        sites.push(p);
    }
    fs::write(directory.join("survey.csv"), survey)?;

    // Rasters: one value for each pixel of land, none elsewhere.
    let over_land = |f: &dyn Fn(Point) -> f64| -> Vec<Option<f64>> {
        pixels.iter().map(|p| p.map(f)).collect()
    };
    let mask = over_land(&|_| 1.0);
    // Four decimals: enough for a prevalence, and the file compresses.
    let truth = over_land(&|p| (1e4 * logistic(logit(p))).round() / 1e4);
    let height = over_land(&|p| elevation(p).round());
    let population = over_land(&|p| people(p).round());
    write_raster(&directory.join("grid.tif"), "land", &mask, 0u8, |v| v as u8)?;
    write_raster(&directory.join("truth.tif"), "prevalence", &truth, -1f32, |v| v as f32)?;
    write_raster(&directory.join("elevation.tif"), "elevation", &height, -9999i16, |v| v as i16)?;
    write_raster(&directory.join("population.tif"), "people", &population, -1i32, |v| v as i32)?;
    write_country(&directory.join("country.gpkg"), shape?)?;

    let inside: Vec<f64> = truth.iter().flatten().copied().collect();
    let low = inside.iter().copied().fold(f64::MAX, f64::min);
    let high = inside.iter().copied().fold(f64::MIN, f64::max);
    println!("{VILLAGES} villages, {all_tested} people tested, {all_positive} positive");
    println!(
        "{} pixels of land, {:.0} people",
        inside.len(),
        population.iter().flatten().sum::<f64>()
    );
    println!(
        "true prevalence {low:.3} to {high:.3}, mean {:.3}",
        inside.iter().sum::<f64>() / inside.len() as f64
    );
    Ok(())
}

// ---- files -----------------------------------------------------------------------------------

/// A reference system with longitude, or easting, first.
fn crs(epsg: u32) -> Result<SpatialRef> {
    let mut crs = SpatialRef::from_epsg(epsg)?;
    crs.set_axis_mapping_strategy(AxisMappingStrategy::TraditionalGisOrder);
    Ok(crs)
}

fn write_raster<T: GdalType + Copy + Into<f64>>(
    path: &Path,
    name: &str,
    values: &[Option<f64>],
    nothing: T,
    convert: impl Fn(f64) -> T,
) -> Result<()> {
    let options = RasterCreationOptions::from_iter(["COMPRESS=DEFLATE", "ZLEVEL=9", "PREDICTOR=1"]);
    let driver = DriverManager::get_driver_by_name("GTiff")?;
    let mut raster =
        driver.create_with_band_type_with_options::<T, _>(path, COLS, ROWS, 1, &options)?;
    let top = CORNER[1] + 1000.0 * PIXEL * ROWS as f64;
    raster.set_spatial_ref(&crs(EPSG)?)?;
    raster.set_geo_transform(&[CORNER[0], 1000.0 * PIXEL, 0.0, top, 0.0, -1000.0 * PIXEL])?;
    let data = values.iter().map(|v| v.map_or(nothing, &convert)).collect();
    let mut band = raster.rasterband(1)?;
    band.set_no_data_value(Some(nothing.into()))?;
    gdal::Metadata::set_description(&mut band, name)?;
    band.write((0, 0), (COLS, ROWS), &mut Buffer::new((COLS, ROWS), data))?;
    Ok(())
}

/// Two parts: the mainland with its lake, and the island. Whole metres.
fn outline([mainland, island, lake]: &[Vec<Point>; 3]) -> Result<Geometry> {
    let ring = |points: &[Point]| {
        let corners: Vec<String> = points
            .iter()
            .chain(&points[..1])
            .map(|p| format!("{:.0} {:.0}", CORNER[0] + 1000.0 * p[0], CORNER[1] + 1000.0 * p[1]))
            .collect();
        format!("({})", corners.join(","))
    };
    let (mainland, island, lake) = (ring(mainland), ring(island), ring(lake));
    Ok(Geometry::from_wkt(&format!("MULTIPOLYGON(({mainland},{lake}),({island}))"))?)
}

fn write_country(path: &Path, shape: Geometry) -> Result<()> {
    let mut file = DriverManager::get_driver_by_name("GPKG")?.create_vector_only(path)?;
    let mut layer = file.create_layer(LayerOptions {
        name: "country",
        srs: Some(&crs(EPSG)?),
        ty: OGRwkbGeometryType::wkbMultiPolygon,
        options: None,
    })?;
    layer.create_feature(shape)?;
    Ok(())
}
