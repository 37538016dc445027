//! The serial console: a 16550A (National Semiconductor's data sheet PC16550D) with its FIFOs.
//!
//! What the guest transmits is handed to a sink at once; the transmitter is always empty. What is typed waits in a
//! queue of any length behind the receiver.

use std::collections::VecDeque;
use std::fmt;

use parking_lot::Mutex;

use crate::bus::Registers;
use crate::vm::Line;

/// The first serial port of a PC.
pub(crate) const COM1: u16 = 0x3f8;
/// Its interrupt.
pub(crate) const COM1_IRQ: u32 = 4;
/// Most typed bytes that wait for the guest; more are dropped.
const MAX_TYPED: usize = 1 << 16;
/// So many bytes without the transmitter's interrupt, and the guest polls.
const POLLED_BYTES: u32 = 64;
/// Bytes that are gathered before the sink sees them, should the guest not pause.
const GATHER: usize = 4096;

// Interrupt enable register.
const IER_RECEIVED: u8 = 1;
const IER_EMPTY: u8 = 2;
const IER_MASK: u8 = 0x0f;
// Interrupt identification register.
const IIR_NONE: u8 = 1;
const IIR_EMPTY: u8 = 2;
const IIR_RECEIVED: u8 = 4;
const IIR_FIFO: u8 = 0xc0;
// FIFO control register.
const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_RECEIVED: u8 = 2;
// Line control register.
const LCR_DLAB: u8 = 0x80;
// Modem control register.
const MCR_OUT2: u8 = 8;
const MCR_LOOP: u8 = 0x10;
const MCR_MASK: u8 = 0x1f;
// Line status register: data ready; transmitter holding register empty, transmitter empty.
const LSR_READY: u8 = 1;
const LSR_EMPTY: u8 = 0x60;
// Modem status register: clear to send, data set ready, carrier.
const MSR_READY: u8 = 0xb0;

/// Receives what the guest transmits.
pub type Sink = Box<dyn Fn(&[u8]) + Send + Sync>;

/// The port.
pub struct Serial {
    state: Mutex<State>,
    line: Line,
    /// Locked while the sink is called, before the state: what is handed over stays in order, and the sink may type.
    sink: Mutex<Sink>,
    /// Called when something waits for [`flush`](Self::flush).
    pending: Box<dyn Fn() + Send + Sync>,
    /// Switches whether transmitted bytes may wait for the guest's next exit.
    coalesce: Box<dyn Fn(bool) + Send + Sync>,
}

