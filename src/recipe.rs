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
    let message = message.trim();
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    if message.starts_with("unknown field") || message.starts_with("unknown variant") {
        let what = if message.starts_with("unknown field") {
            "setting"
        } else {
            "value"
        };
        let known: Vec<String> = quoted.iter().skip(1).map(|s| s.to_string()).collect();
        let name = quoted.first().copied().unwrap_or("?");
        let help = match registry::nearest(name, &known) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("known: {}", known.join(", ")),
        };
        return Error::input(format!("unknown {what} `{name}` in {place}")).try_this(help);
    }
    Error::input(format!("{place} of the recipe cannot be read"))
        .fact("reason", message.lines().next().unwrap_or(message))
        .try_this("compare with the recipes in models/")
}
