//! Laws of single numbers: length scale, sill, nugget, mean, trials.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, MapAccess, Visitor, value::MapAccessDeserializer},
};

use crate::{
    error::{Error, Result},
    rng::Stream,
};

/// A law, as written in a recipe: `0.3`, `{ log-uniform = [0.05, 1.5] }`, `{ normal = [0, 1] }`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Named {
    /// Uniform on [low, high].
    Uniform([f64; 2]),
    /// Log-uniform on [low, high], both positive.
    LogUniform([f64; 2]),
    /// Normal with mean and standard deviation.
    Normal([f64; 2]),
    /// Beta with shapes a and b.
    Beta([f64; 2]),
}

/// A constant or a law.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Law {
    /// Always this number.
    Fixed(f64),
    /// A named law.
    Law(Named),
}

/// By hand, since serde's untagged enums swallow what was wrong: a misspelt law must be named.
impl<'de> Deserialize<'de> for Law {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Law;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a number, or a law such as { uniform = [0.1, 0.5] }")
            }
            fn visit_f64<E: de::Error>(self, value: f64) -> std::result::Result<Law, E> {
                Ok(Law::Fixed(value))
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> std::result::Result<Law, E> {
                Ok(Law::Fixed(value as f64))
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> std::result::Result<Law, E> {
                Ok(Law::Fixed(value as f64))
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> std::result::Result<Law, A::Error> {
                Named::deserialize(MapAccessDeserializer::new(map)).map(Law::Law)
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

impl Law {
    /// Log-uniform on [low, high].
    pub const fn log_uniform(low: f64, high: f64) -> Self {
        Law::Law(Named::LogUniform([low, high]))
    }

    /// Uniform on [low, high].
    pub const fn uniform(low: f64, high: f64) -> Self {
        Law::Law(Named::Uniform([low, high]))
    }

    /// One draw.
    pub fn draw(&self, rng: &mut Stream) -> f64 {
        match *self {
            Law::Fixed(v) => v,
            Law::Law(Named::Uniform([a, b])) => rng.uniform(a, b),
            Law::Law(Named::LogUniform([a, b])) => rng.log_uniform(a, b),
            Law::Law(Named::Normal([m, s])) => m + s * rng.normal(),
            Law::Law(Named::Beta([a, b])) => rng.beta(a, b),
        }
    }

    /// Checks ranges; with `positive`, also that every draw is positive.
    ///
    /// # Errors
    /// [`Error::Input`] for an empty range, a negative spread, or a law that can go below zero
    /// where only positive numbers make sense.
    pub fn check(&self, name: &str, positive: bool) -> Result<()> {
        let bad = |what: &str, help: &str| {
            Err(Error::input(format!("`{name}` {what}"))
                .fact("written", format!("{self:?}"))
                .try_this(help))
        };
        let numbers: Vec<f64> = match *self {
            Law::Fixed(v) => vec![v],
            Law::Law(
                Named::Uniform(p) | Named::LogUniform(p) | Named::Normal(p) | Named::Beta(p),
            ) => p.to_vec(),
        };
        if numbers.iter().any(|v| !v.is_finite()) {
            return bad("is not finite", "write ordinary numbers");
        }
        match *self {
            Law::Law(Named::Uniform([a, b]) | Named::LogUniform([a, b])) if a >= b => {
                bad("has an empty range", "write the smaller number first")
            }
            Law::Law(Named::LogUniform([a, _])) if a <= 0.0 => {
                bad("is log-uniform from zero or below", "start above 0")
            }
            Law::Law(Named::Normal([_, s])) if s < 0.0 => {
                bad("has a negative standard deviation", "write a positive one")
            }
            Law::Law(Named::Beta([a, b])) if a <= 0.0 || b <= 0.0 => {
                bad("has a beta shape that is not positive", "write positive shapes")
            }
            Law::Fixed(v) if positive && v <= 0.0 => {
                bad("must be positive", "variances, sds and lengths are above 0")
            }
            Law::Law(Named::Uniform([a, _])) if positive && a < 0.0 => {
                bad("can be negative", "variances, sds and lengths are above 0")
            }
            Law::Law(Named::Normal(_)) if positive => {
                bad("can be negative", "use uniform or log-uniform here")
            }
            _ => Ok(()),
        }
    }
}

impl Law {
    /// Checks that every draw is a share.
    ///
    /// # Errors
    /// [`Error::Input`] for a law that can leave [0, 1].
    pub fn check_share(&self, name: &str) -> Result<()> {
        self.check(name, false)?;
        let inside = |v: f64| (0.0..=1.0).contains(&v);
        let sound = match *self {
            Law::Fixed(v) => inside(v),
            Law::Law(Named::Uniform([a, b]) | Named::LogUniform([a, b])) => inside(a) && inside(b),
            Law::Law(Named::Beta(_)) => true,
            Law::Law(Named::Normal(_)) => false,
        };
        if sound {
            return Ok(());
        }
        Err(Error::input(format!("`{name}` is a share, and can leave 0 to 1"))
            .fact("written", format!("{self:?}"))
            .try_this("write for example { uniform = [0, 1] } or { beta = [2, 2] }"))
    }
}

/// A chance that must lie in [0, 1].
///
/// # Errors
/// [`Error::Input`] otherwise.
pub fn check_share(name: &str, share: f64) -> Result<()> {
    if (0.0..=1.0).contains(&share) {
        return Ok(());
    }
    Err(Error::input(format!("`{name}` must lie between 0 and 1"))
        .fact("written", share)
        .try_this("write a share such as 0.3"))
}
