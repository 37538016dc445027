//! Words that several descriptions have: addresses, UUIDs, switches.

/// An Ethernet address in lower case with colons. `None`: it is none, or no card can have it.
pub(crate) fn mac(text: &str) -> Option<String> {
    let digits: Vec<u8> = text.trim().bytes().filter(|byte| !matches!(byte, b':' | b'-' | b'.')).collect();
    if digits.len() != 12
        || !digits.iter().all(u8::is_ascii_hexdigit)
        || digits.iter().all(|digit| *digit == b'0')
    {
        return None;
    }
    let pairs: Vec<String> =
        digits.chunks(2).map(|pair| String::from_utf8_lossy(pair).to_ascii_lowercase()).collect();
    // A group address is nobody's own.
    let first = u8::from_str_radix(pairs.first()?, 16).ok()?;
    (first & 1 == 0).then(|| pairs.join(":"))
}

/// A UUID in the usual form, from any spelling with 32 hexadecimal digits. `None`: it is none, or nil.
pub(crate) fn uuid(text: &str) -> Option<String> {
    let skip = |c: &char| !matches!(c, '-' | ' ' | '{' | '}');
    let text = text.trim();
    let digits: String = text.strip_prefix("urn:uuid:").unwrap_or(text).chars().filter(skip).collect();
    if digits.len() != 32 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let digits = digits.to_ascii_lowercase();
    (digits.bytes().any(|byte| byte != b'0')).then(|| hyphened(&digits))
}

/// 32 digits with hyphens.
fn hyphened(digits: &str) -> String {
    let part = |from: usize, to: usize| digits.get(from..to).unwrap_or_default();
    [part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)].join("-")
}

/// The same UUID with its first three fields in the other byte order.
pub(crate) fn swapped(uuid: &str) -> Option<String> {
    let digits: String = uuid.chars().filter(|c| *c != '-').collect();
    let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    let pairs: Option<Vec<&str>> = order.iter().map(|at| digits.get(at * 2..at * 2 + 2)).collect();
    Some(hyphened(&pairs?.concat()))
}

/// A switch, as any of the products spells it.
pub(crate) fn switch(text: &str) -> Option<bool> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" | "enabled" => Some(true),
        "false" | "no" | "off" | "0" | "disabled" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for text in ["00:0C:29:aa:bb:cc", "00-0c-29-AA-BB-CC", "000C29AABBCC", " 00:0c:29:aa:bb:cc "] {
            assert_eq!(mac(text).as_deref(), Some("00:0c:29:aa:bb:cc"), "{text}");
        }
        for text in [
            "",
            "00:00:00:00:00:00",
            "01:0c:29:aa:bb:cc",
            "ff:ff:ff:ff:ff:ff",
            "00:0c:29:aa:bb",
            "no such address",
        ] {
            assert_eq!(mac(text), None, "{text}");
        }
    }

    #[test]
    fn uuids() {
        let usual = "564d8ab5-1234-5678-9abc-def012345678";
        assert_eq!(uuid("56 4d 8a b5 12 34 56 78-9a bc de f0 12 34 56 78").as_deref(), Some(usual));
        assert_eq!(uuid("{564D8AB5-1234-5678-9ABC-DEF012345678}").as_deref(), Some(usual));
        assert_eq!(swapped(usual).as_deref(), Some("b58a4d56-3412-7856-9abc-def012345678"));
        assert_eq!(uuid("00000000-0000-0000-0000-000000000000"), None);
        assert_eq!(uuid("56 4d"), None);
    }
}
