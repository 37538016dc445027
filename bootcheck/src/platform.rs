//! The small devices that every PC has and every guest expects: clock and CMOS, keyboard controller, power
//! management, the reset port.

mod cmos;
mod i8042;
mod pm;

pub use cmos::Cmos;
pub use i8042::I8042;
pub(crate) use pm::{PM_BASE, PM_CONTROL, PM_LEN, PM_RESET, PM_SLEEP_OFF, PM_TIMER, RESET_PORT, SCI};
pub use pm::{PowerManagement, ResetPort};
