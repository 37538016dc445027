//! Sizes as people write and read them, by qemu's rules, which are stranger than they look: a fraction needs
//! a suffix, `0x1b` is 27, `1e6` is refused and `1e` is an exbibyte.

use std::ops::RangeInclusive;

use crate::error::{Error, Result};

/// What a size may be at most: the kernel's file offsets are signed.
pub const MAX: u64 = i64::MAX.unsigned_abs();

/// Why a text is not a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It is not written like a size.
    Syntax,
    /// It is negative or does not fit.
    Range,
}

/// Reads a size in bytes: a decimal number, with an optional fraction, followed by an optional one of
/// `b k K M G T P E`, or a hexadecimal number without a suffix.
///
/// # Errors
/// `Usage`, in qemu's words for an image size.
pub fn parse(text: &str) -> Result<u64> {
    parse_named("image size", text, 0..=MAX)
}

/// Reads a size as [`parse`] does, calling it `name` in messages and insisting on `limits`.
///
/// # Errors
/// `Usage`: `Invalid NAME specified: 'TEXT'.` or `Invalid NAME specified. Must be between A and B.`
pub fn parse_named(name: &str, text: &str, limits: RangeInclusive<u64>) -> Result<u64> {
    match parse_plain(text) {
        Ok(size) if limits.contains(&size) => Ok(size),
        Err(Fault::Syntax) => Err(Error::usage(format!("Invalid {name} specified: '{text}'."))),
        Ok(_) | Err(Fault::Range) => Err(Error::usage(format!(
            "Invalid {name} specified. Must be between {} and {}.",
            limits.start(),
            limits.end()
        ))),
    }
}

/// Reads a size, any that fits into 64 bits, and says only what kind of mistake there is.
///
/// # Errors
/// See [`Fault`].
pub fn parse_plain(text: &str) -> std::result::Result<u64, Fault> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    let unsigned = text.strip_prefix('+').unwrap_or(text);
    if let Some(digits) = unsigned.strip_prefix("0x").or_else(|| unsigned.strip_prefix("0X")) {
        return parse_digits(digits, 16);
    }
    match text.strip_prefix('-') {
        // A negative number is out of range (a pure fraction too); whatever else follows a minus sign is
        // nonsense.
        Some(number) => parse_digits(number.strip_prefix('.').unwrap_or(number), 10).and(Err(Fault::Range)),
        None => parse_decimal(unsigned),
    }
}

/// Reads nothing but digits. Unlike the standard library, no sign.
fn parse_digits(digits: &str, radix: u32) -> std::result::Result<u64, Fault> {
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return Err(Fault::Syntax);
    }
    u64::from_str_radix(digits, radix).map_err(|_| Fault::Range)
}

fn parse_decimal(text: &str) -> std::result::Result<u64, Fault> {
    let (number, factor) = split_suffix(text);
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) => (whole, parse_fraction(fraction)?),
        None => (number, 0.0),
    };
    let whole = match whole {
        // Half a number is one, a lone point is none.
        "" if number.len() > 1 => 0,
        _ => parse_digits(whole, 10)?,
    };
    if fraction > 0.0 && factor == 1 && !rounds_to_one(fraction) {
        return Err(Fault::Syntax);
    }
    let part = scale(fraction, factor);
    whole.checked_mul(factor).and_then(|bytes| bytes.checked_add(part)).ok_or(Fault::Range)
}

/// A fraction so close to 1 that, as a double, it is 1: there are no half bytes in it.
fn rounds_to_one(fraction: f64) -> bool {
    fraction >= 1.0
}

/// The number and the factor that its last letter stands for.
fn split_suffix(text: &str) -> (&str, u64) {
    let factor = match text.chars().next_back() {
        Some('b' | 'B') => 1,
        Some('k' | 'K') => 1 << 10,
        Some('m' | 'M') => 1 << 20,
        Some('g' | 'G') => 1 << 30,
        Some('t' | 'T') => 1 << 40,
        Some('p' | 'P') => 1 << 50,
        Some('e' | 'E') => 1 << 60,
        _ => return (text, 1),
    };
    (&text[..text.len() - 1], factor)
}

