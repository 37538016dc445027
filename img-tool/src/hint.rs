//! How errors look: a line that says what is wrong, and under it what to do about it.

use block::Error;

/// Beginnings of hints that qemu-img prints, too, as lines of their own.
const QEMU_HINTS: [&str; 3] =
    ["Is another process using the image", "Try block-dirty-bitmap-remove", "Try --skip-broken-bitmaps"];

/// An error with its hints. As qemu-img or qemu-nbd, only what that would say.
pub(crate) fn render(error: &Error, program: &str, colour: bool) -> String {
    let mut text = format!("{program}: {error}\n");
    for hint in error.hints() {
        if QEMU_HINTS.iter().any(|start| hint.starts_with(start)) {
            text.push_str(&format!("{hint}\n"));
        } else if program == "vimg" {
            text.push_str(&line(hint, colour));
        }
    }
    text
}

/// A hint.
pub(crate) fn line(hint: &str, colour: bool) -> String {
    if colour { format!("\x1b[36mhint:\x1b[0m {hint}\n") } else { format!("hint: {hint}\n") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_stand_on_lines_of_their_own() {
        let error = Error::usage("no").hint("do this").hint("or that");
        assert_eq!(render(&error, "vimg", false), "vimg: no\nhint: do this\nhint: or that\n");
        assert_eq!(render(&error, "qemu-img", false), "qemu-img: no\n");
    }

    #[test]
    fn the_question_about_locks_is_qemus_own() {
        let error = Error::usage("locked").hint("Is another process using the image [x]?").hint("pid 1");
        assert_eq!(
            render(&error, "qemu-img", false),
            "qemu-img: locked\nIs another process using the image [x]?\n"
        );
    }
}
