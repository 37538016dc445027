use proptest::prelude::*;

use super::*;
use crate::vm::FakeVm;

const LEN: usize = 64 << 10;
const CODE_LEN: usize = 256 << 10;

struct Bench {
    vm: Arc<FakeVm>,
    flash: Flash,
}

fn bench() -> Bench {
    let bytes: Vec<u8> = (0..LEN).map(|i| (i / 256).to_le_bytes()[0]).collect();
    let vm = Arc::new(FakeVm::default());
    Bench { flash: Flash::new(FlashMemory::new(&bytes, CODE_LEN).unwrap(), Arc::clone(&vm) as _), vm }
}

impl Bench {
    fn commands(&self, offset: u64, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.flash.write(offset, &[*byte]));
    }

    fn read(&self, offset: u64) -> u8 {
        let mut byte = [0];
        self.flash.read(offset, &mut byte);
        byte[0]
    }

    fn shown(&self) -> bool {
        !*self.vm.flash_hidden.lock()
    }

    fn array(&self, offset: usize) -> u8 {
        self.flash.memory.bytes()[offset]
    }
}

#[test]
fn it_lies_below_the_code() {
    let flash = FlashMemory::new(&[0; LEN], CODE_LEN).unwrap();
    assert_eq!((flash.start(), flash.len()), (0xfffb_0000, LEN as u64));
    for len in [0, 100, 4097, MAX_LEN + 4096] {
        assert!(FlashMemory::new(&vec![0; len], CODE_LEN).is_err(), "{len}");
    }
}

/// What EDK II does to find out whether there is a flash, a ROM or memory.
#[test]
fn the_firmware_recognises_a_flash() {
    let b = bench();
    let original = b.read(0x300);
    b.commands(0x300, &[CLEAR_STATUS]);
    assert_eq!((b.read(0x300), b.shown()), (original, true), "not memory");
    b.commands(0x300, &[READ_STATUS]);
    assert_eq!((b.read(0x300), b.shown()), (0, false), "not a ROM");
    b.commands(0x300, &[READ_ARRAY]);
    assert_eq!((b.read(0x300), b.shown()), (original, true));
}

#[test]
fn bytes_are_programmed_while_the_array_stays() {
    let b = bench();
    for (offset, byte) in (0x1000..).zip(*b"vars") {
        b.commands(offset, &[PROGRAM, byte]);
        assert!(b.shown());
    }
    b.commands(0x1003, &[READ_ARRAY]);
    assert_eq!(b.flash.memory.bytes()[0xfff..0x1005], *b"\x0fvars\x10");
    b.commands(0, &[PROGRAM, READ_STATUS]);
    assert_eq!((b.array(0), b.shown()), (READ_STATUS, true), "data is no command");
    b.commands(0, &[READ_STATUS]);
    assert_eq!(b.read(0), READY);
    b.commands(0, &[PROGRAM_TOO, 1]);
    assert_eq!((b.array(0), b.read(0), b.shown()), (1, READY, false), "the status goes on being shown");
}

#[test]
fn a_block_is_erased_when_that_is_confirmed() {
    let b = bench();
    b.commands(0x2345, &[ERASE]);
    assert!(!b.shown());
    b.commands(0x2345, &[CONFIRM]);
    assert_eq!(b.read(0), READY);
    let bytes = b.flash.memory.bytes();
    assert!(bytes[0x2000..0x3000].iter().all(|byte| *byte == 0xff));
    assert_eq!((bytes[0x1fff], bytes[0x3000]), (0x1f, 0x30));
    b.commands(0x5000, &[ERASE, READ_ARRAY]);
    assert_eq!((b.array(0x5000), b.read(0)), (0x50, READY | ERASE_ERROR | PROGRAM_ERROR), "not confirmed");
    b.commands(0, &[CLEAR_STATUS, READ_STATUS]);
    assert_eq!(b.read(0), 0);
}

#[test]
fn a_buffer_is_programmed_at_once() {
    let b = bench();
    b.commands(0x4000, &[PROGRAM_BUFFER, 2]);
    for (offset, byte) in (0x4010..).zip(*b"buf") {
        b.flash.write(offset, &[byte]);
    }
    assert_eq!(b.array(0x4010), 0x40, "not confirmed yet");
    b.commands(0x4000, &[CONFIRM, READ_ARRAY]);
    assert_eq!(b.flash.memory.bytes()[0x400f..0x4014], *b"\x40buf\x40");
    b.commands(0x4000, &[PROGRAM_BUFFER, 0, 0xee, READ_ARRAY]);
    assert_eq!((b.array(0x4000), b.read(0)), (0x40, READY | PROGRAM_ERROR));
    b.commands(0, &[READ_ARRAY]);
    b.flash.write(0, &[PROGRAM_BUFFER]);
    b.flash.write(0, &u32::MAX.to_le_bytes());
    assert_eq!(b.read(0), READY | PROGRAM_ERROR, "more than the buffer holds");
}

#[test]
fn drivers_that_ask_learn_what_it_is() {
    let b = bench();
    b.commands(0, &[READ_ID]);
    assert_eq!([b.read(0), b.read(1), b.read(2)], [0x89, 0x18, 0], "block 0 is not locked");
    b.commands(0x55, &[QUERY]);
    let table: Vec<u8> = (0x10..0x36).map(|at| b.read(at)).collect();
    assert_eq!((&table[..5], &table[0x21..0x24]), (&b"QRY\x01\x00"[..], &b"PRI"[..]));
    assert_eq!(table[0x17], 16, "64 KiB");
    assert_eq!(table[0x1c..0x21], [1, 15, 0, 16, 0], "16 blocks of 4 KiB");
    b.commands(0, &[LOCK, 1, READ_ARRAY]);
    assert_eq!(b.read(0), 0);
}

#[test]
fn writes_end_with_the_flash() {
    let b = bench();
    let last = LEN as u64 - 2;
    b.commands(last, &[PROGRAM]);
    b.flash.write(last, &[1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(b.flash.memory.bytes()[LEN - 3..], [0xff, 1, 2]);
    let mut data = [0; 8];
    b.flash.read(last, &mut data);
    assert_eq!(data, [1, 2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
}

proptest! {
    /// Whatever is written: no panic, the buffer is bounded, and the array is shown exactly when it has to be.
    #[test]
    fn anything_may_be_written(accesses in prop::collection::vec((0..LEN as u64, prop::collection::vec(any::<u8>(), 0..9)), 0..300)) {
        let b = bench();
        for (offset, data) in accesses {
            b.flash.write(offset, &data);
            let state = b.flash.state.lock();
            prop_assert_eq!(state.shown, b.shown());
            prop_assert!(state.mode != Mode::Array || state.shown);
            if let Mode::Buffer { missing, bytes } = &state.mode {
                prop_assert!(missing + bytes.len() <= BUFFER);
            }
            drop(state);
            b.read(offset);
        }
        prop_assert_eq!(b.flash.memory.bytes().len(), LEN);
    }
}