/// Reads the digits after the point as a number from 0 to 1.
fn parse_fraction(digits: &str) -> std::result::Result<f64, Fault> {
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Fault::Syntax);
    }
    format!("0.{digits}0").parse().map_err(|_| Fault::Syntax)
}

/// `fraction * factor`, rounded to the nearest byte.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "0 <= fraction <= 1 and factor is a power of two up to 2^60: exact in a double, and in u64"
)]
fn scale(fraction: f64, factor: u64) -> u64 {
    (fraction * factor as f64 + 0.5) as u64
}

/// A size for people: three significant digits and the unit in which the number is below 1000, as in
/// `0.977 KiB`, `64 MiB`, `1.5 TiB`.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}", three_digits(value), UNITS[unit])
}

/// C's `%0.3g` of a number from 0 to below 1024 that is 0 or at least 0.1.
fn three_digits(value: f64) -> String {
    // Rust rounds to the digits asked for exactly as C does: ties to even.
    let scientific = format!("{value:.2e}");
    let exponent = scientific.split_once('e').and_then(|(_, exponent)| exponent.parse::<i32>().ok());
    let fixed = match exponent {
        // Rounded up to 1000: a fourth digit, for which %g changes to the exponential form.
        Some(3..) => return "1e+03".to_owned(),
        Some(2) => format!("{value:.0}"),
        Some(1) => format!("{value:.1}"),
        Some(0) => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    };
    match fixed.contains('.') {
        true => fixed.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => fixed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::num::to_usize;
    use crate::testing::Random;

    /// What `qemu-img create -f raw x TEXT` of version 10.0.2 says to each.
    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        let good: &[(&str, u64)] = &[
            ("1.5k", 1536),
            ("0x10", 16),
            ("0X10", 16),
            ("0x1b", 27),
            ("0x10E", 270),
            ("1K", 1024),
            ("1k", 1024),
            ("1M", 1 << 20),
            ("1G", 1 << 30),
            ("1T", 1 << 40),
            ("1P", 1 << 50),
            ("1E", 1 << 60),
            ("1e", 1 << 60),
            ("1.5e", 3 << 59),
            (" 5", 5),
            ("\t7", 7),
            ("+5", 5),
            (" +0x10", 16),
            ("5.", 5),
            ("5.k", 5120),
            ("5.0", 5),
            ("5.0b", 5),
            ("010", 10),
            ("0.1k", 102),
            ("1.0004k", 1024),
            ("1.0005k", 1025),
            ("0.0004k", 0),
            ("7.9E", 9_108_079_886_394_091_136),
            ("8191P", 8191 << 50),
            ("7.99999999999999E", 9_223_372_036_854_764_288),
            ("7.9999999999999999E", 9_223_372_036_854_775_680),
            (".5k", 512),
            ("+.5k", 512),
            (".0", 0),
            (".0b", 0),
            ("9223372036854775807", MAX),
            ("1.99999999999999999999b", 2),
            ("1.99999999999999999999k", 2048),
        ];
        for &(text, size) in good {
            assert_eq!(parse(text).ok(), Some(size), "{text}");
        }
    }

    #[test]
    fn what_qemu_refuses_is_refused_in_its_words() {
        let syntax = [
            "1e6",
            "0x1k",
            "0x1.8",
            "1.5",
            "1.7b",
            "1kb",
            "5 ",
            "",
            "k",
            "0.5",
            ".5",
            "0x",
            "1.e3",
            "inf",
            "nan",
            "0x1p4",
            "1e0",
            "1.5.5",
            "1,5",
            "0x10G",
            "1.5E3",
            "00x5",
            "1_0",
            "+-5",
            "--5",
            "0x-5",
            "-0x10",
            "-5k",
            "-x",
            "- 5",
            "-1e6",
            "-1.5",
            "0xg",
            ".",
            ".k",
            ".b",
            "-.5k",
            "+",
            "-",
            "1.k2",
            "5.0x",
            "5é",
            "1.9999999999999999",
        ];
        for text in syntax {
            let error = parse(text).unwrap_err();
            assert_eq!(error.message(), format!("Invalid image size specified: '{text}'."));
        }
        let range = [
            "-5",
            "-1",
            "-0",
            "8E",
            "9223372036854775808",
            "18446744073709551616",
            "99999999999999999999999",
            "0x8000000000000000",
            "8589934592G",
            "9007199254740993k",
        ];
        for text in range {
            let expected = "Invalid image size specified. Must be between 0 and 9223372036854775807.";
            assert_eq!(parse(text).unwrap_err().message(), expected, "{text}");
        }
    }

    #[test]
    fn a_name_and_limits_of_ones_own() {
        let error = parse_named("sparse size", "17M", 0..=16 << 20).unwrap_err();
        assert_eq!(error.message(), "Invalid sparse size specified. Must be between 0 and 16777216.");
        assert_eq!(parse_named("sparse size", "16M", 0..=16 << 20).ok(), Some(16 << 20));
    }

    #[test]
    fn sizes_are_shown_as_qemu_shows_them() {
        let shown: &[(u64, &str)] = &[
            (0, "0 B"),
            (1, "1 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10 << 20, "10 MiB"),
            (1000 << 10, "0.977 MiB"),
            (197_120, "192 KiB"),
            (198_144, "194 KiB"),
            (1 << 30, "1 GiB"),
            (3 << 39, "1.5 TiB"),
            (MAX, "8 EiB"),
            (u64::MAX, "16 EiB"),
            (1_023_897, "1e+03 KiB"),
        ];
        for &(bytes, text) in shown {
            assert_eq!(human(bytes), text, "{bytes}");
        }
    }

    /// Runs qemu-img, or says loudly that there is none.
    fn qemu_img(arguments: &[&str]) -> Option<String> {
        match std::process::Command::new("qemu-img").args(arguments).output() {
            Ok(output) => {
                let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
                text.push_str(&String::from_utf8_lossy(&output.stderr));
                Some(text)
            }
            Err(_) => {
                eprintln!("SKIPPED: qemu-img is not installed, sizes are not compared with it");
                None
            }
        }
    }

    #[test]
    fn random_texts_are_read_as_qemu_reads_them() {
        const PARTS: [&str; 24] = [
            "0", "1", "2", "5", "9", "10", "512", "1023", ".", ".", ".5", ".25", ".999", "k", "K", "M", "G",
            "T", "b", "e", "0x", "-", " ", "P",
        ];
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x");
        let mut random = Random::new(1);
        let mut good = 0;
        for _ in 0..150 {
            let count = random.below(3) + 1;
            let text: String = (0..count).map(|_| PARTS[to_usize(random.below(24))]).collect();
            let arguments = ["create", "-f", "raw", file.to_str().unwrap(), "--", &text];
            let Some(said) = qemu_img(&arguments) else { return };
            match parse(&text) {
                Ok(size) => {
                    good += 1;
                    let line = format!("fmt=raw size={size}\n");
                    assert!(said.contains(&line), "{text:?}: {size}, qemu-img says {said}");
                }
                Err(error) => {
                    assert!(said.contains(error.message()), "{text:?}: {error}, qemu-img says {said}");
                }
            }
        }
        assert!(good > 30, "only {good} of the texts were sizes");
    }

    #[test]
    fn random_sizes_are_shown_as_qemu_shows_them() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x");
        let mut random = Random::new(2);
        for _ in 0..60 {
            let bits = random.below(33) + 1;
            let size = (random.below(1 << bits) + 1) * 512;
            std::fs::File::create(&file).unwrap().set_len(size).unwrap();
            let Some(said) = qemu_img(&["info", "-f", "raw", file.to_str().unwrap()]) else { return };
            let line = format!("virtual size: {} ({size} bytes)", human(size));
            assert!(said.contains(&line), "{line}, qemu-img says {said}");
        }
    }
}
