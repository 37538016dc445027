//! PBKDF2 (RFC 8018): keys from passphrases, slowly; and how slowly on this machine.

use std::thread;
use std::time::Duration;

use block::num::low_u32;
use block::{Error, ErrorKind, Result};
use nix::time::{ClockId, clock_gettime};
use zeroize::Zeroizing;

use crate::hash::Hash;
use crate::secret::Secret;

/// Below this many rounds a thread costs more than it saves.
const WORTH_A_THREAD: u32 = 10_000;
/// How long the machine's speed is measured, in processor time.
const MEASURED: Duration = Duration::from_millis(40);

/// A key of `len` bytes. Each block of a hash's length costs `rounds` rounds; the blocks are computed at the same
/// time, as far as the machine has cores.
pub fn derive(hash: Hash, password: &[u8], salt: &[u8], rounds: u32, len: usize) -> Secret {
    let indices = (1..).take(len.div_ceil(hash.digest_len()));
    let compute = |index| hash.pbkdf2_block(password, salt, rounds, index);
    let mut key = Secret::zeroed(len);
    let mut put = |index: u32, block: &[u8]| {
        let parts = key.bytes_mut().chunks_mut(hash.digest_len());
        for (_, part) in (1..).zip(parts).filter(|(at, _)| *at == index) {
            part.copy_from_slice(&block[..part.len()]);
        }
    };
    if len <= hash.digest_len() || rounds < WORTH_A_THREAD {
        indices.for_each(|index| put(index, &compute(index)));
        return key;
    }
    thread::scope(|scope| {
        let spawn = |index| {
            // The last one has this thread.
            let spawned = thread::Builder::new().spawn_scoped(scope, move || compute(index));
            (index, spawned.ok())
        };
        let running: Vec<_> = indices.map(spawn).collect();
        for (index, running) in running {
            let block: Option<Zeroizing<Vec<u8>>> = running.and_then(|running| running.join().ok());
            // Without a thread to be had, it takes longer.
            put(index, &block.unwrap_or_else(|| compute(index)));
        }
    });
    key
}

/// How many rounds for one block this machine does in a second of one core.
///
/// # Errors
/// The system does not tell the time.
pub fn rounds_per_second(hash: Hash) -> Result<u64> {
    let mut rounds = 1 << 12;
    loop {
        let start = processor_time()?;
        let block = hash.pbkdf2_block(b"password", &[0; 32], rounds, 1);
        std::hint::black_box(&block);
        let taken = processor_time()?.saturating_sub(start);
        if taken >= MEASURED || rounds > 1 << 28 {
            let nanoseconds = taken.as_nanos().max(1);
            let per_second = u128::from(rounds) * 1_000_000_000 / nanoseconds;
            return Ok(u64::try_from(per_second).unwrap_or(u64::MAX));
        }
        rounds *= 2;
    }
}

fn processor_time() -> Result<Duration> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map_err(|errno| Error::new(ErrorKind::Io, format!("Unable to get thread CPU usage: {errno}")))?;
    Ok(time.into())
}

/// `rounds` in 32 bits, at least what LUKS asks for.
pub(crate) fn in_bounds(rounds: u64) -> u32 {
    const LEAST: u64 = 1000;
    low_u32(rounds.clamp(LEAST, u64::from(u32::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// RFC 6070, and RFC 7914 section 11.
    #[test]
    fn keys_are_the_published_ones() {
        let sha1 =
            |password: &[u8], salt: &[u8], rounds, len| hex(&derive(Hash::Sha1, password, salt, rounds, len));
        assert_eq!(sha1(b"password", b"salt", 1, 20), "0c60c80f961f0e71f3a9b524af6012062fe037a6");
        assert_eq!(sha1(b"password", b"salt", 2, 20), "ea6c014dc72d6f8ccd1ed92ace1d41f0d8de8957");
        assert_eq!(sha1(b"password", b"salt", 4096, 20), "4b007901b765489abead49d926f721d065a429c1");
        assert_eq!(
            sha1(b"passwordPASSWORDpassword", b"saltSALTsaltSALTsaltSALTsaltSALTsalt", 4096, 25),
            "3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038"
        );
        assert_eq!(sha1(b"pass\0word", b"sa\0lt", 4096, 16), "56fa6aa75548099dcc37d7f03425e0c3");
        let sha256 =
            |password: &[u8], salt: &[u8], rounds| hex(&derive(Hash::Sha256, password, salt, rounds, 64));
        assert_eq!(
            sha256(b"passwd", b"salt", 1),
            "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc\
             49ca9cccf179b645991664b39d77ef317c71b845b1e30bd509112041d3a19783"
        );
        // Enough rounds for a thread a block.
        assert_eq!(
            sha256(b"Password", b"NaCl", 80000),
            "4ddcd8f60b98be21830cee5ef22701f9641a4418d04c0414aeff08876b34ab56\
             a1d425a1225833549adb841b51c9b3176a272bdebba1d078478f62b397f33c8d"
        );
    }

    #[test]
    fn the_speed_is_measured_and_the_least_is_kept() {
        assert!(rounds_per_second(Hash::Sha256).unwrap() > 1000);
        assert_eq!((in_bounds(0), in_bounds(5000), in_bounds(u64::MAX)), (1000, 5000, u32::MAX));
    }
}
