//! For which machine a program is (System V ABI, "ELF Header").

/// As `uname -m` calls it; empty if it is no ELF file or one of an unknown machine.
pub(super) fn machine(head: &[u8]) -> &'static str {
    let (Some(b"\x7fELF"), Some([class, order]), Some([first, second])) =
        (head.get(..4), head.get(4..6), head.get(18..20))
    else {
        return "";
    };
    let is_big = *order == 2;
    let machine = if is_big { [*first, *second] } else { [*second, *first] };
    match (u16::from_be_bytes(machine), *class) {
        (3, _) => "i686",
        (62, _) => "x86_64",
        (183, _) => "aarch64",
        (40, _) => "armv7l",
        (21, _) if is_big => "ppc64",
        (21, _) => "ppc64le",
        (20, _) => "ppc",
        (22, 2) => "s390x",
        (22, _) => "s390",
        (243, 2) => "riscv64",
        (258, _) => "loongarch64",
        (8, 2) => "mips64",
        (8, _) => "mips",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines() {
        let head = |class, order, machine: [u8; 2]| {
            let mut head = vec![0; 20];
            head[..4].copy_from_slice(b"\x7fELF");
            (head[4], head[5], head[18], head[19]) = (class, order, machine[0], machine[1]);
            head
        };
        assert_eq!(machine(&head(2, 1, [62, 0])), "x86_64");
        assert_eq!(machine(&head(2, 2, [0, 22])), "s390x");
        assert_eq!(machine(&head(2, 1, [21, 0])), "ppc64le");
        assert_eq!(machine(&head(1, 1, [3, 0])), "i686");
        assert_eq!(machine(b"#!/bin/sh"), "");
        assert_eq!(machine(b""), "");
        assert_eq!(machine(&head(2, 1, [62, 0])[..19]), "");
    }
}
