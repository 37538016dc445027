//! Units of quantities: OVF's (DSP0004, annex C) and libvirt's.

/// How many bytes a unit of OVF has: `byte * 2^30`, `byte*10^9`, and the words of older descriptions (`MegaBytes`).
/// `None`: it is not known.
pub(crate) fn of_ovf(unit: &str) -> Option<u64> {
    let unit = unit.trim().to_ascii_lowercase();
    let mut factors = unit.split('*').map(str::trim);
    let base = word(factors.next()?)?;
    factors.try_fold(base, |product, factor| product.checked_mul(factor_of(factor)?))
}

/// `2^30`, `1024`.
fn factor_of(factor: &str) -> Option<u64> {
    match factor.split_once('^') {
        Some((base, exponent)) => base.trim().parse::<u64>().ok()?.checked_pow(exponent.trim().parse().ok()?),
        None => factor.parse().ok(),
    }
}

fn word(word: &str) -> Option<u64> {
    Some(match word {
        "byte" | "bytes" | "b" => 1,
        "kilobytes" | "kilobyte" | "kb" | "kib" => 1 << 10,
        "megabytes" | "megabyte" | "mb" | "mib" => 1 << 20,
        "gigabytes" | "gigabyte" | "gb" | "gib" => 1 << 30,
        "terabytes" | "terabyte" | "tb" | "tib" => 1 << 40,
        _ => return None,
    })
}

/// How many bytes a unit of libvirt has; `KB` and the like count in thousands there. `None`: it is not known.
pub(crate) fn of_libvirt(unit: &str) -> Option<u64> {
    Some(match unit.trim() {
        "b" | "bytes" => 1,
        "KB" => 1000,
        "k" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "TB" => 1_000_000_000_000,
        "T" | "TiB" => 1 << 40,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_of_ovf() {
        for (unit, bytes) in [
            ("byte", 1),
            ("byte * 2^20", 1 << 20),
            ("byte*2^30", 1 << 30),
            ("byte * 10^9", 1_000_000_000),
            ("byte * 1024 * 1024", 1 << 20),
            ("MegaBytes", 1 << 20),
            ("GigaBytes", 1 << 30),
        ] {
            assert_eq!(of_ovf(unit), Some(bytes), "{unit}");
        }
        for unit in ["", "hertz * 10^6", "byte * 2^99", "byte * 2^-1", "byte ^ 2", "byte * 2^40 * 2^40"] {
            assert_eq!(of_ovf(unit), None, "{unit}");
        }
    }

    #[test]
    fn units_of_libvirt() {
        assert_eq!(
            (of_libvirt("KiB"), of_libvirt("KB"), of_libvirt("G")),
            (Some(1024), Some(1000), Some(1 << 30))
        );
        assert_eq!(of_libvirt("furlong"), None);
    }
}
