//! Rasters through GDAL. Same shape as `disabled.rs`.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use gdal::{
    Dataset, DatasetOptions, DriverManager, GdalOpenFlags, Metadata,
    cpl::CslStringList,
    raster::{Buffer, RasterizeOptions, ResampleAlg, rasterize},
    spatial_ref::CoordTransform,
    vector::{Geometry, LayerAccess, OGRwkbGeometryType as Kind, geometry_type_flatten},
};

use ndarray::Array2;

use super::{Band, CACHE, Data, Header};
use crate::{
    error::{Error, Result},
    geo::{
        crs::{self, Crs},
        grid::{Extent, Grid, Window},
    },
};

/// This build reads rasters.
pub const READS: bool = true;

/// Values that mean "no data" in so many rasters that nobody should take them for a number.
const CUSTOMARY: &[f64] = &[-9999.0, -99999.0, -32768.0];

/// Side of the square blocks of our rasters, pixels.
const BLOCK: &str = "256";

/// Readies GDAL: silent, and with a block cache that does not grow with the machine.
fn prepare() {
    cache(CACHE);
}

/// Gives GDAL a block cache of `mebibytes`. The first to ask decides for the whole process, and
/// [`CACHE`] if a raster is opened before anybody asks; returns what was decided.
pub fn cache(mebibytes: usize) -> usize {
    static SIZE: OnceLock<usize> = OnceLock::new();
    crs::quiet();
    *SIZE.get_or_init(|| {
        // Read by GDAL before its first block; without it, 5 % of the machine's memory.
        let _ = gdal::config::set_config_option("GDAL_CACHEMAX", &mebibytes.to_string());
        mebibytes
    })
}

/// Threads that compress a raster: each takes a block or two of memory, and the disk sets the pace.
fn compressors() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get().min(8))
}

fn offset(window: Window) -> (isize, isize) {
    (window.col as isize, window.row as isize)
}

/// A raster that is open for reading.
pub struct Raster {
    /// The file.
    pub path: PathBuf,
    /// What it says about itself.
    pub header: Header,
    data: Dataset,
}

impl Raster {
    /// Opens a raster of any format that GDAL reads.
    ///
    /// # Errors
    /// [`Error::Io`] without the file; [`Error::Input`] if it is not a raster, has no place on a
    /// plane, or is rotated or sheared.
    pub fn open(path: &Path) -> Result<Self> {
        prepare();
        std::fs::metadata(path).map_err(|e| Error::io("read", path, e))?;
        let flags = GdalOpenFlags::GDAL_OF_RASTER | GdalOpenFlags::GDAL_OF_READONLY;
        let options = DatasetOptions { open_flags: flags, ..Default::default() };
        let refuse = |what: &str| Error::input(what).fact("file", path.display());
        let data = Dataset::open_ex(path, options).map_err(|e| {
            refuse("this is not a raster that can be read")
                .fact("GDAL says", e)
                .try_this("give a whole GeoTIFF; a truncated download has to be fetched again")
        })?;
        let (cols, rows) = data.raster_size();
        if data.raster_count() == 0 || rows * cols == 0 {
            return Err(refuse("the raster has no band").try_this("give a GeoTIFF with one band"));
        }
        let Ok([west, dx, shear_x, north, shear_y, dy]) = data.geo_transform() else {
            return Err(refuse("the raster does not say where its pixels lie")
                .try_this("give a georeferenced GeoTIFF, not a plain picture"));
        };
        if shear_x != 0.0 || shear_y != 0.0 || dx <= 0.0 || dy == 0.0 {
            return Err(refuse("the raster is rotated, sheared or mirrored")
                .fact("geotransform", format!("{:?}", [west, dx, shear_x, north, shear_y, dy]))
                .try_this("bring it north up first, with gdalwarp FILE NORTH_UP.tif"));
        }
        let crs = match data.spatial_ref() {
            Ok(reference) => Some(Crs::from_spatial_ref(&reference)?),
            Err(_) => None,
        };
        let header = Header { rows, cols, origin: [west, north], pixel: [dx, dy], crs };
        Ok(Raster { path: path.to_path_buf(), header, data })
    }

