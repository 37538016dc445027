//! Makes the kernels that a boot loader starts speak on the serial port, by their command lines in its configuration.
//!
//! Only for a guest's overlay: what is proven afterwards is a guest whose configuration differs in these words, and the
//! report says so.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{BlockDevice, Error, ErrorKind, Result, ResultExt as _};
use guestdisk::boot::{self, BootFile, Loader};
use guestdisk::{Disks, Keys};
use guestedit::{FileKind, GuestFs, Options};

/// What is added.
const CONSOLE: &str = "console=ttyS0,115200";
/// A command line that has this is left alone.
const KNOWN: &str = "console=ttyS0";
/// A configuration is not longer than this; a unified kernel image neither than that.
const MAX_CONFIG: u64 = 4 << 20;
const MAX_IMAGE: u64 = 256 << 20;
/// Links that are followed.
const MAX_LINKS: usize = 8;

/// Adds the serial console to every kernel command line of the boot loaders on these disks, which are written to. What was
/// changed, in sentences.
///
/// # Errors
/// `NotFound` if there is no configuration; whatever keeps one from being changed.
pub fn add_console(devices: &[Arc<dyn BlockDevice>], keys: &Keys) -> Result<Vec<String>> {
    let disks = Disks::open_with(devices.to_vec(), keys)?;
    let boot = boot::entries(&disks);
    let mut sources: Vec<(&BootFile, Loader)> = vec![];
    for entry in &boot.entries {
        if !sources
            .iter()
            .any(|(known, _)| known.volume == entry.source.volume && known.path == entry.source.path)
        {
            sources.push((&entry.source, entry.loader));
        }
    }
    if sources.is_empty() {
        let error =
            Error::new(ErrorKind::NotFound, "--add-console: no configuration of a boot loader was found");
        return Err(error.hint(format!("Looked at: {}.", boot.looked_at.join("; "))));
    }
    let mut said = vec![];
    for (source, loader) in sources {
        let count = change(&disks, source, loader).context(|| format!("--add-console: {source}"))?;
        said.push(match count {
            0 => format!("{source}: nothing, {KNOWN} is there already"),
            1 => format!("{source}: {CONSOLE} added to 1 kernel command line"),
            count => format!("{source}: {CONSOLE} added to {count} kernel command lines"),
        });
    }
    Ok(said)
}

/// Changes one file; how many command lines that concerned.
fn change(disks: &Disks, source: &BootFile, loader: Loader) -> Result<usize> {
    let volume = disks
        .volumes()
        .get(source.volume)
        .ok_or_else(|| Error::new(ErrorKind::NotFound, "the volume is not there"))?;
    let mut system = guestedit::open_volume(volume, &Options::default())?;
    let path = resolve(&mut *system, &source.path)?;
    let (count, changed) = if loader == Loader::UnifiedKernel {
        in_image(system.read(&path, MAX_IMAGE)?)?
    } else {
        let bytes = system.read(&path, MAX_CONFIG)?;
        let (count, text) = in_text(&String::from_utf8_lossy(&bytes), loader);
        (count, text.into_bytes())
    };
    if count > 0 {
        system.replace(&path, &changed)?;
        system.sync()?;
    }
    Ok(count)
}

/// The file that a path leads to.
fn resolve(system: &mut dyn GuestFs, path: &Path) -> Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        match system.stat(&path)? {
            Some(stat) if stat.kind == FileKind::Symlink => {
                let target = system.read_link(&path)?;
                path = path.parent().unwrap_or(Path::new("/")).join(target);
            }
            Some(_) => return Ok(path),
            None => return Err(Error::new(ErrorKind::NotFound, format!("{} is not there", path.display()))),
        }
    }
    Err(Error::invalid(format!("{}: too many links", path.display())))
}

/// The changed text of a configuration, and how many command lines were changed.
fn in_text(text: &str, loader: Loader) -> (usize, String) {
    let mut count = 0;
    let mut changed = String::with_capacity(text.len() + 256);
    for line in text.split_inclusive('\n') {
        let content = line.trim_end_matches(['\n', '\r']);
        let ending = &line[content.len()..];
        let new = match is_command_line(content, loader) {
            true if !content.contains(KNOWN) => {
                count += 1;
                with_console(content)
            }
            // What a graphical terminal shows nobody sees here.
            _ if content.trim() == "terminal_output gfxterm" => content.replace("gfxterm", "console"),
            _ => content.to_owned(),
        };
        changed.push_str(&new);
        changed.push_str(ending);
    }
    (count, changed)
}

fn is_command_line(line: &str, loader: Loader) -> bool {
    let mut words = line.split_whitespace();
    let first = words.next().unwrap_or_default();
    let has_more = words.next().is_some();
    has_more
        && match loader {
            Loader::Grub => ["linux", "linux16", "linuxefi"].contains(&first) || first.starts_with("linux$"),
            Loader::GrubLegacy => first == "kernel",
            Loader::BootLoaderSpec => first == "options",
            Loader::Syslinux => first.eq_ignore_ascii_case("append"),
            Loader::UnifiedKernel => false,
        }
}

