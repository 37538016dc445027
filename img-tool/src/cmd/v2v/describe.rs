//! The descriptions of the new machine.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use block::ResultExt as _;
use image::Format;
use sha2::{Digest as _, Sha256};
use v2v::guest::{Bus, FirmwareKind, Guest};
use v2v::inspect::SystemKind;
use v2v::report::Report;
use v2v::target::{
    Connection, Machine, NetworkMap, NicModel, OsFacts, OutputDisk, TargetSpec, kubevirt, libvirt, ova, ovf,
    proxmox, qemu,
};

use super::place::Place;
use super::stages::{Context, Opened, main_system};
use crate::exit::{Failure, Outcome};

/// What `--target` knows.
const KINDS: [&str; 6] = ["libvirt", "qemu", "proxmox", "kubevirt", "ovf", "ova"];

/// Refuses descriptions that are not known, before anything is done.
pub(super) fn check(targets: &[String]) -> Outcome<()> {
    match targets.iter().find(|target| !KINDS.contains(&target.as_str())) {
        Some(other) => Err(Failure::usage(format!(
            "--target expects {} not '{other}'",
            KINDS.map(|kind| format!("'{kind}'")).join(", ")
        ))),
        None => Ok(()),
    }
}

/// Whether there is a description that goes with disks of their own.
pub(super) fn wants_disks(targets: &[String]) -> bool {
    targets.iter().any(|target| !matches!(target.as_str(), "ovf" | "ova"))
}

/// Writes them all.
pub(super) fn write(
    context: &Context<'_>,
    opened: &[Opened],
    place: &mut Place,
    report: &mut Report,
) -> Outcome<()> {
    let machine = Machine::new(&report.guest, &spec(context, report, place)?)?;
    report.warnings.extend(machine.notes.iter().cloned());
    report.warnings.extend(unused_rules(context, &report.guest));
    report.networks = networks(&report.guest, &machine);
    let name = report.guest.name.clone();
    for target in &context.args.target {
        let texts = match target.as_str() {
            "libvirt" => vec![(format!("{name}.xml"), libvirt::domain(&machine)?, false)],
            "qemu" => vec![(format!("{name}.sh"), qemu::script(&machine, place.directory())?, true)],
            "kubevirt" => vec![(format!("{name}.yaml"), kubevirt::manifest(&machine)?, false)],
            "proxmox" => vec![
                (format!("{name}.conf"), proxmox::config(&machine, &proxmox::Place::default()), false),
                (format!("{name}-proxmox.sh"), proxmox::script(&machine, place.directory())?, true),
            ],
            "ova" => {
                let (now, end) = place.file(&format!("{name}.ova"))?;
                let sources: Vec<_> = opened.iter().map(Opened::for_package).collect();
                let files = ova::write(&now, &machine, &ovf::Product::default(), &sources, context.reporter)?;
                let end = end.display().to_string();
                packed(report, files.iter().map(|file| format!("{end}:{}", file.name)));
                report.files.push(end);
                vec![]
            }
            _ => folder(context, &machine, opened, place, report)?,
        };
        for (file, text, executable) in texts {
            let end = place.write(&file, text.as_bytes(), executable)?;
            report.files.push(end.display().to_string());
        }
    }
    Ok(())
}

/// What each card was connected to, and is now.
fn networks(guest: &Guest, machine: &Machine) -> Vec<String> {
    let card = |(old, new): (&v2v::guest::Nic, &v2v::target::MachineNic)| {
        let mac = new.mac.as_deref().unwrap_or("address not known");
        let from = old.network_name.as_deref().map_or(String::new(), |name| format!(", was on '{name}'"));
        let kind = match &new.connection {
            Connection::Network(_) => "network",
            Connection::Bridge(_) => "bridge",
        };
        format!("{mac} ({}){from}: {kind} '{}'", new.model, new.connection.name())
    };
    guest.nics.iter().zip(&machine.nics).map(card).collect()
}

