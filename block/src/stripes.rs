//! Locks on ranges of guest clusters.
//!
//! The mapping of a guest cluster is changed only by a thread that holds the cluster exclusively, and
//! used only while it is held at least shared. That keeps a read or an in-place write from landing in
//! a host cluster that has meanwhile been given to somebody else, without one lock for the whole image:
//! clusters are spread over `STRIPES` locks, and a request takes those of its clusters in ascending
//! order, so that two requests can never wait for each other in a circle.

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// How many locks the clusters of an image share. Enough that 64 threads at random places seldom meet.
const STRIPES: u64 = 128;

/// One lock on a cache line of its own, so that neighbours do not slow each other down.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Stripe(RwLock<()>);

/// The locks of an image.
#[derive(Debug)]
pub struct Stripes(Vec<Stripe>);

/// Clusters held for use.
pub type Shared<'a> = Vec<RwLockReadGuard<'a, ()>>;
/// Clusters held for change.
pub type Exclusive<'a> = Vec<RwLockWriteGuard<'a, ()>>;

impl Default for Stripes {
    fn default() -> Self {
        Self::new()
    }
}

impl Stripes {
    /// None of them held.
    pub fn new() -> Self {
        Self((0..STRIPES).map(|_| Stripe::default()).collect())
    }

    /// The stripes of clusters `first..=last`, in ascending order.
    fn of(&self, first: u64, last: u64) -> impl Iterator<Item = &RwLock<()>> {
        let all = last - first >= STRIPES - 1;
        let (low, high) = (first % STRIPES, last % STRIPES);
        let wrapped = low > high;
        self.0.iter().zip(0..STRIPES).filter_map(move |(stripe, index)| {
            let inside =
                all || if wrapped { index <= high || index >= low } else { (low..=high).contains(&index) };
            inside.then_some(&stripe.0)
        })
    }

    /// Holds clusters `first..=last` for use: they stay where they are.
    pub fn shared(&self, first: u64, last: u64) -> Shared<'_> {
        self.of(first, last).map(RwLock::read).collect()
    }

    /// Holds clusters `first..=last` for change.
    pub fn exclusive(&self, first: u64, last: u64) -> Exclusive<'_> {
        self.of(first, last).map(RwLock::write).collect()
    }

    /// All clusters of the image, for changes to its shape.
    pub fn all(&self) -> Exclusive<'_> {
        self.exclusive(0, u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_takes_the_stripes_of_its_clusters_and_no_others() {
        let stripes = Stripes::new();
        assert_eq!(stripes.of(5, 5).count(), 1);
        assert_eq!(stripes.of(120, 135).count(), 16);
        assert_eq!(stripes.of(0, 127).count(), 128);
        assert_eq!(stripes.of(100, 100 + 128).count(), 128);
        assert_eq!(stripes.of(1, 127).count(), 127);
    }

    #[test]
    fn different_clusters_do_not_exclude_each_other() {
        let stripes = Stripes::new();
        let _held = stripes.exclusive(126, 129);
        assert!(stripes.0[2].0.try_read().is_some());
        assert!(stripes.0[1].0.try_read().is_none());
        assert!(stripes.0[127].0.try_read().is_none());
    }
}
