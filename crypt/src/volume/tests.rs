//! Published vectors, what OpenSSL makes of the same sectors, and what must be true of any encryption.

use proptest::prelude::*;

use super::*;
use crate::hash::Hash;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn low(number: usize) -> u8 {
    number.to_le_bytes()[0]
}

fn from_hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn spec(algorithm: &str, mode: &str, iv: &str) -> CipherSpec {
    let iv = match iv.split_once(':') {
        Some((_, hash)) => IvGenerator::Essiv(Hash::from_name(hash).unwrap()),
        None if iv == "plain" => IvGenerator::Plain,
        None => IvGenerator::Plain64,
    };
    let algorithm = Algorithm::from_name(algorithm).unwrap();
    CipherSpec { algorithm, mode: Mode::from_name(mode).unwrap(), iv }
}

/// IEEE 1619-2007, annex B, vectors 4 and 10: whole sectors.
#[test]
fn xts_is_the_standards() {
    let both = |algorithm, key: &str, sector, start: &str, end: &str| {
        let volume = Volume::new(spec(algorithm, "xts", "plain64"), &from_hex(key)).unwrap();
        let plain: Vec<u8> = (0..=255).cycle().take(SECTOR).collect();
        let mut data = plain.clone();
        volume.encrypt(sector, &mut data);
        assert_eq!(hex(&data[..32]), start);
        assert_eq!(hex(&data[SECTOR - 16..]), end);
        volume.decrypt(sector, &mut data);
        assert_eq!(data, plain);
    };
    both(
        "aes-128",
        "2718281828459045235360287471352631415926535897932384626433832795",
        0,
        "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c",
        "0a282df920147beabe421ee5319d0568",
    );
    both(
        "aes-256",
        "2718281828459045235360287471352662497757247093699959574966967627\
         3141592653589793238462643383279502884197169399375105820974944592",
        0xff,
        "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
        "c4f36ffda9fcea70b9c6e693e148c151",
    );
}

/// The first half of the SHA-256 of 37 sectors from number 2^32 - 5, encrypted sector by sector with OpenSSL 3.
#[test]
fn sectors_are_what_openssl_makes_of_them() {
    let data: Vec<u8> = (0..37 * SECTOR).map(|i| low(i * i + (i >> 8))).collect();
    let expected = [
        ("aes-128", "xts", "plain", "e4cf9fb83f80f89f95d44abb92991b81"),
        ("aes-128", "xts", "plain64", "e83602b1d4c3ed787882836b28f6ca51"),
        ("aes-128", "xts", "essiv:sha256", "35d4b4c2cd65ed60174380613c29366a"),
        ("aes-128", "xts", "essiv:md5", "3f9270cf3adf8389680cfc7be39f73ef"),
        ("aes-128", "cbc", "plain", "7d23eb558e0672624f2411d454291275"),
        ("aes-128", "cbc", "plain64", "7ffe28f47e53d21e04a4693ddfc9fdc8"),
        ("aes-128", "cbc", "essiv:sha256", "1ecd7b324622db9cf5bdcc6b057e4f86"),
        ("aes-128", "cbc", "essiv:md5", "5a529f23bead0d0679e029f7a59f2b78"),
        ("aes-128", "ctr", "plain", "3fea23e8b97a4d5f4896b4f3033f71a9"),
        ("aes-128", "ctr", "plain64", "16a4d0d32439a84e6351ab129f3780d5"),
        ("aes-128", "ctr", "essiv:sha256", "9669b62acedd4ce5e0ce5b89dcdeefba"),
        ("aes-128", "ctr", "essiv:md5", "4a976e004d0ff0a22d232fc696511ffa"),
        ("aes-128", "ecb", "plain", "196511478873e2712a7b5d12d0ca74c1"),
        ("aes-128", "ecb", "plain64", "196511478873e2712a7b5d12d0ca74c1"),
        ("aes-128", "ecb", "essiv:sha256", "196511478873e2712a7b5d12d0ca74c1"),
        ("aes-128", "ecb", "essiv:md5", "196511478873e2712a7b5d12d0ca74c1"),
        ("aes-192", "cbc", "plain", "d3b414f7c6ad911015854471ec843093"),
        ("aes-192", "cbc", "plain64", "ed4dc57f1cfa1cf0e7fd1129995beea5"),
        ("aes-192", "cbc", "essiv:sha256", "707df50d7ba0f0573e1611842159973c"),
        ("aes-192", "cbc", "essiv:md5", "0f396917f8de4c6650bf2bc2fb29d864"),
        ("aes-192", "ctr", "plain", "345e35b67ad6df7cc6f814e3b0be919f"),
        ("aes-192", "ctr", "plain64", "00efd3cbd306d4aff48ec2f16d0f44ac"),
        ("aes-192", "ctr", "essiv:sha256", "34ac0cedb89c7ca2fdc4d9292a15b588"),
        ("aes-192", "ctr", "essiv:md5", "dae4ee643b86e71a0fc6fa8672d98bdf"),
        ("aes-192", "ecb", "plain", "49c584b3e83f18e42cdd0759170b5665"),
        ("aes-192", "ecb", "plain64", "49c584b3e83f18e42cdd0759170b5665"),
        ("aes-192", "ecb", "essiv:sha256", "49c584b3e83f18e42cdd0759170b5665"),
        ("aes-192", "ecb", "essiv:md5", "49c584b3e83f18e42cdd0759170b5665"),
        ("aes-256", "xts", "plain", "6456c90449b2a9e24e7473823d24ee3a"),
        ("aes-256", "xts", "plain64", "038815354f5ccf86f64b03b466556109"),
        ("aes-256", "xts", "essiv:sha256", "3a98196b21a9244def4b798623ecda5c"),
        ("aes-256", "xts", "essiv:md5", "d4ed99359bd394035951b5c01b1b33c7"),
        ("aes-256", "cbc", "plain", "c0ed9c506f5e6cccfcc65f3baffa97ea"),
        ("aes-256", "cbc", "plain64", "ae7594a5a828dab5db602ce312444bcc"),
        ("aes-256", "cbc", "essiv:sha256", "5c620ba3d996a7182cb98df5e53c9d7f"),
        ("aes-256", "cbc", "essiv:md5", "c01589da64e1137aab9b6eae301215e1"),
        ("aes-256", "ctr", "plain", "4e2fc0651a9216fe2828f6b40ed413a0"),
        ("aes-256", "ctr", "plain64", "04f9cb6ecb64550e8fad7a81a95c53c7"),
        ("aes-256", "ctr", "essiv:sha256", "a6ecd43fa46acfe51493eab166d4d484"),
        ("aes-256", "ctr", "essiv:md5", "507d51f003544e765ce8ddb0c68d5253"),
        ("aes-256", "ecb", "plain", "8686832291e86f8ca359d31aa307aca0"),
        ("aes-256", "ecb", "plain64", "8686832291e86f8ca359d31aa307aca0"),
        ("aes-256", "ecb", "essiv:sha256", "8686832291e86f8ca359d31aa307aca0"),
        ("aes-256", "ecb", "essiv:md5", "8686832291e86f8ca359d31aa307aca0"),
    ];
    for (algorithm, mode, iv, digest) in expected {
        let spec = spec(algorithm, mode, iv);
        let key: Vec<u8> = (0..spec.key_len()).map(|i| low(i * 7 + 3)).collect();
        let volume = Volume::new(spec, &key).unwrap();
        let mut encrypted = data.clone();
        volume.encrypt((1 << 32) - 5, &mut encrypted);
        let found = hex(&Hash::Sha256.digest(&[&encrypted])[..16]);
        assert_eq!(found, digest, "{algorithm} {mode} {iv}");
        volume.decrypt((1 << 32) - 5, &mut encrypted);
        assert!(encrypted == data, "{algorithm} {mode} {iv}");
    }
}