    /// Unit and description of the first band, empty where the file does not say.
    pub fn words(&self) -> [String; 2] {
        self.words_of(1)
    }

    /// The same of any band, from 1.
    pub fn words_of(&self, band: usize) -> [String; 2] {
        let Ok(band) = self.data.rasterband(band) else { return Default::default() };
        [band.unit(), band.description().unwrap_or_default()]
    }

    fn unreadable(&self, error: gdal::errors::GdalError) -> Error {
        Error::input("the raster cannot be read to its end: it is truncated or damaged")
            .fact("file", self.path.display())
            .fact("GDAL says", error)
            .try_this("fetch or make the file again")
    }

    /// A window of the first band.
    ///
    /// # Errors
    /// [`Error::Input`] if the file is damaged there.
    pub fn data(&self, window: Window) -> Result<Data> {
        let (mut values, mut valid) = self.cells(1, window)?;
        let mut sentinels = 0;
        for (value, valid) in values.iter_mut().zip(&mut valid) {
            if *valid && (*value == -9999.0 || *value < -1e38) {
                *valid = false;
                sentinels += 1;
            }
            if !*valid {
                *value = f64::NAN;
            }
        }
        Ok(Data { values, valid, sentinels })
    }

    /// How many bands it has.
    pub fn bands(&self) -> usize {
        self.data.raster_count()
    }

    /// What a band (from 1) declares as no data.
    pub fn no_data(&self, band: usize) -> Option<f64> {
        self.data.rasterband(band).ok().and_then(|band| band.no_data_value())
    }

    /// A window of a band (from 1), row-major, in its unit; NaN where the file says that there is no
    /// data. Beside it the first value that customarily means no data where the file does not say so.
    ///
    /// # Errors
    /// [`Error::Input`] if the file is damaged there, or has no such band.
    pub fn read(&self, band: usize, window: Window) -> Result<(Vec<f64>, Option<f64>)> {
        let (mut values, valid) = self.cells(band, window)?;
        let own = self.data.rasterband(band).map_err(|e| self.unreadable(e))?;
        let (scale, offset) = (own.scale().unwrap_or(1.0), own.offset().unwrap_or(0.0));
        let mut suspect = None;
        for (value, valid) in values.iter_mut().zip(valid) {
            if !valid {
                *value = f64::NAN;
            } else if !value.is_finite() || value.abs() > 1e30 || CUSTOMARY.contains(value) {
                suspect = suspect.or(Some(*value));
            } else {
                *value = *value * scale + offset;
            }
        }
        Ok((values, suspect))
    }

    /// Values of a window of a band, and where the file says that there is data.
    fn cells(&self, band: usize, window: Window) -> Result<(Vec<f64>, Vec<bool>)> {
        let size = (window.cols, window.rows);
        let broken = |e| self.unreadable(e);
        let band = self.data.rasterband(band).map_err(broken)?;
        let raw = band.read_as::<f64>(offset(window), size, size, None).map_err(broken)?;
        let mut valid: Vec<bool> = raw.data().iter().map(|v| !v.is_nan()).collect();
        let flags = band.mask_flags().map_err(broken)?;
        if !flags.is_all_valid() {
            let mask = band.open_mask_band().map_err(broken)?;
            let mask = mask.read_as::<u8>(offset(window), size, size, None).map_err(broken)?;
            valid.iter_mut().zip(mask.data()).for_each(|(v, &m)| *v &= m > 0);
        }
        Ok((raw.into_shape_and_vec().1, valid))
    }

    /// The first band averaged down to `[rows, cols]` pixels, NaN without data.
    ///
    /// # Errors
    /// [`Error::Input`] if the file is damaged.
    pub fn thumbnail(&self, rows: usize, cols: usize) -> Result<Array2<f64>> {
        self.thumbnail_of(1, rows, cols)
    }

