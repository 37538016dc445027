//! One connection: what the front-end has set up, and its rings.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use block::num::to_usize;
use block::{Error, Result};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::message::{Addresses, Message, Region, Request, State};
use crate::memory::{GuestRam, SharedRegion};
use crate::virtio::{Device, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Queue, RingError, Service};

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// Protocol features.
const P_MQ: u64 = 1;
const P_REPLY_ACK: u64 = 1 << 3;
/// Requests of ours, of which there are none. User-Mode Linux has an interrupt for calls only where it has one for them.
const P_BACKEND_REQ: u64 = 1 << 5;
const P_CONFIG: u64 = 1 << 9;

/// A ring as the front-end has set it up.
#[derive(Debug)]
struct Ring {
    queue: Queue,
    addresses: Option<Addresses>,
    base: u16,
    /// The driver has something available. The ring is started while there is one.
    kick: Option<File>,
    /// The device has used something.
    call: Option<File>,
    enabled: bool,
    /// The queue is where the driver has it.
    placed: bool,
}

impl Ring {
    fn new(max_size: u16) -> Self {
        let queue = Queue::new(max_size);
        Self { queue, addresses: None, base: 0, kick: None, call: None, enabled: false, placed: false }
    }
}

/// Has a descriptor of the front-end's give up rather than wait: this thread has the disk, and is to end when it is told to.
/// Each time, since the front-end can take it back.
fn at_once(file: &File) -> Result<()> {
    fcntl(file, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(())
}

pub(super) struct Session<'a> {
    stream: &'a UnixStream,
    device: &'a dyn Device,
    stopping: &'a AtomicBool,
    features: u64,
    protocol: u64,
    regions: Vec<Region>,
    ram: Option<GuestRam>,
    rings: Vec<Ring>,
    buffer: Vec<u8>,
    /// For requests of ours; it is open for as long as the connection.
    channel: Vec<File>,
}

impl<'a> Session<'a> {
    pub(super) fn new(stream: &'a UnixStream, device: &'a dyn Device, stopping: &'a AtomicBool) -> Self {
        Self {
            stream,
            device,
            stopping,
            features: 0,
            protocol: 0,
            regions: vec![],
            ram: None,
            rings: device.queue_sizes().into_iter().map(Ring::new).collect(),
            buffer: vec![],
            channel: vec![],
        }
    }

    /// Serves until the connection is closed.
    pub(super) fn run(mut self) -> Result<()> {
        while !self.stopping.load(Ordering::Acquire) {
            let (message, kicked) = self.wait()?;
            for index in kicked {
                self.kicked(index)?;
            }
            if message {
                match Message::receive(self.stream)? {
                    Some(message) => self.handle(message)?,
                    None => return Ok(()),
                }
            }
        }
        Ok(())
    }

