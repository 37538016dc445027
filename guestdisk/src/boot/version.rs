//! The order of versions (UAPI.10, "Version Format Specification"): 6.1.0-18 is older than 6.1.0-22, and 6.1~rc1 than 6.1.

use std::cmp::Ordering;

/// Compares two versions.
pub(super) fn compare(one: &str, other: &str) -> Ordering {
    let (mut one, mut other) = (one.as_bytes(), other.as_bytes());
    loop {
        (one, other) = (skip_others(one), skip_others(other));
        let (first, second) = (one.first().copied(), other.first().copied());
        // What is before a release.
        if first == Some(b'~') || second == Some(b'~') {
            match (first == Some(b'~'), second == Some(b'~')) {
                (true, true) => {
                    (one, other) = (&one[1..], &other[1..]);
                    continue;
                }
                (true, false) => return Ordering::Less,
                _ => return Ordering::Greater,
            }
        }
        let (Some(first), Some(second)) = (first, second) else {
            return one.len().min(1).cmp(&other.len().min(1));
        };
        for separator in *b"-^." {
            match (first == separator, second == separator) {
                (true, false) => return Ordering::Less,
                (false, true) => return Ordering::Greater,
                _ => {}
            }
        }
        if b"-^.".contains(&first) {
            (one, other) = (&one[1..], &other[1..]);
            continue;
        }
        let digits = first.is_ascii_digit() || second.is_ascii_digit();
        let (mine, rest) = split(one, digits);
        let (theirs, other_rest) = split(other, digits);
        let order = if digits { numbers(mine, theirs) } else { mine.cmp(theirs) };
        if order != Ordering::Equal {
            return order;
        }
        (one, other) = (rest, other_rest);
    }
}

fn skip_others(text: &[u8]) -> &[u8] {
    let known = |byte: &u8| byte.is_ascii_alphanumeric() || b"-~^.".contains(byte);
    &text[text.iter().position(known).unwrap_or(text.len())..]
}

/// The digits, or the letters, in front and what follows.
fn split(text: &[u8], digits: bool) -> (&[u8], &[u8]) {
    let belongs = |byte: &u8| if digits { byte.is_ascii_digit() } else { byte.is_ascii_alphabetic() };
    text.split_at(text.iter().position(|byte| !belongs(byte)).unwrap_or(text.len()))
}

fn numbers(one: &[u8], other: &[u8]) -> Ordering {
    let significant =
        |digits: &'_ [u8]| digits.iter().position(|digit| *digit != b'0').unwrap_or(digits.len());
    let (one, other) = (&one[significant(one)..], &other[significant(other)..]);
    one.len().cmp(&other.len()).then_with(|| one.cmp(other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_the_specification() {
        let rising = [
            "~1",
            "",
            "ab",
            "abb",
            "abc",
            "0001",
            "002",
            "12",
            "122",
            "122.9",
            "123~rc1",
            "123",
            "123-a",
            "123-a.1",
            "123-a1",
            "123-a1.1",
            "123-3",
            "123-3.1",
            "123^patch1",
            "123^1",
            "123.a-1",
            "123.1-1",
            "123a-1",
            "124",
        ];
        for (index, one) in rising.iter().enumerate() {
            for (at, other) in rising.iter().enumerate() {
                assert_eq!(compare(one, other), index.cmp(&at), "{one} {other}");
            }
        }
        assert_eq!(compare("vmlinuz-6.1.0-18-amd64", "vmlinuz-6.1.0-9-amd64"), Ordering::Greater);
        assert_eq!(compare("1_2", "1+2"), Ordering::Equal);
    }
}