#[test]
fn keys_of_another_length_and_hashes_without_a_cipher_are_refused() {
    let error = |spec: CipherSpec, len| Volume::new(spec, &vec![1; len]).unwrap_err().to_string();
    assert_eq!(error(spec("aes-256", "xts", "plain64"), 62), "Cipher key length 31 should be 32");
    assert_eq!(error(spec("aes-128", "cbc", "plain64"), 0), "Cipher key length 0 should be 16");
    assert_eq!(error(spec("aes-128", "cbc", "essiv:sha1"), 16), "No AES cipher with key size 20 available");
}

#[test]
fn nothing_of_the_key_is_shown() {
    let volume = Volume::new(spec("aes-128", "cbc", "essiv:sha256"), &[77; 16]).unwrap();
    let shown = format!("{volume:?}");
    assert!(!shown.contains("77") && !shown.to_lowercase().contains("4d, 4d"), "{shown}");
}

#[test]
fn the_old_qcow2_key_is_the_start_of_the_passphrase() {
    let encrypt = |passphrase: &[u8]| {
        let mut data = [5; SECTOR];
        Volume::qcow2_aes(passphrase).unwrap().encrypt(9, &mut data);
        data
    };
    assert_eq!(encrypt(b"0123456789abcdef"), encrypt(b"0123456789abcdefgh"));
    assert_eq!(encrypt(b"pw"), encrypt(b"pw\0\0"));
    assert_ne!(encrypt(b"pw"), encrypt(b"pX"));
}

fn any_spec() -> impl Strategy<Value = CipherSpec> {
    let iv = prop_oneof![
        Just(IvGenerator::Plain),
        Just(IvGenerator::Plain64),
        Just(IvGenerator::Essiv(Hash::Sha256)),
    ];
    let algorithm = prop::sample::select(&Algorithm::ALL[..]);
    let mode = prop::sample::select(&Mode::ALL[..]);
    (algorithm, mode, iv).prop_map(|(algorithm, mode, iv)| CipherSpec { algorithm, mode, iv })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// However a request is cut, the sectors come out the same; and they come back.
    #[test]
    fn batches_leave_no_trace(spec in any_spec(), first: u64, sectors in 1usize..50, cut in 0usize..50, seed: u8) {
        let key: Vec<u8> = (0..spec.key_len()).map(|i| low(i * 31) ^ seed).collect();
        let volume = Volume::new(spec, &key).unwrap();
        let data: Vec<u8> = (0..sectors * SECTOR).map(|i| low(i / 7) ^ seed).collect();
        let mut whole = data.clone();
        volume.encrypt(first, &mut whole);
        let mut parts = data.clone();
        let (head, tail) = parts.split_at_mut(cut.min(sectors) * SECTOR);
        volume.encrypt(first, head);
        volume.encrypt(first.wrapping_add((head.len() / SECTOR) as u64), tail);
        prop_assert!(whole == parts);
        prop_assert!(whole != data);
        volume.decrypt(first, &mut whole);
        prop_assert!(whole == data);
    }
}
