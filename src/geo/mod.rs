//! Maps: coordinate reference systems, survey tables, grids, areas, and the frame between world and
//! model.

pub mod areas;
pub mod around;
pub mod covariates;
pub mod cover;
pub mod crs;
pub mod displacement;
pub mod frame;
pub mod geometry;
pub mod geotiff;
pub mod grid;
pub mod people;
pub mod survey;
pub mod table;
pub mod time;
