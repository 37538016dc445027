//! The small devices that every PC has and every guest expects: clock and CMOS, keyboard controller, power
//! management, the reset ports, the screen.

mod cmos;
mod i8042;
mod pm;
mod vga;

pub use cmos::Cmos;
pub use i8042::{I8042, PORT_92, Port92};
pub(crate) use pm::{PM_BASE, PM_CONTROL, PM_LEN, PM_RESET, PM_SLEEP_OFF, PM_TIMER, RESET_PORT, SCI};
pub use pm::{PowerManagement, ResetPort};
pub use vga::Vga;
pub(crate) use vga::{Screen, VGA_PORT, VGA_PORTS};
