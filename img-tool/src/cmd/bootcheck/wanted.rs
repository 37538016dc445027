//! What the options ask for, and which of them go together.

use block::Error;
use bootcheck::engine::Transport;
use bootcheck::watch::Expectations;
use guestdisk::boot::firmware::Firmware;

use super::{Args, firmware};
use crate::exit::{Failure, Outcome};

/// A mebibyte.
const MIB: u64 = 1 << 20;

/// What the options ask for, understood.
pub(super) struct Wanted {
    pub(super) expectations: Expectations,
    pub(super) memory_bytes: u64,
    pub(super) transport: Transport,
    pub(super) firmware: Option<firmware::Wanted>,
}

impl Wanted {
    /// How often each image is checked, and through which firmware, as far as that is settled.
    pub(super) fn runs(&self) -> Vec<Option<Firmware>> {
        self.firmware.as_ref().map_or_else(|| vec![None], firmware::Wanted::runs)
    }
}

impl Args {
    /// Understands the options, or says which of them make no sense.
    pub(super) fn wanted(&self) -> Outcome<Wanted> {
        let firmware = self.wanted_firmware()?;
        let runs = firmware.as_ref().map_or(1, |firmware| firmware.runs().len());
        if self.filenames.len() > 1 || runs > 1 {
            let single = [
                (self.vars_out.is_some(), "--vars-out"),
                (self.write_to.is_some(), "--write-to"),
                (self.interactive, "--interactive"),
                (!self.disk.is_empty(), "--disk"),
                (self.list_entries, "--list-entries"),
            ];
            if let Some((_, option)) = single.iter().find(|(given, _)| *given) {
                let what = if runs > 1 { "one image and one firmware" } else { "one image" };
                return Err(Failure::usage(format!("{option} is for {what} only")));
            }
        }
        if self.kernel.is_some() && self.entry.is_some() {
            return Err(Failure::usage("--kernel and --entry exclude each other"));
        }
        Ok(Wanted {
            firmware,
            expectations: Expectations::parse(&self.expect, &self.fail, self.ignore_failures)?,
            memory_bytes: self.memory_bytes()?,
            transport: match self.transport.as_str() {
                "pci" => Transport::Pci,
                "mmio" => Transport::Mmio,
                other => {
                    return Err(Failure::usage(format!("--transport expects 'pci' or 'mmio' not '{other}'")));
                }
            },
        })
    }

    /// What `--firmware` asks for; what makes no sense with it, or without it, is a mistake.
    fn wanted_firmware(&self) -> Outcome<Option<firmware::Wanted>> {
        let belongs = [
            (self.firmware_code.is_some(), "--firmware-code"),
            (self.firmware_vars.is_some(), "--firmware-vars"),
            (self.vars_out.is_some(), "--vars-out"),
            (self.add_console, "--add-console"),
        ];
        let Some(text) = &self.firmware else {
            return match belongs.iter().find(|(given, _)| *given) {
                Some((_, option)) => Err(Failure::usage(format!("{option} needs --firmware"))),
                None => Ok(None),
            };
        };
        let excluded = [
            (self.kernel.is_some(), "--kernel"),
            (!self.initrd.is_empty(), "--initrd"),
            (self.cmdline.is_some(), "--cmdline"),
            (!self.append.is_empty(), "--append"),
            (self.entry.is_some(), "--entry"),
            (self.list_entries, "--list-entries"),
            (self.transport == "mmio", "--transport mmio"),
        ];
        match excluded.iter().find(|(given, _)| *given) {
            Some((_, option)) => Err(Failure::usage(format!("--firmware and {option} exclude each other"))),
            None => firmware::Wanted::parse(text).map(Some),
        }
    }

    fn memory_bytes(&self) -> Outcome<u64> {
        let bytes = block::size::parse(&self.memory)?;
        let bytes = bytes / MIB * MIB;
        if (64 * MIB..=64 << 40).contains(&bytes) {
            return Ok(bytes);
        }
        Err(Error::usage(format!("--memory {}: a guest needs 64M or more", self.memory))
            .hint("for example: 1G")
            .into())
    }
}
