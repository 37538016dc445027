//! Passphrases come and go, and whatever happens in the middle, nobody is locked out.

use std::sync::Arc;

use block::mem::MemStorage;
use block::testing::{CrashStorage, Fault, FaultStorage, Operation};
use nix::errno::Errno;

use super::*;
use crate::luks::{CreateOptions, create, unlock};
use crate::{Algorithm, IvGenerator, Mode};

/// Small key material makes quick tests.
fn small() -> CreateOptions {
    let spec = CipherSpec { algorithm: Algorithm::Aes128, mode: Mode::Cbc, iv: IvGenerator::Plain64 };
    CreateOptions { spec, iter_time: 0, ..CreateOptions::default() }
}

/// A container with a header at `base` that opens for "old".
fn container(options: &CreateOptions, base: usize) -> Vec<u8> {
    let created = create(options, b"old").unwrap();
    let mut bytes = vec![0xee; base];
    bytes.extend_from_slice(&created.prefix);
    bytes.resize(base + to_usize(created.header.payload_offset), 0);
    bytes
}

fn add(new: &str, slot: Option<i64>) -> Change {
    Change::Add { new: new.into(), slot, iter_time: 0 }
}

fn erase(old: Option<&str>, slot: Option<i64>) -> Change {
    Change::Erase { old: old.map(Secret::from), slot }
}

fn opens(storage: &dyn Storage, base: u64, passphrase: &str) -> Option<usize> {
    match unlock(storage, base, passphrase.as_bytes()) {
        Ok(unlocked) => Some(unlocked.slot),
        Err(error) => {
            assert_eq!(error.to_string(), "Invalid password, cannot unlock any keyslot");
            None
        }
    }
}

fn apply(storage: &dyn Storage, base: u64, with: &str, wanted: &Change, force: bool) -> Result<()> {
    change(storage, base, &mut unlock(storage, base, with.as_bytes())?, wanted, force)
}

#[test]
fn passphrases_come_and_go() {
    for (options, base) in [(CreateOptions { iter_time: 0, ..CreateOptions::default() }, 0), (small(), 65536)]
    {
        let storage = MemStorage::from_bytes(container(&options, base));
        let base = base as u64;
        let first = unlock(&storage, base, b"old").unwrap();
        let run = |with: &str, wanted: &Change, force| apply(&storage, base, with, wanted, force);
        run("old", &add("second", None), false).unwrap();
        run("second", &add("seventh", Some(6)), false).unwrap();
        assert_eq!(opens(&storage, base, "second"), Some(1));
        assert_eq!(opens(&storage, base, "seventh"), Some(6));
        run("second", &erase(Some("old"), None), false).unwrap();
        assert_eq!(opens(&storage, base, "old"), None);
        run("second", &erase(None, Some(1)), false).unwrap();
        assert_eq!(opens(&storage, base, "second"), None);
        let last = unlock(&storage, base, b"seventh").unwrap();
        assert_eq!(last.key, first.key);
        assert_eq!(last.header.active_slots(), 1);
        assert_eq!((last.header.slots[0].iterations, last.header.slots[0].salt), (0, [0; 32]));
        run("seventh", &erase(None, Some(6)), true).unwrap();
        assert_eq!(opens(&storage, base, "seventh"), None);
        assert!(storage.to_bytes()[..to_usize(base)].iter().all(|byte| *byte == 0xee));
    }
}

/// All of these were said by qemu-img 10.0.2.
#[test]
fn what_is_not_done_is_said_in_qemus_words() {
    let storage = MemStorage::from_bytes(container(&small(), 0));
    let said = |wanted: &Change| {
        let before = storage.to_bytes();
        let error = apply(&storage, 0, "old", wanted, false).unwrap_err().to_string();
        assert!(storage.to_bytes() == before);
        error
    };
    let number = |n: u32| format!("Invalid keyslot {n} specified, must be between 0 and 7");
    assert_eq!(said(&add("x", Some(8))), number(8));
    assert_eq!(said(&add("x", Some(-1))), number(u32::MAX));
    assert_eq!(said(&erase(None, Some(8))), number(8));
    assert_eq!(said(&add("x", Some(0))), "Refusing to overwrite active keyslot 0 - please erase it first");
    assert_eq!(said(&erase(None, Some(3))), "Given keyslot 3 is already erased (inactive) ");
    assert_eq!(said(&erase(None, None)), nothing_given().to_string());
    assert_eq!(said(&erase(Some("x"), None)), "No keyslots match given (old) password for erase operation");
    assert_eq!(
        said(&erase(Some("x"), Some(0))),
        "Given keyslot 0 doesn't contain the given old password for erase operation"
    );
    assert!(said(&erase(Some("old"), None)).starts_with("All the active keyslots match the (old) password"));
    assert!(said(&erase(None, Some(0))).starts_with("Attempt to erase the only active keyslot 0 which"));
    for slot in 1..8 {
        apply(&storage, 0, "old", &add(&slot.to_string(), None), false).unwrap();
    }
    assert_eq!(said(&add("x", None)), "Can't add a keyslot - all keyslots are in use");
    assert!(unlock(&storage, 0, b"nothing").unwrap_err().to_string().starts_with("Invalid password"));
}

