//! Maps: coordinate reference systems, survey tables, and the frame between world and model.

pub mod crs;