/// Rules for networks that the machine does not have: most often a name that is not written as the source has it.
fn unused_rules(context: &Context<'_>, guest: &Guest) -> Vec<String> {
    let args = context.args;
    let mut notes = vec![];
    if guest.nics.is_empty() {
        notes.push("It gets no network card: the source names none (--nic does).".to_owned());
    }
    for rule in args.network.iter().chain(&args.bridge) {
        let Some((from, _)) = rule.split_once(':') else { continue };
        if !guest.nics.iter().any(|nic| nic.network_name.as_deref() == Some(from)) {
            let known: Vec<_> = guest.nics.iter().filter_map(|nic| nic.network_name.as_deref()).collect();
            notes.push(format!(
                "No card of the machine is on the network '{from}'; there are: '{}'.",
                known.join("', '")
            ));
        }
    }
    for rule in &args.mac {
        let is_its = |mac: &str| rule.to_lowercase().starts_with(mac);
        if !guest.nics.iter().filter_map(|nic| nic.mac.as_deref()).any(is_its) {
            notes.push(format!("No card of the machine has the address of --mac {rule}."));
        }
    }
    notes
}

/// Disks that have no file of their own are where the package has them.
fn packed(report: &mut Report, names: impl Iterator<Item = String>) {
    for (disk, name) in report.disks.iter_mut().zip(names).filter(|(disk, _)| disk.output.is_empty()) {
        disk.output = name;
        disk.output_format = "vmdk".to_owned();
    }
}

/// A file to be written: its name, its text, and whether it is a program.
type Text = (String, String, bool);

/// An OVF package as files: disks, description, manifest.
fn folder(
    context: &Context<'_>,
    machine: &Machine,
    opened: &[Opened],
    place: &mut Place,
    report: &mut Report,
) -> Outcome<Vec<Text>> {
    let name = report.guest.name.clone();
    let mut disks = vec![];
    let mut lines = vec![];
    for (number, disk) in (1..).zip(opened) {
        let file = format!("{name}-disk{number}.vmdk");
        let (now, end) = place.file(&file)?;
        context.copy_disk(
            disk,
            &now,
            Format::Vmdk,
            vec![("subformat".into(), "streamOptimized".into())],
            false,
        )?;
        let (len, digest) = digest_of(&now)?;
        lines.push(format!("SHA256({file})= {digest}\n"));
        disks.push(ovf::DiskFile { name: file, len });
        report.files.push(end.display().to_string());
    }
    packed(report, disks.iter().map(|disk| place.directory().join(&disk.name).display().to_string()));
    let text = ovf::envelope(machine, &ovf::Product::default(), &disks);
    let digest = hexadecimal(&Sha256::digest(text.as_bytes()));
    lines.insert(0, format!("SHA256({name}.ovf)= {digest}\n"));
    Ok(vec![(format!("{name}.ovf"), text, false), (format!("{name}.mf"), lines.concat(), false)])
}

/// Length and SHA-256 of a file.
fn digest_of(path: &Path) -> block::Result<(u64, String)> {
    let what = || format!("could not read '{}'", path.display());
    let mut file = File::open(path).context(what)?;
    let (mut hash, mut len) = (Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer).context(what)?;
        if read == 0 {
            return Ok((len, hexadecimal(&hash.finalize())));
        }
        hash.update(&buffer[..read]);
        len += read as u64;
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn spec(context: &Context<'_>, report: &Report, place: &Place) -> Outcome<TargetSpec> {
    let args = context.args;
    let mut networks = NetworkMap::default();
    args.network.iter().try_for_each(|rule| networks.add_network(rule))?;
    args.bridge.iter().try_for_each(|rule| networks.add_bridge(rule))?;
    args.mac.iter().try_for_each(|rule| networks.add_mac(rule))?;
    let bus = report.bus.unwrap_or(Bus::Virtio);
    let disk = |disk: &v2v::report::ReportedDisk| OutputDisk {
        path: if disk.output.is_empty() {
            place.directory().join(&disk.id)
        } else {
            PathBuf::from(&disk.output)
        },
        format: disk.output_format.clone(),
        size_bytes: disk.size_bytes,
        bus,
    };
    let system = main_system(&report.inspection);
    let of_windows = system.is_some_and(|system| system.kind == SystemKind::Windows);
    Ok(TargetSpec {
        // Windows without drivers for KVM has one for this card.
        nic_model: if of_windows && bus == Bus::Sata {
            NicModel::Named("e1000e".to_owned())
        } else {
            NicModel::default()
        },
        disks: report.disks.iter().map(disk).collect(),
        firmware: report.firmware.unwrap_or(FirmwareKind::Bios),
        secure_boot: report.guest.firmware.secure_boot,
        os: system.map(OsFacts::from).unwrap_or_default(),
        networks,
        direct_boot: report.guest.direct_boot.clone(),
        ..TargetSpec::default()
    })
}
