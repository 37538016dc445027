//! `getopt_long` as the GNU C library has it, for a personality whose scripts expect it: letters in bundles, values
//! attached or apart, long names cut short as far as they are clear, options after operands, and its very words.

/// Whether an option has a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value {
    None,
    Required,
}

/// An option: its letter (if it has one), its name, and whether a value follows.
pub(super) type Known = (Option<char>, &'static str, Value);

/// An option as it was found: its long name and its value.
pub(super) type Found = (&'static str, Option<String>);

/// Takes a command line apart, up to the first mistake: `each` is called with one option after the other, in their
/// order, and what is no option comes back.
///
/// # Errors
/// The mistake in getopt's words, or what `each` returns.
pub(super) fn parse<E: From<Mistake>>(
    known: &[Known],
    words: &[String],
    mut each: impl FnMut(Found) -> Result<(), E>,
) -> Result<Vec<String>, E> {
    let mut operands = vec![];
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if word == "--" {
            operands.extend(words.by_ref().cloned());
        } else if let Some(long) = word.strip_prefix("--") {
            let (name, attached) = match long.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (long, None),
            };
            let (_, name, value) = find(known, name, long)?;
            let value = match (value, attached) {
                (Value::None, Some(_)) => {
                    return Err(Mistake(format!("option '--{name}' doesn't allow an argument")).into());
                }
                (Value::None, None) => None,
                (Value::Required, attached) => {
                    let missing = || Mistake(format!("option '--{name}' requires an argument"));
                    Some(attached.or_else(|| words.next().cloned()).ok_or_else(missing)?)
                }
            };
            each((name, value))?;
        } else if let Some(letters) = word.strip_prefix('-').filter(|letters| !letters.is_empty()) {
            bundle(known, letters, &mut words, &mut each)?;
        } else {
            operands.push(word.clone());
        }
    }
    Ok(operands)
}

/// What getopt complains of.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mistake(pub(super) String);

/// `-tv`, `-p10809`, `-tp 10809`.
fn bundle<'a, E: From<Mistake>>(
    known: &[Known],
    letters: &str,
    words: &mut impl Iterator<Item = &'a String>,
    each: &mut impl FnMut(Found) -> Result<(), E>,
) -> Result<(), E> {
    let mut rest = letters.chars();
    while let Some(letter) = rest.next() {
        let found = known.iter().find(|(known, ..)| *known == Some(letter));
        let (_, name, value) = found.ok_or_else(|| Mistake(format!("invalid option -- '{letter}'")))?;
        if *value == Value::None {
            each((name, None))?;
            continue;
        }
        let attached = Some(rest.as_str().to_owned()).filter(|value| !value.is_empty());
        let missing = || Mistake(format!("option requires an argument -- '{letter}'"));
        let value = attached.or_else(|| words.next().cloned()).ok_or_else(missing)?;
        return each((name, Some(value)));
    }
    Ok(())
}

/// The option of this name, or the only one that begins so.
fn find(known: &[Known], name: &str, as_typed: &str) -> Result<Known, Mistake> {
    if let Some(exact) = known.iter().find(|(_, known, _)| *known == name) {
        return Ok(*exact);
    }
    let near: Vec<_> = known.iter().filter(|(_, known, _)| known.starts_with(name)).collect();
    match near[..] {
        [] => Err(Mistake(format!("unrecognized option '--{as_typed}'"))),
        [only] => Ok(*only),
        _ => {
            let names: String = near.iter().map(|(_, name, _)| format!(" '--{name}'")).collect();
            Err(Mistake(format!("option '--{as_typed}' is ambiguous; possibilities:{names}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: [Known; 5] = [
        (Some('p'), "port", Value::Required),
        (Some('t'), "persistent", Value::None),
        (Some('v'), "verbose", Value::None),
        (Some('V'), "version", Value::None),
        (None, "fork", Value::None),
    ];

    fn parsed(line: &str) -> Result<(String, Vec<String>), String> {
        let words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
        let mut seen = String::new();
        let operands = parse::<Mistake>(&KNOWN, &words, |(name, value)| {
            seen += &format!("{name}{} ", value.map(|value| format!("={value}")).unwrap_or_default());
            Ok(())
        });
        operands.map(|operands| (seen.trim_end().to_owned(), operands)).map_err(|mistake| mistake.0)
    }

    #[test]
    fn options_and_operands() {
        let of = |line| parsed(line).unwrap();
        assert_eq!(of("-tp 10 file"), ("persistent port=10".into(), vec!["file".into()]));
        assert_eq!(of("-tp10 file -v"), ("persistent port=10 verbose".into(), vec!["file".into()]));
        assert_eq!(of("--po=1 --per - -- -t"), ("port=1 persistent".into(), vec!["-".into(), "-t".into()]));
        assert_eq!(of("--port -t"), ("port=-t".into(), vec![]));
    }

    #[test]
    fn mistakes_in_getopts_words() {
        let of = |line| parsed(line).unwrap_err();
        assert_eq!(of("--foo=1"), "unrecognized option '--foo=1'");
        assert_eq!(of("-tZ"), "invalid option -- 'Z'");
        assert_eq!(of("-p"), "option requires an argument -- 'p'");
        assert_eq!(of("--port"), "option '--port' requires an argument");
        assert_eq!(of("--fork=x"), "option '--fork' doesn't allow an argument");
        assert_eq!(of("--ver"), "option '--ver' is ambiguous; possibilities: '--verbose' '--version'");
    }
}
