//! Distance to the nearest site: how far a pixel is from any data.

use super::{Entry, Reads, Scale};

/// `distance`.
pub const ENTRY: Entry = Entry {
    name: "distance",
    about: "distance to the nearest survey site, km, on the survey's plane",
    parameter: None,
    scale: Scale::Distance,
    reads: Reads::Nearest,
    title: |_, _| "Distance to the nearest survey site".into(),
    value: |_, _, km| km,
};
