//! `qemu-nbd -L`: what another server offers.

use super::Words;
use crate::app::App;
use crate::exit::{Failure, Outcome};

pub(super) fn run(_words: &Words, _app: &App) -> Outcome {
    Err(Failure::usage("-L is not in this version of vimg"))
}
