//! The initramfs images of a system: each is read once, several at the same time, since unpacking is most of the work of an
//! inspection.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use guestdisk::boot::BootFile;
use parking_lot::Mutex;

use super::kernels::Part;
use super::{Initramfs, Kernel};
use crate::initramfs::{self, Limits, Seen};
use crate::view::GuestView;

/// The most initramfs images that are read.
const MOST_INITRDS: usize = 48;
/// Bytes of all initramfs images together when they are unpacked.
const MOST_UNPACKED: u64 = 4 << 30;
/// The most that are read at the same time: a decoder may need 160 MiB.
const MOST_THREADS: usize = 4;

/// What a kernel starts with, all of its images as if they were one, by the images.
pub(super) type Found = Vec<(Vec<BootFile>, Option<Initramfs>)>;

/// What reading the images of a kernel has given.
#[derive(Default)]
struct One {
    found: Option<Initramfs>,
    unpacked: u64,
    problems: Vec<String>,
}

/// Reads what these kernels start with. `known`: what need not be unpacked again.
pub(super) fn read(
    view: &GuestView,
    kernels: &[Kernel],
    known: &[Arc<Seen>],
    problems: &mut Vec<String>,
) -> Found {
    let mut of: Vec<&Kernel> = vec![];
    for kernel in kernels.iter().filter(|kernel| !kernel.initrds.is_empty()) {
        if !of.iter().any(|other| other.initrds == kernel.initrds) {
            of.push(kernel);
        }
    }
    let read = at_once(of.len().min(MOST_INITRDS), |index| one(view, of[index], known));
    let (mut found, mut unpacked) = (vec![], 0_u64);
    let mut read = read.into_iter();
    for kernel in of {
        // Only what is within the limit counts, whatever else the threads have read.
        let one = match read.next().flatten().filter(|_| unpacked < MOST_UNPACKED) {
            Some(one) => one,
            None => One {
                problems: vec![format!(
                    "the initramfs of {} was not read: there are too many",
                    kernel.release
                )],
                ..One::default()
            },
        };
        unpacked = unpacked.saturating_add(one.unpacked);
        problems.extend(one.problems);
        found.push((kernel.initrds.clone(), one.found));
    }
    found
}

/// Calls `work` for every index below `count`, by several threads, and none any more when those in front have unpacked too
/// much.
fn at_once(count: usize, work: impl Fn(usize) -> One + Sync) -> Vec<Option<One>> {
    let done: Mutex<Vec<Option<One>>> = Mutex::new((0..count).map(|_| None).collect());
    let next = AtomicUsize::new(0);
    let worker = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return;
            }
            let before: u64 = done.lock()[..index].iter().flatten().map(|one| one.unpacked).sum();
            if before < MOST_UNPACKED {
                let one = work(index);
                done.lock()[index] = Some(one);
            }
        }
    };
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = processors.min(MOST_THREADS).min(count);
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // Where there can be no more threads, the others do it all.
            let _ = std::thread::Builder::new().spawn_scoped(scope, worker);
        }
        worker();
    });
    done.into_inner()
}

fn one(view: &GuestView, kernel: &Kernel, known: &[Arc<Seen>]) -> One {
    let (mut whole, mut len, mut last) = (initramfs::Archive::default(), 0, 0);
    let mut one = One::default();
    for file in &kernel.initrds {
        let place = view.place_of(file);
        let open = match place.and_then(|place| view.open(&place)) {
            Ok(open) => open,
            Err(error) => {
                one.problems.push(format!("the initramfs {file} cannot be read: {error}"));
                return one;
            }
        };
        let part = Part::new(&open, file.section);
        len += part.left;
        let archive = initramfs::read_knowing(part, &Limits::default(), &initramfs::is_wanted, known);
        if !archive.problem.is_empty() {
            one.problems.push(format!("the initramfs {file} cannot be read to its end: {}", archive.problem));
        }
        one.unpacked += archive.segments.iter().map(|segment| segment.unpacked).sum::<u64>();
        last = whole.members.len();
        whole.segments.extend(archive.segments);
        whole.members.extend(archive.members);
        whole.seen.extend(archive.seen);
        whole.problem = archive.problem;
    }
    // Of what is not an archive, nothing is known.
    one.found = (!whole.segments.is_empty()).then(|| Initramfs {
        module_paths: initramfs::module_paths(&whole.members[last..]),
        ..initramfs::describe(&whole, &kernel.release, len)
    });
    one
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_and_none_is_missing_within_the_limit() {
        let found = at_once(40, |index| One { unpacked: index as u64, ..One::default() });
        let numbers: Vec<_> = found.iter().flatten().map(|one| one.unpacked).collect();
        assert_eq!(numbers, (0..40).collect::<Vec<_>>());
        let large = |index| One { unpacked: if index == 2 { MOST_UNPACKED } else { 1 }, ..One::default() };
        let found = at_once(30, large);
        assert!(found[..3].iter().all(Option::is_some));
        assert!(at_once(0, |_| One::default()).is_empty());
    }
}