/// What is done, from which slots, and who can open the volume at every moment of it.
struct Story {
    before: &'static [(&'static str, i64)],
    change: Change,
    force: bool,
    /// Somebody of these, at any time.
    always: &'static [&'static str],
    /// Nobody of these, when it is done.
    gone: &'static [&'static str],
    /// All of these, when it is done.
    there: &'static [&'static str],
}

fn stories() -> Vec<Story> {
    let story =
        |before, change, force| Story { before, change, force, always: &["old"], gone: &[], there: &[] };
    vec![
        Story { there: &["old", "new"], ..story(&[], add("new", None), false) },
        // Slot 6 lies across two sectors.
        Story { there: &["old", "new"], ..story(&[], add("new", Some(6)), false) },
        Story { there: &["old"], gone: &["2"], ..story(&[("2", 6)], erase(None, Some(6)), false) },
        Story {
            there: &["old"],
            gone: &["2"],
            ..story(&[("2", 3), ("2", 4)], erase(Some("2"), None), false)
        },
        Story {
            there: &["new"],
            gone: &["old"],
            always: &["old", "new"],
            ..story(&[], add("new", Some(0)), true)
        },
        Story {
            there: &["1", "7", "new"],
            gone: &["old"],
            always: &["1"],
            ..story(
                &[("1", 1), ("2", 2), ("3", 3), ("4", 4), ("5", 5), ("6", 6), ("7", 7)],
                add("new", Some(0)),
                true,
            )
        },
    ]
}

impl Story {
    fn prepared(&self) -> Vec<u8> {
        let storage = MemStorage::from_bytes(container(&small(), 0));
        for (passphrase, slot) in self.before {
            apply(&storage, 0, "old", &add(passphrase, Some(*slot)), false).unwrap();
        }
        storage.to_bytes()
    }

    fn check(&self, storage: &dyn Storage, done: bool) {
        assert!(self.always.iter().any(|passphrase| opens(storage, 0, passphrase).is_some()));
        if done {
            assert!(self.there.iter().all(|passphrase| opens(storage, 0, passphrase).is_some()));
            assert!(self.gone.iter().all(|passphrase| opens(storage, 0, passphrase).is_none()));
        }
    }
}

#[test]
fn a_loss_of_power_locks_nobody_out() {
    for (seed, story) in stories().iter().enumerate() {
        let storage = CrashStorage::new(story.prepared());
        apply(&storage, 0, "old", &story.change, story.force).unwrap();
        storage.mark(1);
        let mut seen = 0;
        for image in storage.images(60, seed as u64) {
            story.check(&*image.storage, image.marks.contains(&1));
            seen += 1;
        }
        assert!(seen > 10, "only {seen} images");
        story.check(&storage, true);
    }
}

#[test]
fn a_failing_disk_locks_nobody_out() {
    for story in stories() {
        let prepared = story.prepared();
        for nth in 0.. {
            let memory = Arc::new(MemStorage::from_bytes(prepared.clone()));
            let storage = FaultStorage::new(Arc::clone(&memory) as _);
            storage.fail(Fault::nth(nth, Errno::EIO).on(&[Operation::Write, Operation::Sync]));
            let result = apply(&storage, 0, "old", &story.change, story.force);
            story.check(&memory_of(&memory), result.is_ok());
            if result.is_ok() {
                assert!(nth > 2);
                break;
            }
        }
    }
}

fn memory_of(memory: &MemStorage) -> MemStorage {
    MemStorage::from_bytes(memory.to_bytes())
}
