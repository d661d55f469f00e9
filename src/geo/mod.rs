//! Maps: coordinate reference systems, survey tables, grids, and the frame between world and model.

pub mod covariates;
pub mod crs;
pub mod displacement;
pub mod frame;
pub mod geotiff;
pub mod grid;
pub mod survey;
pub mod table;