    /// Waits for a message, or for kicks of rings.
    fn wait(&self) -> Result<(bool, Vec<usize>)> {
        let started = |ring: &&Ring| ring.enabled && ring.kick.is_some();
        let rings = self.rings.iter().filter(started).filter_map(|ring| ring.kick.as_ref());
        let waiting = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![waiting(self.stream.as_fd())];
        fds.extend(rings.map(|kick| waiting(kick.as_fd())));
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) => break,
            }
        }
        let happened = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let indices = (0..self.rings.len()).filter(|index| started(&&self.rings[*index]));
        let kicked = indices.zip(&fds[1..]).filter(|(_, fd)| happened(fd)).map(|(index, _)| index).collect();
        Ok((happened(&fds[0]), kicked))
    }

    /// The driver has kicked a ring.
    fn kicked(&mut self, index: usize) -> Result<()> {
        let ring = &mut self.rings[index];
        if let Some(mut kick) = ring.kick.as_ref() {
            let mut count = [0; 8];
            at_once(kick)?;
            match kick.read(&mut count) {
                // Nobody is left who could kick.
                Ok(0) => ring.kick = None,
                Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => return Err(error.into()),
                _ => {}
            }
        }
        self.serve(index).map_err(|error| {
            Error::from_source(block::ErrorKind::Invalid, error).context(format!("ring {index}"))
        })
    }

    fn serve(&mut self, index: usize) -> std::result::Result<(), RingError> {
        let ring = &mut self.rings[index];
        let (Some(ram), true) = (&self.ram, ring.placed) else { return Ok(()) };
        let call = ring.call.as_ref();
        let interrupt = || {
            if let Some(mut call) = call
                && at_once(call).is_ok()
            {
                // A front-end that is gone is noticed by its connection; one that takes nothing has enough to take.
                let _ = call.write(&1_u64.to_le_bytes());
            }
        };
        let service = Service { device: self.device, ram, stopping: self.stopping, interrupt: &interrupt };
        service.drain(&mut ring.queue, &mut self.buffer)
    }

    fn handle(&mut self, message: Message) -> Result<()> {
        let (request, need_reply) = (message.request, message.need_reply);
        let answer = self.act(message)?;
        match answer {
            Some(payload) => Message::reply(self.stream, request, &payload),
            None if need_reply && self.protocol & P_REPLY_ACK != 0 => {
                Message::reply(self.stream, request, &0_u64.to_le_bytes())
            }
            None => Ok(()),
        }
    }

    /// Does what a message says; the payload of its own answer, if it has one.
    fn act(&mut self, message: Message) -> Result<Option<Vec<u8>>> {
        let number = |number: u64| Ok(Some(number.to_le_bytes().to_vec()));
        match message.request {
            Request::GET_FEATURES => return number(self.offered()),
            Request::GET_PROTOCOL_FEATURES => return number(P_MQ | P_REPLY_ACK | P_BACKEND_REQ | P_CONFIG),
            Request::GET_QUEUE_NUM => return number(self.rings.len() as u64),
            Request::GET_CONFIG => return self.config(&message).map(Some),
            Request::GET_VRING_BASE => return self.stop(message.state()?).map(Some),
            Request::SET_OWNER => {}
            Request::RESET_OWNER => self.reset(),
            Request::SET_FEATURES => self.accept(message.number()?)?,
            Request::SET_PROTOCOL_FEATURES => self.protocol = message.number()?,
            Request::SET_MEM_TABLE => self.set_memory(message)?,
            Request::SET_VRING_NUM => self.set_size(message.state()?)?,
            Request::SET_VRING_BASE => self.set_base(message.state()?)?,
            Request::SET_VRING_ADDR => self.set_addresses(message.addresses()?)?,
            Request::SET_VRING_KICK => self.start(message)?,
            Request::SET_VRING_CALL => {
                let (index, file) = message.event()?;
                self.ring(index)?.call = file;
            }
            Request::SET_BACKEND_REQ_FD => self.channel = message.files,
            Request::SET_VRING_ERR => drop(message.event()?),
            Request::SET_VRING_ENABLE => {
                let State { index, number } = message.state()?;
                self.ring(index)?.enabled = number != 0;
            }
            Request::SET_CONFIG => {
                let (config, bytes) = message.config()?;
                self.device.config_write(u64::from(config.offset), bytes);
            }
            Request(other) => return Err(Error::unsupported(format!("message {other}"))),
        }
        Ok(None)
    }

    fn offered(&self) -> u64 {
        self.device.features() | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC | F_PROTOCOL_FEATURES
    }

    fn accept(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.offered();
        if unknown != 0 {
            return Err(Error::invalid(format!("features {unknown:#x} were not offered")));
        }
        self.features = features;
        self.device.accepted(features & !F_PROTOCOL_FEATURES);
        for ring in &mut self.rings {
            ring.queue.event_idx = features & F_EVENT_IDX != 0;
            ring.queue.indirect = features & F_INDIRECT_DESC != 0;
            // Without protocol features there are no messages that enable a ring.
            ring.enabled |= features & F_PROTOCOL_FEATURES == 0;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.rings = self.device.queue_sizes().into_iter().map(Ring::new).collect();
        self.features = 0;
        self.device.accepted(0);
    }

    fn config(&self, message: &Message) -> Result<Vec<u8>> {
        let (config, bytes) = message.config()?;
        let mut data = vec![0; bytes.len()];
        self.device.config_read(u64::from(config.offset), &mut data);
        let head = [config.offset, config.len, config.flags].map(u32::to_le_bytes);
        Ok([head.as_flattened(), &data].concat())
    }

    fn set_memory(&mut self, message: Message) -> Result<()> {
        let regions = message.regions()?;
        if regions.len() != message.files.len() {
            let text = format!("{} memory regions in {} files", regions.len(), message.files.len());
            return Err(Error::invalid(text));
        }
        let shared = regions.iter().zip(message.files).map(|(region, file)| SharedRegion {
            address: region.guest,
            len: region.len,
            file,
            offset: region.offset,
        });
        self.ram = Some(GuestRam::shared(shared.collect())?);
        self.regions = regions;
        // Rings may lie elsewhere now; those that are running go on where they were.
        for index in 0..self.rings.len() {
            if self.rings[index].placed {
                self.place(index)?;
            }
        }
        Ok(())
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        let missing = || Error::invalid(format!("there is no ring {index}"));
        self.rings.get_mut(to_usize(u64::from(index))).ok_or_else(missing)
    }

    fn set_size(&mut self, State { index, number }: State) -> Result<()> {
        let queue = &mut self.ring(index)?.queue;
        let size = u16::try_from(number).unwrap_or(0);
        queue.set_size(size);
        if queue.size != size {
            return Err(Error::invalid(format!("ring {index} of {number} descriptors")));
        }
        Ok(())
    }

    fn set_base(&mut self, State { index, number }: State) -> Result<()> {
        let base = u16::try_from(number);
        self.ring(index)?.base =
            base.map_err(|_| Error::invalid(format!("ring {index} begins at {number:#x}")))?;
        Ok(())
    }

    fn set_addresses(&mut self, addresses: Addresses) -> Result<()> {
        self.ring(addresses.index)?.addresses = Some(addresses);
        Ok(())
    }

    /// A descriptor to be kicked by starts a ring.
    fn start(&mut self, message: Message) -> Result<()> {
        let (index, file) = message.event()?;
        let ring = self.ring(index)?;
        ring.kick = file;
        if ring.kick.is_none() {
            return Err(Error::unsupported(format!("ring {index} that is to be polled")));
        }
        let place = to_usize(u64::from(index));
        self.place(place)?;
        let ring = &mut self.rings[place];
        let Some(ram) = &self.ram else { return Ok(()) };
        let resumed = ring.queue.resume(ram, ring.base);
        resumed.map_err(|error| Error::from_source(block::ErrorKind::Invalid, error))
    }

    /// Tells a queue where it lies in the guest's memory.
    fn place(&mut self, index: usize) -> Result<()> {
        let addresses = self.rings[index].addresses;
        let addresses = addresses.ok_or_else(|| Error::invalid(format!("ring {index} has no address")))?;
        let descriptors = self.translate(addresses.descriptors)?;
        let (driver, device) = (self.translate(addresses.available)?, self.translate(addresses.used)?);
        let ring = &mut self.rings[index];
        (ring.queue.descriptors, ring.queue.driver, ring.queue.device) = (descriptors, driver, device);
        ring.placed = true;
        Ok(())
    }

    /// The guest's address of what the front-end has at `user`.
    fn translate(&self, user: u64) -> Result<u64> {
        let guest = |region: &Region| {
            let at = user.checked_sub(region.user).filter(|at| *at < region.len)?;
            region.guest.checked_add(at)
        };
        self.regions
            .iter()
            .find_map(guest)
            .ok_or_else(|| Error::invalid(format!("a ring at {user:#x}, which is in no memory region")))
    }

    /// Stops a ring; where it stood.
    fn stop(&mut self, State { index, .. }: State) -> Result<Vec<u8>> {
        let ring = self.ring(index)?;
        let next = if ring.placed { ring.queue.next_available() } else { ring.base };
        (ring.kick, ring.call, ring.placed, ring.base) = (None, None, false, next);
        Ok([index, u32::from(next)].map(u32::to_le_bytes).as_flattened().to_vec())
    }
}
