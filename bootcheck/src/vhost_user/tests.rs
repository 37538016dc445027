//! The front-end's side, honest and not.

use std::fs::File;
use std::io::{IoSlice, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use block::BlockDevice;
use block::mem::MemStorage;
use block::raw::{Raw, RawOptions};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::engine::Disk;
use crate::memory::{GuestRam, SharedRegion};
use crate::virtio::blk::Blk;
use crate::virtio::driver::{AVAILABLE, BUFFERS, DESCRIPTORS, Driver, USED};

const MEMORY: u64 = 1 << 20;
/// Where the front-end has its memory.
const USER: u64 = 0x7f00_0000_0000;
const SIZE: u16 = 16;

/// Something that no front-end should do.
type Lie<'a> = &'a dyn Fn(&Front);

struct Front {
    stream: UnixStream,
    memory: File,
    server: JoinHandle<Result<()>>,
}

impl Front {
    fn new() -> Self {
        let store = MemStorage::new();
        block::Storage::set_len(&store, 1 << 20).unwrap();
        let device: Arc<dyn BlockDevice> =
            Arc::new(Raw::open(Arc::new(store), RawOptions::default()).unwrap());
        device.write_at(&[7; 512], 512).unwrap();
        let (stream, theirs) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            let disk = Blk::new(Disk { device, read_only: false, serial: "one".to_owned() }, 1);
            serve(&theirs, &disk, &AtomicBool::new(false))
        });
        let memory = File::from(memfd_create(c"guest", MFdFlags::empty()).unwrap());
        memory.set_len(MEMORY).unwrap();
        Self { stream, memory, server }
    }

    fn send(&self, request: u32, payload: &[u8], files: &[RawFd]) {
        let mut bytes = [request, 1, u32::try_from(payload.len()).unwrap()].map(u32::to_le_bytes).concat();
        bytes.extend(payload);
        let rights = [ControlMessage::ScmRights(files)];
        let rights = if files.is_empty() { &rights[..0] } else { &rights[..] };
        let iov = [IoSlice::new(&bytes)];
        let sent = sendmsg::<()>(self.stream.as_raw_fd(), &iov, rights, MsgFlags::empty(), None);
        // A server that has refused something is gone.
        let _ = sent;
    }

    fn number(&self, request: u32, number: u64, files: &[RawFd]) {
        self.send(request, &number.to_le_bytes(), files);
    }

    fn state(&self, request: u32, index: u32, number: u32) {
        self.send(request, &[index, number].map(u32::to_le_bytes).concat(), &[]);
    }

    fn answer(&self) -> Vec<u8> {
        let mut header = [0; 12];
        (&self.stream).read_exact(&mut header).unwrap();
        assert_eq!(header[4], 5, "version 1, a reply");
        let mut payload = vec![0; usize::from(header[8])];
        (&self.stream).read_exact(&mut payload).unwrap();
        payload
    }

    fn table(&self, len: u64) {
        let region = [0, len, USER, 0].map(u64::to_le_bytes).concat();
        let payload = [[1_u32, 0].map(u32::to_le_bytes).concat(), region].concat();
        self.send(5, &payload, &[self.memory.as_raw_fd()]);
    }

    fn addresses(&self, base: u64) {
        let ring = [USER + DESCRIPTORS, USER + USED, base + AVAILABLE, 0].map(u64::to_le_bytes).concat();
        self.send(9, &[vec![0; 8], ring].concat(), &[]);
    }

    /// Everything up to a running ring.
    fn start(&self, kick: &EventFd, call: &EventFd) {
        self.number(2, 1 << 32 | 1 << 30, &[]);
        self.number(16, 1 << 3 | 1 << 9, &[]);
        self.table(MEMORY);
        self.state(8, 0, u32::from(SIZE));
        self.state(10, 0, 0);
        self.addresses(USER);
        self.number(13, 0, &[call.as_raw_fd()]);
        self.number(12, 0, &[kick.as_raw_fd()]);
        self.state(18, 0, 1);
    }

    fn end(self) -> Result<()> {
        drop(self.stream);
        self.server.join().unwrap()
    }
}

