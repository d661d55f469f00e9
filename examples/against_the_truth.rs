//! How near the map of the invented country comes to the truth: three pictures and four numbers.
//!
//! ```text
//! make map
//! cargo run --release --example against_the_truth [DIRECTORY OF THE MAP]
//! ```

use std::path::Path;

use isopleth::{
    Result,
    geo::{
        geotiff::Raster,
        grid::Grid,
        survey::{Survey, SurveyOptions},
    },
    picture::{Palette, Picture},
};

fn main() -> Result<()> {
    let directory = std::env::args().nth(1).unwrap_or_else(|| "out".into());
    let (directory, data) = (Path::new(&directory), Path::new("data"));
    let grid = Grid::read(&data.join("grid.tif"))?;
    let survey = Survey::read(data.join("survey.csv"), &SurveyOptions::default())?;
    let (mut x, mut y) = (survey.x.clone(), survey.y.clone());
    survey.crs.transform(&grid.crs, &mut x, &mut y)?;

    let read = |path: &Path| Raster::open(path)?.thumbnail(grid.rows, grid.cols);
    let truth = read(&data.join("truth.tif"))?;
    let map = read(&directory.join("mean.tif"))?;
    let low = read(&directory.join("quantile_0.025.tif"))?;
    let high = read(&directory.join("quantile_0.975.tif"))?;
    let error = &map - &truth;

    // One scale for truth and prediction, or the eye compares nothing; the error's is symmetric.
    let top = truth.iter().chain(&map).copied().fold(0.0, f64::max);
    let most = error.iter().copied().map(f64::abs).fold(0.0, f64::max);
    for (name, title, values, palette, range) in [
        ("truth", "True prevalence", &truth, Palette::Level, [0.0, top]),
        ("prediction", "Predicted prevalence", &map, Palette::Level, [0.0, top]),
        ("error", "Predicted minus true prevalence", &error, Palette::Diverging, [-most, most]),
    ] {
        let mut picture =
            Picture::new(title, values.clone()).on(&grid).with_sites(&grid, &x, &y, None);
        picture.subtitle = "an invented country".into();
        picture.legend = "survey site".into();
        (picture.palette, picture.range) = (palette, Some(range));
        let path = directory.join(name).with_extension("png");
        picture.save(&path)?;
        println!("{}", path.display());
    }

    // Land is where the error is a number.
    let mean = |f: &dyn Fn([usize; 2]) -> f64| {
        let land = error.indexed_iter().filter(|(_, e)| e.is_finite()).map(|((r, c), _)| f([r, c]));
        let (sum, count) = land.fold((0.0, 0.0), |(sum, count), v| (sum + v, count + 1.0));
        sum / count
    };
    let (mean_truth, mean_map) = (mean(&|i| truth[i]), mean(&|i| map[i]));
    let covariance = mean(&|i| (truth[i] - mean_truth) * (map[i] - mean_map));
    let variances =
        mean(&|i| (truth[i] - mean_truth).powi(2)) * mean(&|i| (map[i] - mean_map).powi(2));
    println!("correlation           {:.3}", covariance / variances.sqrt());
    println!("root mean square      {:.3}", mean(&|i| error[i].powi(2)).sqrt());
    println!("mean error            {:+.3}", mean(&|i| error[i]));
    println!(
        "inside 95 % interval  {:.3}",
        mean(&|i| f64::from(low[i] <= truth[i] && truth[i] <= high[i]))
    );
    Ok(())
}
