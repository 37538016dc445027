//! Archives that have been unpacked before, known again by their bytes: after a conversion the same initramfs is looked at
//! again, and what was put behind it is all that is new.
//!
//! What unpacking gives depends on the packed bytes alone where a format says itself where it ends; only such ones are
//! remembered. That they are the same bytes is seen by a cryptographic digest of all of them, never by place or length.

use std::io::{BufRead as _, Read, Result};
use std::sync::Arc;

use block::num::to_usize;

use super::input::Input;
use super::{Compression, Limits, Member, Segment};

/// Bytes by which one is told from most others before anything is digested.
const HEAD: usize = 64;
/// The most bytes of an archive that is remembered: so many are looked at before they are taken.
const MOST_LEN: u64 = 256 << 20;

/// An archive that has been unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    compression: Compression,
    len: u64,
    head: Vec<u8>,
    digest: [u8; 32],
    pub(super) unpacked: u64,
    pub(super) members: Vec<Member>,
}

impl Seen {
    /// What is to be remembered of a segment; `None` if nothing can be. `digest` is that of its bytes, `head` as much as
    /// [`head`] gave of it, and `members` are all of its members, of which `wanted` ones are kept.
    pub(super) fn new(
        segment: &Segment,
        head: Vec<u8>,
        digest: [u8; 32],
        members: &[Member],
        limits: &Limits,
        wanted: &dyn Fn(&str) -> bool,
    ) -> Option<Self> {
        // What a limit kept from being kept need not be left out the next time.
        let is_complete = |member: &Member| {
            let is_kept = member.is_file() && member.len <= limits.file_bytes && wanted(&member.path);
            !is_kept || member.bytes.is_some()
        };
        let fits = segment.len <= MOST_LEN && ends_itself(segment.compression);
        (fits && members.iter().all(is_complete)).then(|| Self {
            compression: segment.compression,
            len: segment.len,
            head: head[..head.len().min(to_usize(segment.len))].to_vec(),
            digest,
            unpacked: segment.unpacked,
            members: members.to_vec(),
        })
    }

    /// Memory that it takes, in bytes, as far as that depends on the archive.
    pub(super) fn memory(&self) -> usize {
        let names = self.members.iter().map(|member| member.path.len() + member.target.len());
        names.sum::<usize>() + self.members.len() * size_of::<Member>()
    }

    /// The segment of these bytes at an offset.
    pub(super) fn segment(&self, offset: u64) -> Segment {
        Segment {
            compression: self.compression,
            offset,
            len: self.len,
            unpacked: self.unpacked,
            members: self.members.len(),
        }
    }
}

/// Whether what follows has no say in where packed bytes end and what they are.
fn ends_itself(compression: Compression) -> bool {
    match compression {
        Compression::None | Compression::Gzip | Compression::Xz | Compression::Bzip2 | Compression::Zstd => {
            true
        }
        Compression::Lzma | Compression::Lz4 | Compression::Lzo => false,
    }
}

/// The first bytes of what comes next.
pub(super) fn head<R: Read>(input: &mut Input<R>) -> Result<Vec<u8>> {
    input.peek(HEAD).map(<[u8]>::to_vec)
}

/// The one of `known` that comes next, which begins with `head`. Nothing is taken.
pub(super) fn next<R: Read>(
    input: &mut Input<R>,
    head: &[u8],
    known: &[Arc<Seen>],
) -> Result<Option<Arc<Seen>>> {
    for seen in known.iter().filter(|seen| head.starts_with(&seen.head)) {
        let len = to_usize(seen.len);
        let bytes = input.peek(len)?;
        if bytes.len() == len && blake3::hash(bytes) == seen.digest {
            return Ok(Some(Arc::clone(seen)));
        }
    }
    Ok(None)
}

/// Takes what [`next`] has found.
pub(super) fn take<R: Read>(input: &mut Input<R>, seen: &Seen) {
    input.consume(to_usize(seen.len));
}

#[cfg(test)]
mod tests {
    use super::super::{Archive, is_wanted, read, read_knowing};
    use super::*;

    fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut archive = cpio::Archive::new();
        for (path, bytes) in files {
            archive.file(path, 0o644, bytes).unwrap();
        }
        archive.finish()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        use std::io::Write as _;
        let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// Microcode, and the rest by zstd.
    fn initramfs() -> Vec<u8> {
        let mut whole = archive(&[("kernel/x86/microcode/x.bin", b"microcode")]);
        whole.resize(whole.len().next_multiple_of(512), 0);
        let files: [(&str, &[u8]); 3] = [
            ("bin/sh", &[7; 100_000]),
            ("conf/param.conf", b"ROOT=/dev/sda1\n"),
            ("lib/modules/1/a.ko", b""),
        ];
        whole.extend(zstd::encode_all(&archive(&files)[..], 1).unwrap());
        whole
    }

    fn with(bytes: &[u8], limits: &Limits, known: &[Arc<Seen>]) -> Archive {
        read_knowing(bytes, limits, &is_wanted, known)
    }

    /// What `bytes` gives when it is unpacked.
    fn fresh(bytes: &[u8], limits: &Limits) -> Archive {
        read(bytes, limits, &is_wanted)
    }

    /// As if there had been other things in what was seen: whoever finds these has not unpacked anything.
    fn marked(seen: &[Arc<Seen>]) -> Vec<Arc<Seen>> {
        let mark = |seen: &Arc<Seen>| {
            let mut other = Seen::clone(seen);
            other.members.iter_mut().for_each(|member| member.path.insert(0, '!'));
            Arc::new(other)
        };
        seen.iter().map(mark).collect()
    }

    fn marks(archive: &Archive) -> usize {
        archive.members.iter().filter(|member| member.path.starts_with('!')).count()
    }

    #[test]
    fn what_was_seen_is_not_unpacked_again_and_what_is_new_is() {
        let limits = Limits::default();
        let old = initramfs();
        let first = with(&old, &limits, &[]);
        assert_eq!((first.seen.len(), first.members.len()), (2, 4));
        let mut new = old.clone();
        new.resize(new.len().next_multiple_of(512), 0);
        new.extend(gzip(&archive(&[("lib/modules/1/b.ko", b"driver"), ("conf/param.conf", b"")])));
        let again = with(&new, &limits, &first.seen);
        let expected = fresh(&new, &limits);
        assert_eq!(
            (&again.segments, &again.members, again.problem.as_str()),
            (&expected.segments, &expected.members, "")
        );
        assert_eq!((again.seen.len(), &again.seen[..2]), (3, &first.seen[..]));
        assert_eq!(marks(&with(&new, &limits, &marked(&first.seen))), 4);
    }

    #[test]
    fn a_single_other_byte_is_something_else() {
        let limits = Limits::default();
        let old = initramfs();
        let known = marked(&with(&old, &limits, &[]).seen);
        // Every byte of the end, behind the head by which they are told apart first.
        for at in old.len() - 40..old.len() {
            let mut new = old.clone();
            new[at] ^= 1;
            let (found, expected) = (with(&new, &limits, &known), fresh(&new, &limits));
            assert_eq!(marks(&found), 1, "only the microcode, at {at}");
            assert_eq!((found.members.len(), found.problem), (expected.members.len(), expected.problem));
        }
        let short = &old[..old.len() - 1];
        assert_eq!(with(short, &limits, &known).problem, fresh(short, &limits).problem);
    }

    #[test]
    fn what_follows_has_a_say_in_lz4() {
        let mut old = 0x184c_2102_u32.to_le_bytes().to_vec();
        let packed = lz4_flex::block::compress(&archive(&[("a", b"b")]));
        old.extend(u32::try_from(packed.len()).unwrap().to_le_bytes());
        old.extend(packed);
        let found = with(&old, &Limits::default(), &[]);
        assert_eq!((found.problem.as_str(), found.members.len(), found.seen.len()), ("", 1, 0));
    }

    #[test]
    fn limits_hold_for_what_is_known_too() {
        let old = initramfs();
        let seen = with(&old, &Limits::default(), &[]).seen;
        for limits in [
            Limits { members: 3, ..Limits::default() },
            Limits { unpacked_bytes: 50_000, ..Limits::default() },
            Limits { all_file_bytes: 3, ..Limits::default() },
        ] {
            let (found, expected) = (with(&old, &limits, &seen), fresh(&old, &limits));
            assert_eq!((found.members, found.problem), (expected.members, expected.problem));
        }
        // What a limit has left out is not remembered as if it were not wanted.
        let tight = Limits { all_file_bytes: 3, ..Limits::default() };
        assert_eq!(with(&old, &tight, &[]).seen.len(), 1);
    }
}
