//! The guest's own configuration of its initramfs, so that the next one has the drivers too.

use std::path::Path;

use super::draft::{Draft, Why};
use super::text::{append_lines, each_line};

/// Everything in this file's care. `drivers`: what an initramfs lacked.
pub(crate) fn convert(draft: &mut Draft<'_>, drivers: &[&'static str]) {
    if drivers.is_empty() {
        return;
    }
    let why = |undo: &str| {
        Why::new("regeneration", format!("the next initramfs has {} too", drivers.join(", ")), undo)
    };
    draft.edit("/etc/initramfs-tools/modules", why("remove the lines at its end"), |text| {
        let has = |driver: &str| text.lines().any(|line| line.split_whitespace().next() == Some(driver));
        let lines: Vec<String> =
            drivers.iter().filter(|driver| !has(driver)).map(|driver| (*driver).to_owned()).collect();
        append_lines(text, &lines)
    });
    if draft.exists("/etc/dracut.conf.d") || draft.exists("/etc/dracut.conf") {
        let text = format!("# Written by vimg.\nadd_drivers+=\" {} \"\n", drivers.join(" "));
        let path = Path::new("/etc/dracut.conf.d/90-vimg.conf");
        draft.write(path, text.into_bytes(), 0o644, why("remove the file"));
    }
    draft.edit("/etc/mkinitcpio.conf", why("put the old line of the diff back"), |text| {
        each_line(text, |_, line| line.starts_with("MODULES=").then(|| with_words(line, drivers)))
    });
    draft.edit("/etc/sysconfig/kernel", why("put the old line of the diff back"), |text| {
        each_line(text, |_, line| {
            line.starts_with("INITRD_MODULES=").then(|| with_words(&without_xen(line), drivers))
        })
    });
    let has_feature = draft.exists("/etc/mkinitfs/features.d/virtio.modules");
    draft.edit("/etc/mkinitfs/mkinitfs.conf", why("put the old line of the diff back"), |text| {
        let feature: &[&'static str] = if has_feature { &["virtio"] } else { &[] };
        each_line(text, |_, line| line.starts_with("features=").then(|| with_words(line, feature)))
    });
}

/// Words at the end of a list in parentheses or quotes.
fn with_words(line: &str, words: &[&str]) -> String {
    let has = |word: &str| {
        line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '-').any(|own| own == word)
    };
    let new: Vec<&str> = words.iter().copied().filter(|word| !has(word)).collect();
    let open = line.find(['(', '"', '\'']);
    let (Some(open), false) = (open, new.is_empty()) else { return line.to_owned() };
    let close = match line.as_bytes()[open] {
        b'(' => ')',
        quote => char::from(quote),
    };
    let Some(end) = line[open + 1..].find(close).map(|at| open + 1 + at) else { return line.to_owned() };
    let list = line[open + 1..end].trim_end();
    let space = if list.is_empty() { "" } else { " " };
    format!("{}{list}{space}{}{}", &line[..=open], new.join(" "), &line[end..])
}

/// Without the drivers of Xen's devices, which a kernel for KVM may not have.
fn without_xen(line: &str) -> String {
    const XEN: [&str; 5] = ["xennet", "xenblk", "xen-vbd", "xen-vnif", "xen-platform-pci"];
    let Some((start, rest)) = line.split_once('"') else { return line.to_owned() };
    let Some((list, end)) = rest.split_once('"') else { return line.to_owned() };
    if !list.split_whitespace().any(|word| XEN.contains(&word)) {
        return line.to_owned();
    }
    let kept: Vec<&str> = list.split_whitespace().filter(|word| !XEN.contains(word)).collect();
    format!("{start}\"{}\"{end}", kept.join(" "))
}

#[cfg(test)]
mod tests {
    use super::super::tree::memory::Memory;
    use super::*;

    const DRIVERS: [&str; 2] = ["virtio_pci", "virtio_blk"];

    #[test]
    fn every_generator_is_told_once() {
        let tree = Memory::default()
            .file("/etc/initramfs-tools/modules", "# comment\nvirtio_pci")
            .file("/etc/dracut.conf", "")
            .file("/etc/mkinitcpio.conf", "# MODULES=\nMODULES=(ext4)\nHOOKS=(base udev)\n")
            .file("/etc/sysconfig/kernel", "INITRD_MODULES=\"xenblk xennet jbd\"\n")
            .file("/etc/mkinitfs/features.d/virtio.modules", "")
            .file("/etc/mkinitfs/mkinitfs.conf", "features=\"ata base ext4\"\n");
        let mut draft = Draft::new(&tree);
        convert(&mut draft, &DRIVERS);
        convert(&mut draft, &DRIVERS);
        let diffs: Vec<_> = draft.finish().unwrap().changes.into_iter().map(|change| change.diff).collect();
        assert_eq!(diffs[0], ["+virtio_blk"]);
        assert_eq!(diffs[2], ["+# Written by vimg.", "+add_drivers+=\" virtio_pci virtio_blk \""]);
        assert_eq!(diffs[3][1], "+MODULES=(ext4 virtio_pci virtio_blk)");
        assert_eq!(diffs[4][1], "+INITRD_MODULES=\"jbd virtio_pci virtio_blk\"");
        assert_eq!(diffs[5][1], "+features=\"ata base ext4 virtio\"");
    }

    #[test]
    fn lists_of_words() {
        assert_eq!(with_words("MODULES=()", &DRIVERS), "MODULES=(virtio_pci virtio_blk)");
        assert_eq!(with_words("MODULES=\"a virtio_blk\"", &DRIVERS), "MODULES=\"a virtio_blk virtio_pci\"");
        assert_eq!(with_words("MODULES=(", &DRIVERS), "MODULES=(");
        assert_eq!(
            with_words("MODULES=(virtio_pci virtio_blk)", &DRIVERS),
            "MODULES=(virtio_pci virtio_blk)"
        );
    }

    #[test]
    fn nothing_is_said_where_nothing_lacked() {
        let tree = Memory::default().file("/etc/dracut.conf", "");
        let mut draft = Draft::new(&tree);
        convert(&mut draft, &[]);
        assert!(draft.finish().unwrap().changes.is_empty());
    }
}