#[derive(Debug, Default)]
struct State {
    ier: u8,
    fifo: bool,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: [u8; 2],
    /// The transmitter has become empty, and nobody has read so.
    empty_pending: bool,
    received: VecDeque<u8>,
    gathered: Vec<u8>,
    high: bool,
    coalesced: bool,
    /// Bytes transmitted since the transmitter's interrupt was last enabled.
    polled: u32,
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Serial {
    /// A port at the end of `line` that transmits to `sink`: whole lines at once, the rest when
    /// [`flush`](Self::flush) is called, for which `pending` asks.
    pub fn new(line: Line, sink: Sink, pending: Box<dyn Fn() + Send + Sync>) -> Self {
        let state = State { divisor: [12, 0], lcr: 3, mcr: MCR_OUT2, ..State::default() };
        Self { state: Mutex::new(state), line, sink: Mutex::new(sink), pending, coalesce: Box::new(|_| ()) }
    }

    /// The same port, the transmitted bytes of which may wait for the guest's next exit while `coalesce` has been
    /// called with `true`. A guest that polls the line status exits for that anyway; one that waits for the
    /// transmitter's interrupt must not wait.
    #[must_use]
    pub fn coalescing(mut self, coalesce: Box<dyn Fn(bool) + Send + Sync>) -> Self {
        coalesce(true);
        self.coalesce = coalesce;
        self.state.get_mut().coalesced = true;
        self
    }

    /// Bytes that are transmitted without the interrupt say that the guest polls again. Switching is not cheap: it
    /// takes some of them.
    fn settle_coalescing(&self, state: &mut State, transmitted: bool) {
        if state.ier & IER_EMPTY != 0 {
            state.polled = 0;
            if std::mem::take(&mut state.coalesced) {
                (self.coalesce)(false);
            }
        } else if transmitted && !state.coalesced {
            state.polled += 1;
            if state.polled == POLLED_BYTES {
                state.coalesced = true;
                (self.coalesce)(true);
            }
        }
    }

    /// Types bytes, as far as there is room.
    pub fn type_bytes(&self, bytes: &[u8]) {
        let mut state = self.state.lock();
        let room = MAX_TYPED.saturating_sub(state.received.len());
        state.received.extend(bytes.iter().take(room));
        self.interrupt(&mut state);
    }

    /// Hands over what has been transmitted.
    pub fn flush(&self) {
        let sink = self.sink.lock();
        let gathered = std::mem::take(&mut self.state.lock().gathered);
        if !gathered.is_empty() {
            sink(&gathered);
        }
    }

    fn interrupt(&self, state: &mut State) {
        let high = state.mcr & MCR_OUT2 != 0 && state.identify() != IIR_NONE;
        if high != state.high {
            state.high = high;
            self.line.set(high);
        }
    }

    fn read_register(&self, register: u64) -> u8 {
        let mut state = self.state.lock();
        let dlab = state.lcr & LCR_DLAB != 0;
        let value = match (register, dlab) {
            (0, true) => state.divisor[0],
            (1, true) => state.divisor[1],
            (0, false) => state.received.pop_front().unwrap_or(0),
            (1, false) => state.ier,
            (2, _) => state.read_identification(),
            (3, _) => state.lcr,
            (4, _) => state.mcr,
            (5, _) => LSR_EMPTY | if state.received.is_empty() { 0 } else { LSR_READY },
            (6, _) => state.modem_status(),
            (7, _) => state.scratch,
            _ => 0xff,
        };
        self.interrupt(&mut state);
        value
    }

    fn write_register(&self, register: u64, value: u8) {
        let mut state = self.state.lock();
        let dlab = state.lcr & LCR_DLAB != 0;
        let gathered = state.gathered.len();
        match (register, dlab) {
            (0, true) => state.divisor[0] = value,
            (1, true) => state.divisor[1] = value,
            (0, false) => state.transmit(value),
            (1, false) => state.enable(value),
            (2, _) => state.control_fifo(value),
            (3, _) => state.lcr = value,
            (4, _) => state.mcr = value & MCR_MASK,
            (7, _) => state.scratch = value,
            _ => {}
        }
        self.interrupt(&mut state);
        let transmitted = state.gathered.len() > gathered;
        self.settle_coalescing(&mut state, transmitted);
        if !transmitted {
            return;
        }
        let whole = state.gathered.len() >= GATHER || value == b'\n';
        drop(state);
        if whole {
            self.flush();
        } else if gathered == 0 {
            (self.pending)();
        }
    }
}

impl State {
    fn identify(&self) -> u8 {
        if self.ier & IER_RECEIVED != 0 && !self.received.is_empty() {
            IIR_RECEIVED
        } else if self.ier & IER_EMPTY != 0 && self.empty_pending {
            IIR_EMPTY
        } else {
            IIR_NONE
        }
    }

    /// Reading the identification of "transmitter empty" acknowledges it.
    fn read_identification(&mut self) -> u8 {
        let identification = self.identify();
        if identification == IIR_EMPTY {
            self.empty_pending = false;
        }
        identification | if self.fifo { IIR_FIFO } else { 0 }
    }

    fn transmit(&mut self, value: u8) {
        if self.mcr & MCR_LOOP != 0 {
            if self.received.len() < MAX_TYPED {
                self.received.push_back(value);
            }
        } else {
            self.gathered.push(value);
        }
        self.empty_pending = true;
    }

    /// Enabling the transmitter's interrupt raises it at once when the transmitter is empty, which it always is.
    fn enable(&mut self, value: u8) {
        if value & !self.ier & IER_EMPTY != 0 {
            self.empty_pending = true;
        }
        self.ier = value & IER_MASK;
    }

    fn control_fifo(&mut self, value: u8) {
        self.fifo = value & FCR_ENABLE != 0;
        if self.mcr & MCR_LOOP != 0 && value & FCR_CLEAR_RECEIVED != 0 {
            self.received.clear();
        }
    }

