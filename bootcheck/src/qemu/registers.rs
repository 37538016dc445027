//! Where the processors stand, from what qemu's monitor prints (`info registers -a`).

use crate::engine::CpuState;

/// Bits of EFER and CR0 (Intel SDM volume 3, 2.2.1 and 2.5).
const EFER_LMA: u64 = 1 << 10;
const CR0_PE: u64 = 1;

/// The processors in the order of the text; what is not in the text is left out.
pub(super) fn parse(text: &str) -> Vec<CpuState> {
    let mut parts: Vec<&str> = text.split("CPU#").collect();
    // In front of the first one there is nothing, unless qemu prints one processor without its number.
    if parts.len() > 1 {
        parts.remove(0);
    }
    parts.into_iter().enumerate().filter_map(|(place, part)| parse_one(place, part)).collect()
}

fn parse_one(place: usize, part: &str) -> Option<CpuState> {
    let rip = value(part, "RIP=").or_else(|| value(part, "EIP="))?;
    let number = part.split_whitespace().next().and_then(|word| word.parse().ok());
    let long = value(part, "EFER=").is_some_and(|efer| efer & EFER_LMA != 0);
    let protected = value(part, "CR0=").is_some_and(|cr0| cr0 & CR0_PE != 0);
    let mode = match (long, protected) {
        (true, _) => "long mode",
        (false, true) => "protected mode",
        (false, false) => "real mode",
    };
    let user = if value(part, "CPL=") == Some(3) { ", user" } else { "" };
    let halted = if value(part, "HLT=") == Some(1) { ", halted" } else { "" };
    Some(CpuState {
        index: number.or_else(|| u8::try_from(place).ok())?,
        rip,
        mode: format!("{mode}{user}{halted}"),
        code: vec![],
    })
}

/// The hexadecimal number behind `name`.
fn value(text: &str, name: &str) -> Option<u64> {
    let start = text.find(name)? + name.len();
    let digits: String = text[start..].chars().take_while(char::is_ascii_hexdigit).collect();
    u64::from_str_radix(&digits, 16).ok()
}

/// The bytes of `x /16xb ADDRESS`: lines of `address: 0x0f 0x0b ..`.
pub(super) fn bytes(text: &str) -> Vec<u8> {
    let words =
        text.lines().filter_map(|line| line.split_once(": ")).flat_map(|(_, rest)| rest.split_whitespace());
    words.filter_map(|word| u8::from_str_radix(word.trim_start_matches("0x"), 16).ok()).take(16).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\r\nCPU#0\r\nRAX=ffffffffffffffda RBX=0 \r\nRIP=ffffffff81a2b3c4 RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1\r\nES =0000 \r\nCR0=80050033 CR2=0 CR3=1 CR4=2\r\nEFER=0000000000000d01\r\n\r\nCPU#1\r\nEAX=0\r\nEIP=0000fff0 EFL=00000002 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=0\r\nCR0=60000010 CR2=0\r\nEFER=0000000000000000\r\n";

    #[test]
    fn processors_are_read() {
        let cpus = parse(TEXT);
        assert_eq!(cpus.len(), 2);
        assert_eq!((cpus[0].index, cpus[0].rip), (0, 0xffff_ffff_81a2_b3c4));
        assert_eq!(cpus[0].mode, "long mode, halted");
        assert_eq!((cpus[1].index, cpus[1].rip, &*cpus[1].mode), (1, 0xfff0, "real mode"));
        assert_eq!(parse("nothing of that kind"), []);
        assert_eq!(parse(""), []);
    }

    #[test]
    fn code_is_read() {
        let text = "ffffffff81000000: 0x0f 0x0b 0xf4\r\nffffffff81000008: 0xc3\r\nCannot access memory\r\n";
        assert_eq!(bytes(text), [0x0f, 0x0b, 0xf4, 0xc3]);
    }
}