#[test]
fn a_disk_is_read_through_shared_memory() {
    let front = Front::new();
    front.number(1, 0, &[]);
    let features = u64::from_le_bytes(front.answer().try_into().unwrap());
    assert_eq!(features & (1 << 32 | 1 << 30), 1 << 32 | 1 << 30);
    let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
    front.start(&kick, &call);

    let file = front.memory.try_clone().unwrap();
    let ram = GuestRam::shared(vec![SharedRegion { address: 0, len: MEMORY, file, offset: 0 }]).unwrap();
    let mut driver = Driver::new(ram, SIZE);
    let (data, status) = (BUFFERS + 0x1000, BUFFERS + 0x2000);
    driver.put(BUFFERS, &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    driver.put(status, &[0xff]);
    driver.chain(&[(BUFFERS, 16, false), (data, 512, true), (status, 1, true)]);
    kick.write(1).unwrap();
    assert_eq!(call.read().unwrap(), 1);
    assert_eq!((driver.get(data, 512), driver.get(status, 1)), (vec![7; 512], vec![0]));

    // The configuration begins with the number of sectors.
    let head = [0_u32, 8, 0].map(u32::to_le_bytes).concat();
    front.send(24, &[head.clone(), vec![0; 8]].concat(), &[]);
    assert_eq!(front.answer(), [head, 2048_u64.to_le_bytes().to_vec()].concat());
    // A ring that is stopped tells where it stood.
    front.state(11, 0, 0);
    assert_eq!(front.answer(), [0_u32, 1].map(u32::to_le_bytes).concat());
    front.end().unwrap();
}

/// A front-end that reads none of its interrupts does not hold the thread, which has the disk.
#[test]
fn a_full_pipe_holds_nobody_up() {
    let front = Front::new();
    let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
    front.start(&kick, &call);
    let (reader, writer) = std::io::pipe().unwrap();
    front.number(13, 0, &[writer.as_raw_fd()]);
    front.number(1, 0, &[]);
    front.answer();
    let flags = |flags| nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
    flags(nix::fcntl::OFlag::O_NONBLOCK);
    while (&writer).write(&[0; 4096]).is_ok() {}
    while (&writer).write(&[0]).is_ok() {}
    // It can block again after it was given.
    flags(nix::fcntl::OFlag::empty());
    let file = front.memory.try_clone().unwrap();
    let ram = GuestRam::shared(vec![SharedRegion { address: 0, len: MEMORY, file, offset: 0 }]).unwrap();
    let mut driver = Driver::new(ram, SIZE);
    driver.put(BUFFERS, &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    driver.chain(&[(BUFFERS, 16, false), (BUFFERS + 0x1000, 512, true), (BUFFERS + 0x2000, 1, true)]);
    kick.write(1).unwrap();
    drop(front.stream);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !front.server.is_finished() {
        assert!(Instant::now() < deadline, "the thread waits for the reader");
        std::thread::yield_now();
    }
    front.server.join().unwrap().unwrap();
    drop((reader, writer));
}

#[test]
fn what_breaks_the_rules_ends_the_connection() {
    let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
    let fds = [kick.as_raw_fd(), call.as_raw_fd()];
    let null = File::open("/dev/null").unwrap();
    let lies: [(&str, Lie<'_>); 14] = [
        ("message 99", &|f| f.send(99, &[], &[])),
        ("of only", &|f| f.send(2, &[0; 7], &[])),
        ("were not offered", &|f| f.number(2, 1 << 63, &[])),
        ("in the middle", &|f| (&f.stream).write_all(&[1, 0]).unwrap()),
        ("of 0x100000 bytes", &|f| (&f.stream).write_all(&[2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 16, 0]).unwrap()),
        ("flags 0x5", &|f| (&f.stream).write_all(&[2, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]).unwrap()),
        ("no ring 7", &|f| f.state(18, 7, 1)),
        ("of 65536 descriptors", &|f| f.state(8, 0, 65536)),
        ("memory regions in 0 files", &|f| f.send(5, &[1, 0, 0, 0].repeat(10), &[])),
        ("table of 9", &|f| f.send(5, &[9, 0, 0, 0].repeat(100), &[])),
        ("ends behind its file", &|f| f.table(MEMORY + 1)),
        ("does not lie in a file", &|f| {
            f.send(
                5,
                &[[1, 0].map(u64::to_le_bytes).concat()[..8].to_vec(), vec![0; 32]].concat(),
                &[null.as_raw_fd()],
            );
        }),
        ("no memory region", &|f| {
            f.table(MEMORY);
            f.addresses(0);
            f.number(12, 0, &fds[..1]);
        }),
        ("other descriptors", &|f| f.number(12, 0, &fds)),
    ];
    for (expected, lie) in lies {
        let front = Front::new();
        lie(&front);
        let Err(error) = front.end() else { panic!("{expected}: accepted") };
        let error = error.to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn a_ring_that_makes_no_sense_ends_the_connection() {
    let front = Front::new();
    let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
    front.start(&kick, &call);
    let file = front.memory.try_clone().unwrap();
    let ram = GuestRam::shared(vec![SharedRegion { address: 0, len: MEMORY, file, offset: 0 }]).unwrap();
    ram.write(AVAILABLE + 2, &[0xff, 0xff]).unwrap();
    // All messages before this have been taken once it is answered.
    front.number(1, 0, &[]);
    front.answer();
    kick.write(1).unwrap();
    let error = front.server.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("buffers available in a ring of 16"), "{error}");
}
