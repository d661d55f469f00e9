//! Reading TOML strictly: an unknown key is an error that names the nearest known one.

use serde::de::DeserializeOwned;

use crate::{
    error::{Error, Result},
    registry,
};

/// Deserialises one table of a recipe.
///
/// # Errors
/// [`Error::Input`] naming the table, the key, and the nearest known key.
pub fn parse_table<T: DeserializeOwned>(place: &str, table: &toml::Table) -> Result<T> {
    T::deserialize(toml::Value::Table(table.clone())).map_err(|e| explain(place, &e.to_string()))
}

/// Turns serde's message about an unknown field or value into ours.
fn explain(place: &str, message: &str) -> Error {
    // The reason, and then where: "in `train.steps`".
    let (reason, place_in) = message.trim().split_once("\nin `").unwrap_or((message.trim(), ""));
    let setting = place_in.trim_end().trim_end_matches('`');
    let at = |error: Error| match setting {
        "" => error,
        setting => error.fact("setting", setting),
    };
    let quoted: Vec<&str> = reason.split('`').skip(1).step_by(2).collect();
    if reason.starts_with("unknown field") || reason.starts_with("unknown variant") {
        let what = if reason.starts_with("unknown field") { "setting" } else { "value" };
        let known: Vec<String> = quoted.iter().skip(1).map(|s| s.to_string()).collect();
        let name = quoted.first().copied().unwrap_or("?");
        let help = match registry::nearest(name, &known) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("known: {}", known.join(", ")),
        };
        return at(Error::input(format!("unknown {what} `{name}` in {place}"))).try_this(help);
    }
    at(Error::input(format!("{place} of the recipe cannot be read")))
        .fact("reason", reason)
        .try_this("compare with the recipes in models/")
}
