//! LUKS2 volumes for tests: whole ones, and headers with whatever JSON a test wants.

use base64ct::{Base64, Encoding as _};

use super::json::Kdf;
use super::unlock::derive;
use crate::af;
use crate::cipher::CipherSpec;
use crate::hash::Hash;
use crate::luks::Effort;
use crate::pbkdf2;
use crate::volume::Volume;

const SIZE: usize = 16 << 10;
const KEY_LEN: usize = 64;
/// Where the data begin.
pub const DATA_OFFSET: usize = 512 << 10;
/// The passphrase of [`volume`].
pub const PASSPHRASE: &[u8] = b"pw";

/// Both copies of a header with that JSON and right checksums.
pub fn header(json: &[u8], sequence: u64) -> Vec<u8> {
    let mut both = vec![0; 2 * SIZE];
    for (which, copy) in both.chunks_mut(SIZE).enumerate() {
        copy[..8].copy_from_slice(if which == 0 { b"LUKS\xba\xbe\0\x02" } else { b"SKUL\xba\xbe\0\x02" });
        copy[8..16].copy_from_slice(&(SIZE as u64).to_be_bytes());
        copy[16..24].copy_from_slice(&sequence.to_be_bytes());
        copy[24..28].copy_from_slice(b"name");
        copy[72..78].copy_from_slice(b"sha256");
        copy[168..204].copy_from_slice(b"01234567-89ab-4def-8123-456789abcdef");
        copy[256..264].copy_from_slice(&((which * SIZE) as u64).to_be_bytes());
        let len = json.len().min(SIZE - 4096);
        copy[4096..4096 + len].copy_from_slice(&json[..len]);
        let checksum = Hash::Sha256.digest(&[copy]);
        copy[448..480].copy_from_slice(&checksum);
    }
    both
}

/// The JSON of a volume of one slot, the number of its slot being 0; `None` where the derivation fails.
fn json(kdf: &Kdf, digest: &[u8], salt: &[u8], sector_size: usize) -> String {
    let kdf = match kdf {
        Kdf::Pbkdf2 { hash, iterations, salt } => format!(
            r#"{{"type":"pbkdf2","hash":"{hash}","iterations":{iterations},"salt":"{}"}}"#,
            Base64::encode_string(salt)
        ),
        Kdf::Argon2 { id, time, memory, lanes, salt } => format!(
            r#"{{"type":"argon2i{}","time":{time},"memory":{memory},"cpus":{lanes},"salt":"{}"}}"#,
            if *id { "d" } else { "" },
            Base64::encode_string(salt)
        ),
    };
    format!(
        r#"{{"keyslots":{{"0":{{"type":"luks2","key_size":{KEY_LEN},"af":{{"type":"luks1","stripes":4000,"hash":"sha256"}},
"area":{{"type":"raw","offset":"32768","size":"258048","encryption":"aes-xts-plain64","key_size":64}},"kdf":{kdf}}}}},
"tokens":{{}},"segments":{{"0":{{"type":"crypt","offset":"{DATA_OFFSET}","size":"dynamic","iv_tweak":"0",
"encryption":"aes-xts-plain64","sector_size":{sector_size}}}}},
"digests":{{"0":{{"type":"pbkdf2","keyslots":["0"],"segments":["0"],"hash":"sha256","iterations":1000,
"salt":"{}","digest":"{}"}}}},"config":{{"json_size":"12288","keyslots_size":"491520"}}}}"#,
        Base64::encode_string(salt),
        Base64::encode_string(digest),
    )
}

/// A volume of `len` bytes of data (which read as noise), and its JSON.
///
/// # Panics
/// The derivation refuses its parameters.
pub fn volume(kdf: &Kdf, sector_size: usize, len: usize) -> (Vec<u8>, String) {
    let (key, salt) = ([7; KEY_LEN], [9; 32]);
    let digest = pbkdf2::derive(Hash::Sha256, &key, &salt, 1000, 32);
    let json = json(kdf, &digest, &salt, sector_size);
    let mut bytes = header(json.as_bytes(), 5);
    let mut effort = Effort::UNBOUNDED;
    let slot_key = derive(kdf, 0, PASSPHRASE, 64, &mut effort).expect("parameters that Argon2 has");
    let mut material = af::split(&key, 4000, Hash::Sha256).expect("randomness");
    Volume::new(CipherSpec::DEFAULT, &slot_key).expect("a key of 64 bytes").encrypt(0, material.bytes_mut());
    bytes.extend_from_slice(&material);
    bytes.resize(DATA_OFFSET + len, 0);
    (bytes, json)
}
