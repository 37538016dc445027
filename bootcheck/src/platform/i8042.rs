//! The keyboard controller, as far as a guest without a keyboard needs it: it can be asked, it says that nothing is
//! connected, it resets the machine.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::bus::Registers;
use crate::engine::Ending;
use crate::power::Power;

const STATUS_OUTPUT: u8 = 1;
const STATUS_SYSTEM: u8 = 4;
const COMMAND_READ_MODE: u8 = 0x20;
const COMMAND_WRITE_MODE: u8 = 0x60;
const COMMAND_SELF_TEST: u8 = 0xaa;
const COMMAND_TEST_PORT: u8 = 0xab;
const COMMAND_READ_OUTPUT: u8 = 0xd0;
const COMMAND_WRITE_OUTPUT: u8 = 0xd1;
const COMMAND_RESET: u8 = 0xfe;

/// The controller at ports 0x60 and 0x64.
#[derive(Debug)]
pub struct I8042 {
    power: Arc<Power>,
    state: Mutex<State>,
    silent: bool,
}

#[derive(Debug, Default)]
struct State {
    mode: u8,
    output: Option<u8>,
    /// The command whose data byte is awaited at port 0x60.
    awaiting: Option<u8>,
}

impl I8042 {
    /// A controller that can reset the machine.
    pub fn new(power: Arc<Power>) -> Self {
        Self { power, state: Mutex::new(State { mode: 0x30, ..State::default() }), silent: false }
    }

    /// One that reads as if it were not there, so that firmware does not wait for a keyboard; it still resets.
    pub fn silent(power: Arc<Power>) -> Self {
        Self { silent: true, ..Self::new(power) }
    }

    fn reset(&self) {
        self.power.end(Ending::Reset { how: "keyboard controller" });
    }

    fn command(&self, state: &mut State, command: u8) {
        state.awaiting = None;
        match command {
            COMMAND_READ_MODE => state.output = Some(state.mode),
            COMMAND_WRITE_MODE | COMMAND_WRITE_OUTPUT => state.awaiting = Some(command),
            COMMAND_SELF_TEST => state.output = Some(0x55),
            COMMAND_TEST_PORT => state.output = Some(0),
            // A20 is open, no reset.
            COMMAND_READ_OUTPUT => state.output = Some(3),
            // 0xf0 to 0xff pulse the output lines that are zero in the low bits; line 0 is the reset.
            COMMAND_RESET | 0xf0..=0xff if command & 1 == 0 => self.reset(),
            _ => {}
        }
    }

    fn data(&self, state: &mut State, value: u8) {
        match state.awaiting.take() {
            Some(COMMAND_WRITE_MODE) => state.mode = value,
            Some(COMMAND_WRITE_OUTPUT) if value & 1 == 0 => self.reset(),
            // A byte to a keyboard that is not there is never answered.
            _ => {}
        }
    }
}

impl Registers for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.state.lock();
        let value = match offset {
            _ if self.silent => 0xff,
            0 => state.output.take().unwrap_or(0),
            4 => STATUS_SYSTEM | if state.output.is_some() { STATUS_OUTPUT } else { 0 },
            _ => 0xff,
        };
        data.fill(value);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [value, ..] = data else { return };
        let mut state = self.state.lock();
        match offset {
            0 => self.data(&mut state, *value),
            4 => self.command(&mut state, *value),
            _ => {}
        }
    }
}

/// System control port A of the PS/2: bit 1 opens A20, bit 0 resets.
#[derive(Debug)]
pub struct Port92 {
    power: Arc<Power>,
}

/// Where it is.
pub const PORT_92: u16 = 0x92;

impl Port92 {
    /// A port that can reset the machine. A20 is open.
    pub fn new(power: Arc<Power>) -> Self {
        Self { power }
    }
}

impl Registers for Port92 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(2);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|value| value & 1 != 0) {
            self.power.end(Ending::Reset { how: "port 0x92" });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let power = Arc::new(Power::default());
        let controller = I8042::new(power.clone());
        for command in (0..=0xff).filter(|c| *c != 0xd1 && (*c < 0xf0 || c & 1 == 1)) {
            controller.write(4, &[command]);
        }
        assert!(!power.is_off());
        controller.write(4, &[0xfe]);
        assert_eq!(power.ending(), Some(Ending::Reset { how: "keyboard controller" }));
    }

    #[test]
    fn port_92_opens_a20_and_resets() {
        let power = Arc::new(Power::default());
        let port = Port92::new(power.clone());
        let mut data = [0];
        port.read(0, &mut data);
        port.write(0, &data);
        assert_eq!((data, power.is_off()), ([2], false));
        port.write(0, &[3]);
        assert_eq!(power.ending(), Some(Ending::Reset { how: "port 0x92" }));
    }

    #[test]
    fn the_self_test_is_passed() {
        let controller = I8042::new(Arc::default());
        let mut data = [0];
        controller.write(4, &[COMMAND_SELF_TEST]);
        controller.read(4, &mut data);
        assert_eq!(data[0] & STATUS_OUTPUT, STATUS_OUTPUT);
        controller.read(0, &mut data);
        assert_eq!(data[0], 0x55);
        controller.read(4, &mut data);
        assert_eq!(data[0] & STATUS_OUTPUT, 0);
    }
}
