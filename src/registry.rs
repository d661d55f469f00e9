//! Find an entry by name in a plain slice, or suggest the nearest name.

use crate::error::{Error, Result};

/// Something that is registered under a name.
pub trait Named {
    /// The name a user types.
    fn name(&self) -> &str;
    /// One line on what it is and where it comes from.
    fn about(&self) -> &str;
}

/// The entry called `name`.
///
/// # Errors
/// [`Error::Unknown`] with the nearest name if there is none.
pub fn find<'a, T: Named>(kind: &'static str, entries: &'a [T], name: &str) -> Result<&'a T> {
    entries.iter().find(|entry| entry.name() == name).ok_or_else(|| {
        let known: Vec<String> = entries.iter().map(|e| e.name().to_string()).collect();
        Error::Unknown { kind, name: name.to_string(), nearest: nearest(name, &known), known }
    })
}

/// The known name closest to `name`, if it is close enough to be a slip.
///
/// ```
/// let known = ["mean".to_string(), "quantile".to_string()];
/// assert_eq!(isopleth::registry::nearest("quantle", &known), Some("quantile".to_string()));
/// assert_eq!(isopleth::registry::nearest("maen", &known), Some("mean".to_string()));
/// assert_eq!(isopleth::registry::nearest("xyz", &known), None);
/// ```
pub fn nearest(name: &str, known: &[String]) -> Option<String> {
    let likeness = |k: &str| {
        let (a, b) = (name.to_lowercase(), k.to_lowercase());
        // One slip of the finger (a swap, a missing or doubled letter) is always close.
        if a.len() > 2 && strsim::damerau_levenshtein(&a, &b) <= 1 {
            1.0
        } else {
            strsim::jaro_winkler(&a, &b)
        }
    };
    known
        .iter()
        .map(|k| (likeness(k), k))
        .filter(|(similarity, _)| *similarity > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, k)| k.clone())
}
