//! Every record makes the round trip, no bytes panic, and what is wrong is said in qemu-img's words.

use std::sync::OnceLock;

use proptest::prelude::*;

use super::*;
use crate::luks::{CreateOptions, create};

/// A header of the usual kind, encoded.
fn sample() -> &'static [u8] {
    static SAMPLE: OnceLock<Vec<u8>> = OnceLock::new();
    SAMPLE.get_or_init(|| {
        let options = CreateOptions { iter_time: 0, ..CreateOptions::default() };
        create(&options, b"pw").unwrap().header.encode().unwrap()
    })
}

fn any_text(len: usize) -> impl Strategy<Value = String> {
    prop::string::string_regex(&format!("[a-z0-9:-]{{0,{}}}", len - 1)).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn what_is_written_is_read(
        names in (any_text(32), any_text(32), any_text(32), any_text(40)),
        digest: [u8; 20],
        digest_salt: [u8; 32],
        digest_iterations in 1u32..,
        key_len in 1u32..65,
        slots in prop::collection::vec((any::<bool>(), 1u32.., any::<[u8; 32]>()), SLOTS),
    ) {
        let slots: Vec<_> = slots
            .into_iter()
            .enumerate()
            .map(|(index, (active, iterations, salt))| Slot {
                active, iterations, salt, material_offset: slot_offset(index, key_len.into()),
            })
            .collect();
        let header = Header {
            cipher_name: names.0,
            cipher_mode: names.1,
            hash_spec: names.2,
            uuid: names.3,
            payload_offset: slot_offset(SLOTS, key_len.into()),
            key_len, digest, digest_salt, digest_iterations,
            slots: slots.try_into().unwrap(),
        };
        let bytes = header.encode().unwrap();
        prop_assert_eq!(bytes.len(), HEADER_LEN);
        prop_assert_eq!(Header::parse(&bytes, false).unwrap(), header);
    }

    #[test]
    fn no_bytes_panic(changes in prop::collection::vec((0..HEADER_LEN, any::<u8>()), 0..20), len in 0..=HEADER_LEN) {
        let mut bytes = sample().to_vec();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        for bytes in [&bytes[..], &bytes[..len]] {
            if let Ok(header) = Header::parse(bytes, false) {
                header.info(true);
                let _ = header.spec();
            }
        }
    }
}

