//! The firmwares' files: where distributions put them, or where the user says.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{Error, ErrorKind, Result, ResultExt as _};
use guestdisk::boot::firmware::Firmware;
use guestdisk::boot::nvram;
use serde_json::Value;

use super::Args;
use crate::exit::{Failure, Outcome};

/// A firmware is not larger than this.
const MAX_FILE: u64 = 64 << 20;
/// Descriptions of firmwares (QEMU's "firmware.json"), the administrator's before the distribution's.
const DESCRIPTORS: [&str; 2] = ["/etc/qemu/firmware", "/usr/share/qemu/firmware"];
/// What a description of a firmware that starts unsigned loaders does not have.
const UNWANTED: [&str; 3] = ["secure-boot", "enrolled-keys", "requires-smm"];
/// The BIOS: of Debian and Fedora, Arch and SUSE.
const SEABIOS: [&str; 4] = [
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/bios-256k.bin",
    "/usr/share/seabios/bios.bin",
    "/usr/share/qemu/bios.bin",
];
/// UEFI, code and variables: of Debian, Fedora, Arch (now and then), SUSE, Gentoo, and of QEMU itself.
const OVMF: [(&str, &str); 9] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/edk2-ovmf/x64/OVMF_CODE.fd", "/usr/share/edk2-ovmf/x64/OVMF_VARS.fd"),
    ("/usr/share/qemu/ovmf-x86_64-4m-code.bin", "/usr/share/qemu/ovmf-x86_64-4m-vars.bin"),
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"),
    ("/usr/share/edk2-ovmf/OVMF_CODE.fd", "/usr/share/edk2-ovmf/OVMF_VARS.fd"),
    ("/usr/share/qemu/edk2-x86_64-code.fd", "/usr/share/qemu/edk2-i386-vars.fd"),
];

/// The files of a firmware that is installed: its code, and for UEFI its empty variable store.
pub(crate) fn installed(firmware: Firmware) -> Option<(PathBuf, Option<PathBuf>)> {
    match firmware {
        Firmware::Bios => {
            SEABIOS.iter().map(PathBuf::from).find(|path| path.exists()).map(|path| (path, None))
        }
        Firmware::Uefi => {
            let pairs = OVMF.iter().map(|(code, vars)| (PathBuf::from(code), PathBuf::from(vars)));
            let pair =
                described().into_iter().chain(pairs).find(|(code, vars)| code.exists() && vars.exists());
            pair.map(|(code, vars)| (code, Some(vars)))
        }
    }
}

/// What to install where there is none.
pub(crate) fn remedy(firmware: Firmware) -> &'static str {
    match firmware {
        Firmware::Bios => {
            "install SeaBIOS (Debian: seabios; Fedora: seabios-bin; SUSE: qemu-seabios; Arch: seabios)"
        }
        Firmware::Uefi => {
            "install OVMF (Debian: ovmf; Fedora: edk2-ovmf; SUSE: qemu-ovmf-x86_64; Arch: edk2-ovmf)"
        }
    }
}

/// Pairs of code and variables that are described to fit a machine like ours.
fn described() -> Vec<(PathBuf, PathBuf)> {
    let files = DESCRIPTORS.iter().flat_map(|folder| {
        let mut files: Vec<_> =
            std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        files.sort();
        files
    });
    files.filter_map(|file| described_by(&serde_json::from_slice(&read(&file).ok()?).ok()?)).collect()
}

fn described_by(text: &Value) -> Option<(PathBuf, PathBuf)> {
    let list = |value: &Value| -> Vec<String> {
        let words = value.as_array().into_iter().flatten();
        words.filter_map(|word| word.as_str().map(str::to_owned)).collect()
    };
    let mapping = &text["mapping"];
    let fits = |target: &Value| {
        target["architecture"] == "x86_64"
            && list(&target["machines"]).iter().any(|name| name.starts_with("pc-q35-"))
    };
    let wanted = list(&text["interface-types"]).iter().any(|kind| kind == "uefi")
        && mapping["device"] == "flash"
        && mapping["mode"].as_str().is_none_or(|mode| mode == "split")
        && text["targets"].as_array().is_some_and(|targets| targets.iter().any(fits))
        && !list(&text["features"]).iter().any(|feature| UNWANTED.contains(&&**feature));
    let file = |what: &Value| {
        (what["format"] == "raw").then(|| what["filename"].as_str().map(PathBuf::from)).flatten()
    };
    if !wanted {
        return None;
    }
    Some((file(&mapping["executable"])?, file(&mapping["nvram-template"])?))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let what = || format!("could not read '{}'", path.display());
    let mut bytes = vec![];
    std::fs::File::open(path).context(what)?.take(MAX_FILE + 1).read_to_end(&mut bytes).context(what)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Error::unsupported("it is larger than 64 MiB").context(what()));
    }
    Ok(bytes)
}

