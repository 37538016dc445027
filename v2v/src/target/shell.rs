//! Words of a POSIX shell.

/// `text` as one word, whatever is in it (POSIX.1-2017, Shell Command Language, 2.2.2).
pub(super) fn quote(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    match !text.is_empty() && text.chars().all(plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

/// `text` as it can stand in a comment.
pub(super) fn comment(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_gives_every_word_back() {
        for text in ["plain", "", "a b", "it's", "$HOME `id` \\ \"x\" !", "-n", "~", "*", "a\nb", "ä", "#"] {
            let output = std::process::Command::new("sh")
                .args(["-c", &format!("printf '<%s>' {} ", quote(text))])
                .output()
                .unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("<{text}>"));
        }
        assert_eq!(comment("a\nrm -rf /\r"), "a rm -rf / ");
    }
}