/// All of these were said by qemu-img 10.0.2 of such headers.
#[test]
fn what_is_wrong_is_said_in_qemus_words() {
    let good = sample().to_vec();
    let said = |changes: &[(usize, &[u8])]| {
        let mut bytes = good.clone();
        for (at, with) in changes {
            bytes[*at..at + with.len()].copy_from_slice(with);
        }
        let spec = Header::parse(&bytes, false).and_then(|header| header.spec());
        spec.unwrap_err().to_string()
    };
    let zero: &[u8] = &[0; 4];
    let number = |n: u32| n.to_be_bytes();
    assert_eq!(said(&[(0, zero)]), "Volume is not in LUKS format");
    assert_eq!(said(&[(6, &[0, 2])]), "LUKS version 2 is not supported");
    assert_eq!(said(&[(8, &[b'x'; 32])]), "LUKS header cipher name is not NUL terminated");
    assert_eq!(said(&[(40, &[b'x'; 32])]), "LUKS header cipher mode is not NUL terminated");
    assert_eq!(said(&[(72, &[b'x'; 32])]), "LUKS header hash spec is not NUL terminated");
    assert_eq!(said(&[(104, zero), (164, zero)]), "LUKS payload is overlapping with the header");
    assert_eq!(said(&[(104, &number(7))]), "LUKS payload is overlapping with the header");
    assert_eq!(said(&[(104, &number(8))]), "Keyslot 0 is overlapping with the encrypted payload");
    assert_eq!(said(&[(104, &number(4039))]), "Keyslot 7 is overlapping with the encrypted payload");
    assert_eq!(said(&[(108, zero)]), "Algorithm 'aes' with key size 0 bytes not supported");
    assert_eq!(said(&[(108, &number(63))]), "Algorithm 'aes' with key size 31 bytes not supported");
    assert_eq!(said(&[(108, &[255; 4])]), "Keyslot 0 is overlapping with the encrypted payload");
    assert_eq!(said(&[(164, zero), (252, zero)]), "LUKS key iteration count is zero");
    assert_eq!(said(&[(208, zero), (248, zero)]), "Keyslot 0 state (active/disable) is corrupted");
    assert_eq!(said(&[(212, zero), (248, zero)]), "Keyslot 0 iteration count is zero");
    assert_eq!(said(&[(248, &number(7))]), "Keyslot 0 is overlapping with the LUKS header");
    assert_eq!(said(&[(248, &number(512))]), "Keyslots 0 and 1 are overlapping in the header");
    assert_eq!(said(&[(248, &number(u32::MAX))]), "Keyslot 0 is overlapping with the encrypted payload");
    assert_eq!(said(&[(252, zero), (248, zero)]), "Keyslot 0 is corrupted (stripes 0 != 4000)");
    assert_eq!(said(&[(300, &number(1))]), "Keyslot 1 is corrupted (stripes 1 != 4000)");
    assert_eq!(
        said(&[(8, b"foo\0"), (72, b"foo\0")]),
        "Algorithm 'foo' with key size 32 bytes not supported"
    );
    assert_eq!(said(&[(8, b"foo\0"), (40, b"foo\0")]), "Unexpected cipher mode string format 'foo'");
    assert_eq!(said(&[(8, b"foo\0"), (40, b"foo-plain\0")]), "Cipher mode 'foo' not supported");
    assert_eq!(said(&[(40, b"xts-foo\0")]), "IV generator 'foo' not supported");
    assert_eq!(said(&[(40, b"xts-essiv\0\0")]), "Missing IV generator hash specification");
    assert_eq!(said(&[(40, b"xts-essiv:bla\0"), (72, b"foo\0")]), "Hash algorithm 'bla' not supported");
    assert_eq!(said(&[(40, b"xts-essiv:sha1\0")]), "No AES cipher with key size 20 available");
    assert_eq!(said(&[(72, b"whirlpool\0")]), "Hash algorithm 'whirlpool' not supported");
}

/// Offsets that qemu-img 10.0.2 writes.
#[test]
fn the_layout_is_qemus() {
    let layout = |cipher: &'static str, mode: &'static str| {
        let words = [("cipher-alg", cipher), ("cipher-mode", mode)];
        let find = |name: &str| words.iter().find(|(known, _)| *known == name).map(|(_, word)| *word);
        let spec = CreateOptions::from_words(find).unwrap().spec;
        (slot_offset(1, spec.key_len() as u64), area_len(&spec))
    };
    assert_eq!(layout("aes-256", "xts"), (262_144, 2_068_480));
    assert_eq!(layout("aes-192", "xts"), (196_608, 1_544_192));
    assert_eq!(layout("aes-128", "xts"), (135_168, 1_052_672));
    assert_eq!(layout("aes-256", "cbc"), (135_168, 1_052_672));
    assert_eq!(layout("aes-128", "cbc"), (69_632, 528_384));
}

/// qemu-img's words for options of `create`.
#[test]
fn options_are_understood_or_refused_in_qemus_words() {
    let said = |name: &'static str, value: &'static str| {
        CreateOptions::from_words(|asked| (asked == name).then_some(value)).unwrap_err().to_string()
    };
    for name in ["cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg"] {
        assert_eq!(said(name, "foo"), format!("Parameter '{name}' does not accept value 'foo'"));
    }
    assert_eq!(said("cipher-alg", "3des"), "Algorithm '3des' not supported");
    let default = CreateOptions::from_words(|_| None).unwrap();
    assert_eq!(default, CreateOptions::default());
    let essiv = CreateOptions::from_words(|asked| (asked == "ivgen-alg").then_some("essiv")).unwrap();
    assert_eq!(essiv.spec.iv, IvGenerator::Essiv(Hash::Sha256));
}