    /// The same of any band, from 1.
    ///
    /// # Errors
    /// [`Error::Input`] if the file is damaged, or has no such band.
    pub fn thumbnail_of(&self, band: usize, rows: usize, cols: usize) -> Result<Array2<f64>> {
        let band = self.data.rasterband(band).map_err(|e| self.unreadable(e))?;
        let whole = (self.header.cols, self.header.rows);
        let read = band
            .read_as::<f64>((0, 0), whole, (cols, rows), Some(ResampleAlg::Average))
            .map_err(|e| self.unreadable(e))?;
        let nodata = band.no_data_value().unwrap_or(f64::NAN);
        let values = read.to_array().map_err(|e| self.unreadable(e))?;
        Ok(values.mapv_into(|v| if v == nodata { f64::NAN } else { v }))
    }
}

/// A directory beside the target that holds everything unfinished, gone when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn beside(target: &Path) -> Result<Self> {
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let directory = target.with_file_name(format!(".{name}.partial-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir(&directory).map_err(|e| Error::io("create", &directory, e))?;
        Ok(Scratch(directory))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A map being written: windows of every band in any order, then [`Cog::finish`].
///
/// Windows go to a tiled GeoTIFF in a scratch directory; finishing copies that to a Cloud-Optimised
/// GeoTIFF (tiled, compressed, with overviews), reads the copy back, compares it with what was
/// written, and renames it to its target. Old GDAL does not report every failed write, so the
/// comparison is what tells a full disk from a whole map. Dropped before that, nothing is left.
pub struct Cog {
    target: PathBuf,
    grid: Grid,
    bands: Vec<Band>,
    tags: Vec<(String, String)>,
    raw: Dataset,
    written: usize,
    digest: u64,
    scratch: Scratch,
}

impl Cog {
    /// Starts a one-band float32 map of `grid`, its no-data value NaN.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Input`] if the disk refuses.
    pub fn create(
        path: &Path,
        grid: &Grid,
        band: &Band,
        tags: &[(String, String)],
    ) -> Result<Self> {
        Self::of_bands(path, grid, std::slice::from_ref(band), tags)
    }

    /// Starts a float32 map of `grid` with these bands, as [`Cog::create`].
    ///
    /// # Errors
    /// As [`Cog::create`].
    pub fn of_bands(
        path: &Path,
        grid: &Grid,
        bands: &[Band],
        tags: &[(String, String)],
    ) -> Result<Self> {
        prepare();
        let scratch = Scratch::beside(path)?;
        let options = CslStringList::from_iter([
            "TILED=YES",
            &format!("BLOCKXSIZE={BLOCK}"),
            &format!("BLOCKYSIZE={BLOCK}"),
            "INTERLEAVE=BAND",
            "BIGTIFF=IF_SAFER",
        ]);
        let raw = DriverManager::get_driver_by_name("GTiff")?
            .create_with_band_type_with_options::<f32, _>(
                scratch.0.join("raw.tif"),
                grid.cols,
                grid.rows,
                bands.len(),
                &options,
            )
            .map_err(|e| unwritten(path, e))?;
        let geometry = Grid { valid: None, ..grid.clone() };
        Ok(Cog {
            target: path.to_path_buf(),
            grid: geometry,
            bands: bands.to_vec(),
            tags: tags.to_vec(),
            raw,
            written: 0,
            digest: 0,
            scratch,
        })
    }

    /// Writes one window of the first band, row-major; NaN where there is no data. Each pixel is written
    /// once.
    ///
    /// # Errors
    /// [`Error::Axis`] if `values` do not fill the window; [`Error::Input`] if the disk refuses.
    pub fn write(&mut self, window: Window, values: &[f32]) -> Result<()> {
        self.write_band(window, 0, values)
    }

    /// The same of any band, counted from 0.
    ///
    /// # Errors
    /// As [`Cog::write`].
    pub fn write_band(&mut self, window: Window, band: usize, values: &[f32]) -> Result<()> {
        if values.len() != window.len() {
            return Err(Error::axis("values and pixels of a window", values.len(), window.len()));
        }
        let size = (window.cols, window.rows);
        self.digest = self.digest.wrapping_add(digest(&self.grid, window, band, values));
        self.written += values.len();
        let mut buffer = Buffer::new(size, values.to_vec());
        self.raw
            .rasterband(band + 1)
            .and_then(|mut band| band.write(offset(window), size, &mut buffer))
            .map_err(|e| unwritten(&self.target, e))
    }

    /// Makes the Cloud-Optimised GeoTIFF and gives it its name, whole.
    ///
    /// # Errors
    /// [`Error::Axis`] if a window was left out; [`Error::Input`] or [`Error::Io`] if the disk
    /// refuses, also where it did so silently.
    pub fn finish(self) -> Result<PathBuf> {
        let Cog { target, grid, bands, tags, raw, written, digest: expected, scratch } = self;
        if written != bands.len() * grid.len() {
            let whole = bands.len() * grid.len();
            return Err(Error::axis("pixels written and pixels of the grid", written, whole));
        }
        let fail = |e| unwritten(&target, e);
        raw.close().map_err(fail)?;
        let (vrt, cog) = (scratch.0.join("map.vrt"), scratch.0.join("map.tif"));
        std::fs::write(&vrt, describe(&grid, &bands, &tags))
            .map_err(|e| Error::io("write", &target, e))?;
        let options = CslStringList::from_iter([
            "COMPRESS=DEFLATE",
            "PREDICTOR=YES",
            &format!("BLOCKSIZE={BLOCK}"),
            "OVERVIEW_RESAMPLING=AVERAGE",
            "BIGTIFF=IF_SAFER",
            &format!("NUM_THREADS={}", compressors()),
        ]);
        Dataset::open(&vrt)
            .and_then(|d| d.create_copy(&DriverManager::get_driver_by_name("COG")?, &cog, &options))
            .and_then(Dataset::close)
            .map_err(fail)?;
        if reread(&cog, &grid, bands.len()).map_err(fail)? != expected {
            return Err(unwritten(&target, "the file does not hold what was written to it"));
        }
        let file = std::fs::File::open(&cog).map_err(|e| Error::io("read", &target, e))?;
        file.sync_all().map_err(|e| Error::io("write", &target, e))?;
        std::fs::rename(&cog, &target).map_err(|e| Error::io("rename to", &target, e))?;
        Ok(target)
    }
}

fn unwritten(path: &Path, reason: impl std::fmt::Display) -> Error {
    Error::input("a map could not be written whole")
        .fact("file", path.display())
        .fact("reason", reason)
        .try_this("see whether that disk is full, or write elsewhere with --out")
}

/// A sum over the pixels of a band, counted from 0, that does not depend on the order of windows
/// (splitmix64 of place and bits).
fn digest(grid: &Grid, window: Window, band: usize, values: &[f32]) -> u64 {
    values.iter().enumerate().fold(0, |sum: u64, (i, v)| {
        let place = (window.row + i / window.cols) * grid.cols + window.col + i % window.cols;
        let place = place.wrapping_add(band.wrapping_mul(grid.len()));
        let bits = if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() };
        let mut z = ((place as u64) << 32 ^ u64::from(bits)).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        sum.wrapping_add(z ^ (z >> 31))
    })
}

fn reread(path: &Path, grid: &Grid, bands: usize) -> gdal::errors::Result<u64> {
    let data = Dataset::open(path)?;
    let mut sum = 0u64;
    for window in grid.windows(1024) {
        let size = (window.cols, window.rows);
        for band in 0..bands {
            let values =
                data.rasterband(band + 1)?.read_as::<f32>(offset(window), size, size, None)?;
            sum = sum.wrapping_add(digest(grid, window, band, values.data()));
        }
    }
    Ok(sum)
}

/// A raster of many bands on one grid, written tile by tile with every band of each: a tiled,
/// compressed GeoTIFF whose blocks are the tiles, so that each is compressed once.
///
/// Like [`Cog`], it is read back and compared before it gets its name, and leaves nothing where it is
/// dropped before that.
pub struct Stack {
    target: PathBuf,
    grid: Grid,
    tile: usize,
    bands: usize,
    raw: Dataset,
    written: usize,
    digest: u64,
    scratch: Scratch,
}

impl Stack {
    /// Starts a float32 raster of `grid` with these bands, its no-data value NaN, for tiles of `tile`
    /// pixels: a multiple of 16.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Input`] if the disk refuses.
    pub fn create(
        path: &Path,
        grid: &Grid,
        bands: &[Band],
        tags: &[(String, String)],
        tile: usize,
    ) -> Result<Self> {
        prepare();
        let scratch = Scratch::beside(path)?;
        let options = CslStringList::from_iter([
            "TILED=YES",
            &format!("BLOCKXSIZE={tile}"),
            &format!("BLOCKYSIZE={tile}"),
            "INTERLEAVE=BAND",
            "COMPRESS=DEFLATE",
            "PREDICTOR=3",
            "ZLEVEL=1",
            "BIGTIFF=IF_SAFER",
            &format!("NUM_THREADS={}", compressors()),
        ]);
        let start = || -> gdal::errors::Result<Dataset> {
            let file = scratch.0.join("stack.tif");
            let mut raw = DriverManager::get_driver_by_name("GTiff")?
                .create_with_band_type_with_options::<f32, _>(
                    file,
                    grid.cols,
                    grid.rows,
                    bands.len(),
                    &options,
                )?;
            let ([west, north], [dx, dy]) = (grid.origin, grid.pixel);
            raw.set_geo_transform(&[west, dx, 0.0, north, 0.0, dy])?;
            raw.set_projection(grid.crs.wkt())?;
            for (key, value) in tags {
                raw.set_metadata_item(key, value, "")?;
            }
            for (i, band) in bands.iter().enumerate() {
                let mut raster = raw.rasterband(i + 1)?;
                raster.set_no_data_value(Some(f64::NAN))?;
                raster.set_description(&band.description)?;
            }
            Ok(raw)
        };
        let raw = start().map_err(|e| unwritten(path, e))?;
        Ok(Stack {
            target: path.to_path_buf(),
            grid: Grid { valid: None, ..grid.clone() },
            tile,
            bands: bands.len(),
            raw,
            written: 0,
            digest: 0,
            scratch,
        })
    }

    /// Writes one window of one band, counted from 0; row-major, NaN where there is no data.
    ///
    /// # Errors
    /// [`Error::Axis`] if `values` do not fill the window; [`Error::Input`] if the disk refuses.
    pub fn write(&mut self, window: Window, band: usize, values: &[f32]) -> Result<()> {
        if values.len() != window.len() {
            return Err(Error::axis("values and pixels of a window", values.len(), window.len()));
        }
        let size = (window.cols, window.rows);
        self.digest = self.digest.wrapping_add(digest(&self.grid, window, band, values));
        self.written += values.len();
        let mut buffer = Buffer::new(size, values.to_vec());
        self.raw
            .rasterband(band + 1)
            .and_then(|mut band| band.write(offset(window), size, &mut buffer))
            .map_err(|e| unwritten(&self.target, e))
    }

    /// Closes the raster, reads it back and gives it its name, whole.
    ///
    /// # Errors
    /// [`Error::Axis`] if a window was left out; [`Error::Input`] or [`Error::Io`] if the disk
    /// refuses, also where it did so silently.
    pub fn finish(self) -> Result<PathBuf> {
        let Stack { target, grid, tile, bands, raw, written, digest: expected, scratch } = self;
        if written != bands * grid.len() {
            let whole = bands * grid.len();
            return Err(Error::axis("pixels written and pixels of all bands", written, whole));
        }
        let file = scratch.0.join("stack.tif");
        let read = || -> gdal::errors::Result<u64> {
            raw.close()?;
            let data = Dataset::open(&file)?;
            let mut sum = 0u64;
            for window in grid.windows(tile) {
                for i in 0..bands {
                    let size = (window.cols, window.rows);
                    let values =
                        data.rasterband(i + 1)?.read_as::<f32>(offset(window), size, size, None)?;
                    sum = sum.wrapping_add(digest(&grid, window, i, values.data()));
                }
            }
            Ok(sum)
        };
        if read().map_err(|e| unwritten(&target, e))? != expected {
            return Err(unwritten(&target, "the file does not hold what was written to it"));
        }
        let whole = std::fs::File::open(&file).map_err(|e| Error::io("read", &target, e))?;
        whole.sync_all().map_err(|e| Error::io("write", &target, e))?;
        std::fs::rename(&file, &target).map_err(|e| Error::io("rename to", &target, e))?;
        Ok(target)
    }
}

/// The raw raster with its place, words and units, as the XML of a GDAL virtual raster: the one way
/// to set a band's unit without unsafe code.
fn describe(grid: &Grid, bands: &[Band], tags: &[(String, String)]) -> String {
    let escape = |text: &str| {
        text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
    };
    let (cols, rows) = (grid.cols, grid.rows);
    let ([west, north], [dx, dy]) = (grid.origin, grid.pixel);
    let mut xml = format!("<VRTDataset rasterXSize=\"{cols}\" rasterYSize=\"{rows}\">\n");
    let mut line = |text: String| writeln!(xml, "{text}").expect("writing to a string");
    line(format!("<SRS>{}</SRS>", escape(grid.crs.wkt())));
    // `{:?}` of an f64 is the shortest text that reads back to the same bits.
    line(format!("<GeoTransform>{west:?}, {dx:?}, 0, {north:?}, 0, {dy:?}</GeoTransform>"));
    line("<Metadata><MDI key=\"AREA_OR_POINT\">Area</MDI>".into());
    for (key, value) in tags {
        line(format!("<MDI key=\"{}\">{}</MDI>", escape(key), escape(value)));
    }
    line("</Metadata>".into());
    for (i, band) in (1..).zip(bands) {
        line(format!("<VRTRasterBand dataType=\"Float32\" band=\"{i}\">"));
        line(format!("<Description>{}</Description>", escape(&band.description)));
        line(format!("<UnitType>{}</UnitType>", escape(&band.unit)));
        line("<NoDataValue>nan</NoDataValue><ColorInterp>Gray</ColorInterp>".into());
        line(format!(
            "<SimpleSource><SourceFilename relativeToVRT=\"1\">raw.tif</SourceFilename>\
         <SourceBand>{i}</SourceBand>\
         <SourceProperties RasterXSize=\"{cols}\" RasterYSize=\"{rows}\" DataType=\"Float32\" \
         BlockXSize=\"{BLOCK}\" BlockYSize=\"{BLOCK}\"/>\
         <SrcRect xOff=\"0\" yOff=\"0\" xSize=\"{cols}\" ySize=\"{rows}\"/>\
         <DstRect xOff=\"0\" yOff=\"0\" xSize=\"{cols}\" ySize=\"{rows}\"/></SimpleSource>"
        ));
        line("</VRTRasterBand>".into());
    }
    line("</VRTDataset>".into());
    xml
}

/// The polygons of a vector file, moved to the system of a grid.
pub struct Polygons {
    /// The file.
    pub path: PathBuf,
    /// Bounding box, units of the grid's CRS.
    pub extent: Extent,
    shapes: Vec<Geometry>,
}

impl Polygons {
    /// Reads the polygons of the first layer that has some (GeoPackage, GeoJSON, Shapefile, …).
    ///
    /// # Errors
    /// [`Error::Io`] without the file; [`Error::Input`] if there are no polygons, the layer has no
    /// CRS while `crs` is on the globe, or a polygon cannot be moved to `crs`.
    pub fn read(path: &Path, crs: &Crs) -> Result<Self> {
        prepare();
        std::fs::metadata(path).map_err(|e| Error::io("read", path, e))?;
        let refuse = |what: &str| Error::input(what).fact("area", path.display());
        let options =
            DatasetOptions { open_flags: GdalOpenFlags::GDAL_OF_VECTOR, ..Default::default() };
        let data = Dataset::open_ex(path, options).map_err(|e| {
            refuse("the area to clip to cannot be read")
                .fact("GDAL says", e)
                .try_this("give polygons as GeoPackage, GeoJSON or Shapefile")
        })?;
        for mut layer in data.layers() {
            let own = match layer.spatial_ref() {
                Some(reference) => Some(Crs::from_spatial_ref(&reference)?),
                None => None,
            };
            let mut shapes = Vec::new();
            for feature in layer.features() {
                if let Some(shape) = feature.geometry()
                    && matches!(
                        geometry_type_flatten(shape.geometry_type()),
                        Kind::wkbPolygon
                            | Kind::wkbMultiPolygon
                            | Kind::wkbCurvePolygon
                            | Kind::wkbMultiSurface
                            | Kind::wkbGeometryCollection
                    )
                    && !shape.is_empty()
                {
                    shapes.push(shape.clone());
                }
            }
            if shapes.is_empty() {
                continue;
            }
            match own {
                Some(own) if own == *crs || (own.is_local() && crs.is_local()) => {}
                None if crs.is_local() => {}
                None => {
                    return Err(refuse("the area to clip to has no coordinate reference system")
                        .try_this("give it one, for example with ogr2ogr -a_srs EPSG:4326"));
                }
                Some(own) => {
                    let moved = CoordTransform::new(&own.spatial_ref()?, &crs.spatial_ref()?)
                        .and_then(|to| shapes.iter().map(|s| s.transform(&to)).collect());
                    shapes = moved.map_err(|e| {
                        refuse("the area to clip to cannot be moved to the grid's system")
                            .fact("area", own.name())
                            .fact("grid", crs.name())
                            .fact("PROJ says", e)
                            .try_this("cut it down to the region of the map first")
                    })?;
                }
            }
            let boxes: Vec<_> = shapes.iter().map(Geometry::envelope).collect();
            let x: Vec<f64> = boxes.iter().flat_map(|b| [b.MinX, b.MaxX]).collect();
            let y: Vec<f64> = boxes.iter().flat_map(|b| [b.MinY, b.MaxY]).collect();
            let Some(extent) = Extent::of(&x, &y) else {
                return Err(refuse("the area to clip to has coordinates that are not finite"));
            };
            return Ok(Polygons { path: path.to_path_buf(), extent, shapes });
        }
        Err(refuse("the area to clip to has no polygons")
            .try_this("give polygons; lines and points enclose nothing"))
    }

    /// Which pixels of a window have their centre inside a polygon, row-major.
    pub fn cover(&self, grid: &Grid, window: Window) -> Result<Vec<bool>> {
        let mut target = DriverManager::get_driver_by_name("MEM")?.create_with_band_type::<u8, _>(
            "",
            window.cols,
            window.rows,
            1,
        )?;
        let [dx, dy] = grid.pixel;
        let west = grid.origin[0] + window.col as f64 * dx;
        let north = grid.origin[1] + window.row as f64 * dy;
        target.set_geo_transform(&[west, dx, 0.0, north, 0.0, dy])?;
        let ones = vec![1.0; self.shapes.len()];
        let options = RasterizeOptions { all_touched: false, ..Default::default() };
        rasterize(&mut target, &[1], &self.shapes, &ones, Some(options))?;
        let size = (window.cols, window.rows);
        let burnt = target.rasterband(1)?.read_as::<u8>((0, 0), size, size, None)?;
        Ok(burnt.data().iter().map(|&v| v > 0).collect())
    }
}

/// How a raster file is laid out, for tests and for the curious.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// `COG` for a Cloud-Optimised GeoTIFF.
    pub layout: Option<String>,
    /// Compression.
    pub compression: Option<String>,
    /// Width and height of a block, pixels.
    pub block: (usize, usize),
    /// Overviews.
    pub overviews: usize,
    /// The no-data value.
    pub nodata: Option<f64>,
    /// What its band is.
    pub band: Band,
}

impl Raster {
    /// How the file is laid out.
    pub fn layout(&self) -> Result<Layout> {
        let band = self.data.rasterband(1)?;
        Ok(Layout {
            layout: self.data.metadata_item("LAYOUT", "IMAGE_STRUCTURE"),
            compression: self.data.metadata_item("COMPRESSION", "IMAGE_STRUCTURE"),
            block: band.block_size(),
            overviews: usize::try_from(band.overview_count()?).unwrap_or(0),
            nodata: band.no_data_value(),
            band: Band { description: band.description()?, unit: band.unit() },
        })
    }

    /// A metadata item of the whole file.
    pub fn tag(&self, key: &str) -> Option<String> {
        self.data.metadata_item(key, "")
    }
}