/// The line with the console in front of `--` (what follows is the init's), or of a backslash (the line goes on).
fn with_console(line: &str) -> String {
    if let Some((kernel, init)) = line.split_once(" -- ") {
        return format!("{kernel} {CONSOLE} -- {init}");
    }
    match line.strip_suffix('\\') {
        Some(kernel) => format!("{} {CONSOLE} \\", kernel.trim_end()),
        None => format!("{} {CONSOLE}", line.trim_end()),
    }
}

/// The command line of a unified kernel image: a section of a program for UEFI (Microsoft, "PE Format"), which can grow as
/// far as its place in the file reaches.
fn in_image(mut image: Vec<u8>) -> Result<(usize, Vec<u8>)> {
    let lacks = |what: &str| Error::unsupported(format!("a unified kernel image {what}"));
    let word = |image: &[u8], at: usize| -> Option<usize> {
        let bytes = image.get(at..at.checked_add(4)?)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let section = (|| {
        let pe = word(&image, 0x3c)?;
        let count = word(&image, pe.checked_add(4)?)? >> 16;
        let optional = word(&image, pe.checked_add(20)?)? & 0xffff;
        let table = pe.checked_add(24)?.checked_add(optional)?;
        (0..count.min(64))
            .map(|index| table + 40 * index)
            .find(|at| image.get(*at..at + 8).is_some_and(|name| name == b".cmdline"))
    })();
    let at = section.ok_or_else(|| lacks("without a command line cannot be given one"))?;
    let field = |image: &[u8], offset: usize| word(image, at + offset).ok_or_else(|| lacks("is cut off"));
    let (len, place, start) = (field(&image, 8)?, field(&image, 16)?, field(&image, 20)?);
    let room =
        start.checked_add(place).filter(|end| *end <= image.len()).ok_or_else(|| lacks("is cut off"))?;
    let old = image[start..room].get(..len.min(place)).unwrap_or_default();
    let text = String::from_utf8_lossy(old).trim_end_matches(['\0', '\n', ' ']).to_owned();
    if text.contains(KNOWN) {
        return Ok((0, image));
    }
    let new = with_console(&text);
    if new.len() > place {
        let what = format!("has room for {place} bytes of command line, and {} are needed", new.len());
        return Err(lacks(&what));
    }
    image[start..room].fill(0);
    image[start..start + new.len()].copy_from_slice(new.as_bytes());
    let len = u32::try_from(new.len()).map_err(|_| lacks("is too long"))?;
    image[at + 8..at + 12].copy_from_slice(&len.to_le_bytes());
    Ok((1, image))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines_of_configurations() {
        let grub = "set timeout=5\nterminal_output gfxterm\nmenuentry 'a' {\n\tlinux\t/vmlinuz root=/dev/vda1 ro quiet\n\
                    \tlinuxefi /v a=1 -- single\r\n  linux16 /v \\\n\tlinux /v console=ttyS0\n\tinitrd /i\n\tlinux\n}";
        let expected = "set timeout=5\nterminal_output console\nmenuentry 'a' {\n\tlinux\t/vmlinuz root=/dev/vda1 ro quiet console=ttyS0,115200\n\
                        \tlinuxefi /v a=1 console=ttyS0,115200 -- single\r\n  linux16 /v console=ttyS0,115200 \\\n\tlinux /v console=ttyS0\n\tinitrd /i\n\tlinux\n}";
        assert_eq!(in_text(grub, Loader::Grub), (3, expected.to_owned()));
        for (loader, line) in [
            (Loader::BootLoaderSpec, "options root=x"),
            (Loader::Syslinux, "  APPEND root=x"),
            (Loader::GrubLegacy, "\tkernel /vmlinuz root=x"),
        ] {
            assert_eq!(in_text(line, loader), (1, format!("{line} {CONSOLE}")));
            assert_eq!(in_text("title linux kernel options append", loader).0, 0);
        }
    }

    fn image(cmdline: &[u8], place: u32) -> Vec<u8> {
        let mut image = vec![0; 0x400];
        image[0x3c] = 0x40;
        image[0x40..0x44].copy_from_slice(b"PE\0\0");
        image[0x46] = 2;
        image[0x54] = 8;
        let at = 0x40 + 24 + 8 + 40;
        image[at..at + 8].copy_from_slice(b".cmdline");
        image[at + 8..at + 12].copy_from_slice(&u32::try_from(cmdline.len()).unwrap().to_le_bytes());
        image[at + 16..at + 20].copy_from_slice(&place.to_le_bytes());
        image[at + 20..at + 24].copy_from_slice(&0x200_u32.to_le_bytes());
        image[0x200..0x200 + cmdline.len()].copy_from_slice(cmdline);
        image
    }

    #[test]
    fn command_lines_of_unified_kernel_images() {
        let (count, changed) = in_image(image(b"root=x\n", 0x200)).unwrap();
        assert_eq!(count, 1);
        assert_eq!(changed, image(b"root=x console=ttyS0,115200", 0x200));
        assert_eq!(in_image(changed.clone()).unwrap(), (0, changed));
        let full = in_image(image(b"root=x", 16)).unwrap_err();
        assert!(full.to_string().contains("room for 16 bytes"), "{full}");
        for len in 0..0x300 {
            let _ = in_image(image(b"root=x", 0x200)[..len].to_vec());
        }
        in_image(vec![0xff; 0x400]).unwrap_err();
    }
}
