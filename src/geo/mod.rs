//! Maps: coordinate reference systems, survey tables, and the frame between world and model.

pub mod crs;
pub mod geotiff;
pub mod grid;