/// What `--firmware` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Whatever the disk is for.
    Auto,
    /// These, one after the other.
    These(Vec<Firmware>),
}

impl Wanted {
    /// `auto`, `both`, or a list of `bios` and `uefi`.
    pub(super) fn parse(text: &str) -> Outcome<Self> {
        let word = |word: &str| match word {
            "bios" => Ok(Firmware::Bios),
            "uefi" => Ok(Firmware::Uefi),
            other => Err(Failure::usage(format!(
                "--firmware expects 'bios', 'uefi', 'auto' or 'both' not '{other}'"
            ))),
        };
        match text {
            "auto" => Ok(Self::Auto),
            "both" => Ok(Self::These(vec![Firmware::Bios, Firmware::Uefi])),
            list => {
                let mut found = list.split(',').map(word).collect::<Outcome<Vec<_>>>()?;
                found.dedup();
                Ok(Self::These(found))
            }
        }
    }

    /// How often each image is checked, and through what.
    pub(super) fn runs(&self) -> Vec<Option<Firmware>> {
        match self {
            Self::Auto => vec![None],
            Self::These(list) => list.iter().copied().map(Some).collect(),
        }
    }

    fn needs(&self, firmware: Firmware) -> bool {
        match self {
            Self::Auto => true,
            Self::These(list) => list.contains(&firmware),
        }
    }
}

/// A firmware, read.
#[derive(Debug, Clone)]
pub(super) struct Loaded {
    pub(super) code_name: String,
    pub(super) code: Arc<[u8]>,
    pub(super) vars_name: Option<String>,
    pub(super) vars: Option<Arc<[u8]>>,
}

/// The firmwares that may be needed, read before anything is given up; or why they are not there.
#[derive(Debug)]
pub(super) struct Firmwares {
    bios: Option<Result<Loaded>>,
    uefi: Option<Result<Loaded>>,
}

impl Firmwares {
    /// Reads what may be needed. What is missing is an error only when it turns out to be needed; what the user has named
    /// and cannot be read is one at once.
    pub(super) fn read(wanted: &Wanted, args: &Args) -> Outcome<Self> {
        let given = args.firmware_code.as_deref().map(read).transpose()?;
        let given_vars = args.firmware_vars.as_deref().map(read).transpose()?;
        // UEFI's code begins as a firmware volume.
        let given_kind = given
            .as_deref()
            .map(|code| if nvram::volume_len(code).is_some() { Firmware::Uefi } else { Firmware::Bios });
        if let (Some(kind), Wanted::These(list)) = (given_kind, wanted)
            && !list.contains(&kind)
        {
            let what = if kind == Firmware::Uefi { "is one of UEFI" } else { "is none of UEFI" };
            return Err(Failure::usage(format!("--firmware-code: this firmware {what}")));
        }
        let load = |firmware: Firmware| -> Result<Loaded> {
            let named = given.as_ref().filter(|_| given_kind == Some(firmware));
            let mut loaded = match (named, &args.firmware_code) {
                (Some(code), Some(path)) => from_bytes(path, code, firmware)?,
                _ => from_host(firmware)?,
            };
            if let (Firmware::Uefi, Some(vars), Some(path)) = (firmware, &given_vars, &args.firmware_vars) {
                nvram::boot_entries(vars).context(|| path.display().to_string())?;
                loaded.vars = Some(Arc::from(vars.as_slice()));
                loaded.vars_name = Some(path.display().to_string());
            }
            if firmware == Firmware::Uefi && loaded.vars.is_none() {
                return Err(Error::usage(format!("'{}' needs a variable store", loaded.code_name))
                    .hint("name it: --firmware-vars FILE"));
            }
            Ok(loaded)
        };
        let maybe = |firmware| wanted.needs(firmware).then(|| load(firmware));
        Ok(Self { bios: maybe(Firmware::Bios), uefi: maybe(Firmware::Uefi) })
    }

