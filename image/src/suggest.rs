//! What somebody may have meant who wrote a name that does not exist.

use block::Error;

/// How alike two words have to be (1: the same).
const ALIKE: f64 = 0.8;

/// The candidate that is most like `name`, if one is like it at all.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let likeness = |candidate: &&str| strsim::jaro_winkler(name, candidate);
    candidates
        .into_iter()
        .filter(|candidate| likeness(candidate) >= ALIKE)
        .max_by(|a, b| likeness(a).total_cmp(&likeness(b)))
}

/// Adds to an error about a wrong name which one may have been meant.
#[must_use]
pub fn did_you_mean<'a>(error: Error, name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Error {
    match nearest(name, candidates) {
        Some(meant) => error.hint(format!("did you mean '{meant}'?")),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_recognised_and_strangers_are_not() {
        let names = ["cluster_size", "compat", "lazy_refcounts", "size"];
        assert_eq!(nearest("cluster_sise", names), Some("cluster_size"));
        assert_eq!(nearest("clustersize", names), Some("cluster_size"));
        assert_eq!(nearest("qwx", names), None);
    }
}