    /// In loopback the modem's outputs are its inputs: DTR to DSR, RTS to CTS, OUT1 to RI, OUT2 to DCD.
    fn modem_status(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MSR_READY;
        }
        let m = self.mcr;
        (m & 1) << 5 | (m & 2) << 3 | (m & 4) << 4 | (m & 8) << 4
    }
}

impl Registers for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let [first, ..] = data {
            *first = self.read_register(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let [first, ..] = data {
            self.write_register(offset, *first);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::vm::{FakeVm, Lines};

    struct Bench {
        vm: Arc<FakeVm>,
        serial: Serial,
        out: Arc<Mutex<Vec<u8>>>,
    }

    fn bench() -> Bench {
        let vm = Arc::new(FakeVm::default());
        let out = Arc::new(Mutex::new(vec![]));
        let sink = {
            let out = out.clone();
            Box::new(move |bytes: &[u8]| out.lock().extend_from_slice(bytes))
        };
        Bench {
            serial: Serial::new(Lines::new(vm.clone()).line(COM1_IRQ, 0), sink, Box::new(|| ())),
            vm,
            out,
        }
    }

    impl Bench {
        fn interrupts(&self) -> bool {
            self.vm.high.lock().contains(&COM1_IRQ)
        }
    }

    #[test]
    fn what_is_transmitted_arrives_in_lines() {
        let b = bench();
        for &byte in b"hello\nworld" {
            b.serial.write(0, &[byte]);
        }
        assert_eq!(*b.out.lock(), b"hello\n");
        b.serial.flush();
        assert_eq!(*b.out.lock(), b"hello\nworld");
    }

    #[test]
    fn the_divisor_is_not_transmitted() {
        let b = bench();
        b.serial.write(3, &[0x83]);
        b.serial.write(0, &[1]);
        b.serial.write(3, &[3]);
        b.serial.flush();
        assert!(b.out.lock().is_empty());
    }

    #[test]
    fn an_empty_transmitter_interrupts_once_per_write() {
        let b = bench();
        b.serial.write(1, &[IER_EMPTY]);
        assert!(b.interrupts());
        assert_eq!(b.serial.read_register(2) & 0xf, IIR_EMPTY);
        assert!(!b.interrupts(), "reading acknowledges");
        b.serial.write(0, b"x");
        assert!(b.interrupts());
        b.serial.write(1, &[0]);
        assert!(!b.interrupts());
    }

    #[test]
    fn what_is_typed_interrupts_until_it_is_read() {
        let b = bench();
        b.serial.type_bytes(b"ab");
        assert!(!b.interrupts(), "not enabled");
        b.serial.write(1, &[IER_RECEIVED]);
        assert!(b.interrupts());
        assert_eq!(b.serial.read_register(5) & LSR_READY, LSR_READY);
        assert_eq!([b.serial.read_register(0), b.serial.read_register(0)], *b"ab");
        assert!(!b.interrupts());
        assert_eq!(b.serial.read_register(5) & LSR_READY, 0);
    }

    #[test]
    fn writes_may_wait_only_while_nobody_waits_for_the_interrupt() {
        let calls = Arc::new(Mutex::new(vec![]));
        let log = calls.clone();
        let b = bench();
        let serial = b.serial.coalescing(Box::new(move |on| log.lock().push(on)));
        serial.write(1, &[IER_EMPTY]);
        serial.write(0, b"x");
        serial.write(1, &[0]);
        assert_eq!(*calls.lock(), [true, false]);
        for _ in 0..2 * POLLED_BYTES {
            serial.write(0, b"x");
        }
        assert_eq!(*calls.lock(), [true, false, true]);
    }

    #[test]
    fn loopback_is_how_drivers_find_the_port() {
        let b = bench();
        b.serial.write(4, &[MCR_LOOP | 0x0a]);
        assert_eq!(b.serial.read_register(6) & 0xf0, 0x90);
        b.serial.write(2, &[FCR_ENABLE]);
        assert_eq!(b.serial.read_register(2) & IIR_FIFO, IIR_FIFO);
    }
}