    /// One of them.
    pub(super) fn get(&self, firmware: Firmware) -> Result<&Loaded> {
        let loaded = match firmware {
            Firmware::Bios => self.bios.as_ref(),
            Firmware::Uefi => self.uefi.as_ref(),
        };
        match loaded {
            Some(Ok(loaded)) => Ok(loaded),
            Some(Err(error)) => {
                let copy = Error::new(error.kind(), error.to_string());
                Err(error.hints().iter().fold(copy, |copy, hint| copy.hint(hint.clone())))
            }
            None => Err(missing(firmware)),
        }
    }
}

fn missing(firmware: Firmware) -> Error {
    let what = match firmware {
        Firmware::Bios => "there is no SeaBIOS on this host",
        Firmware::Uefi => "there is no OVMF on this host",
    };
    Error::new(ErrorKind::NotFound, what)
        .hint(remedy(firmware))
        .hint("or name its file: --firmware-code FILE")
}

fn from_host(firmware: Firmware) -> Result<Loaded> {
    let (code, vars) = installed(firmware).ok_or_else(|| missing(firmware))?;
    let store = vars.as_deref().map(read).transpose()?;
    Ok(Loaded {
        code: read(&code)?.into(),
        code_name: code.display().to_string(),
        vars: store.map(Arc::from),
        vars_name: vars.map(|vars| vars.display().to_string()),
    })
}

/// A firmware that the user has named. One file may hold both parts of UEFI: variables in front, then code.
fn from_bytes(path: &Path, bytes: &[u8], firmware: Firmware) -> Result<Loaded> {
    let name = path.display().to_string();
    let mut loaded = Loaded { code_name: name.clone(), code: bytes.into(), vars_name: None, vars: None };
    let len = nvram::volume_len(bytes).map(block::num::to_usize).filter(|len| *len < bytes.len());
    if firmware == Firmware::Uefi && nvram::boot_entries(bytes).is_ok() {
        let Some(len) = len else {
            return Err(Error::usage(format!("'{name}' is a variable store and no firmware")));
        };
        loaded.vars = Some(bytes[..len].into());
        loaded.vars_name = Some(name);
        loaded.code = bytes[len..].into();
    } else if firmware == Firmware::Uefi
        && let Some((_, Some(vars))) = installed(Firmware::Uefi).filter(|(code, _)| code == path)
    {
        loaded.vars = Some(read(&vars)?.into());
        loaded.vars_name = Some(vars.display().to_string());
    }
    Ok(loaded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_asked_for() {
        let parse = |text| Wanted::parse(text).ok();
        assert_eq!(parse("auto"), Some(Wanted::Auto));
        assert_eq!(parse("uefi"), Some(Wanted::These(vec![Firmware::Uefi])));
        assert_eq!(parse("both"), parse("bios,uefi"));
        assert_eq!(parse("uefi,uefi"), parse("uefi"));
        for bad in ["", "efi", "bios,", "auto,bios"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        assert_eq!(Wanted::Auto.runs(), [None]);
        assert_eq!(parse("both").unwrap().runs(), [Some(Firmware::Bios), Some(Firmware::Uefi)]);
    }

    #[test]
    fn descriptions_of_firmwares() {
        let description = |features: &[&str], format: &str| {
            json!({
                "interface-types": ["uefi"],
                "mapping": {
                    "device": "flash",
                    "executable": { "filename": "/c.fd", "format": format },
                    "nvram-template": { "filename": "/v.fd", "format": format },
                },
                "targets": [{ "architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"] }],
                "features": features,
            })
        };
        let pair = Some((PathBuf::from("/c.fd"), PathBuf::from("/v.fd")));
        assert_eq!(described_by(&description(&["acpi-s3", "amd-sev"], "raw")), pair);
        assert_eq!(described_by(&description(&["acpi-s3", "secure-boot"], "raw")), None);
        assert_eq!(described_by(&description(&[], "qcow2")), None);
        assert_eq!(
            described_by(&json!({ "interface-types": ["bios"], "mapping": { "device": "memory" } })),
            None
        );
        assert_eq!(described_by(&json!([])), None);
    }
}
