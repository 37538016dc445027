//! Which of the clients with a good certificate may come in: QEMU's `authz-simple` and `authz-list`.
//!
//! The identity of a client is its certificate's distinguished name as in RFC 4514, `CN=client,O=Example,C=GB`.

/// Who may come in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authz {
    /// One identity, written out.
    Simple {
        /// The only one.
        identity: String,
    },
    /// The first rule that matches decides.
    List {
        /// In the order in which they are tried.
        rules: Vec<Rule>,
        /// What happens to those whom no rule matches.
        otherwise_allowed: bool,
    },
}

/// A rule of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// An identity, or a pattern of it.
    pub pattern: String,
    /// Whether `*` (anything), `?` (one character) and `[...]` (one of these) are special in the pattern.
    pub glob: bool,
    /// What happens to those whom the rule matches.
    pub allowed: bool,
}

impl Authz {
    /// Whether `identity` may come in.
    pub fn allows(&self, identity: &str) -> bool {
        match self {
            Self::Simple { identity: only } => identity == only,
            Self::List { rules, otherwise_allowed } => rules
                .iter()
                .find(|rule| rule.matches(identity))
                .map_or(*otherwise_allowed, |rule| rule.allowed),
        }
    }
}

impl Rule {
    fn matches(&self, identity: &str) -> bool {
        if !self.glob {
            return self.pattern == identity;
        }
        let pattern: Vec<char> = self.pattern.chars().collect();
        let text: Vec<char> = identity.chars().collect();
        glob(&pattern, &text)
    }
}

/// Shell patterns (POSIX.1, section 2.13). Goes back to the last `*` only, so that no pattern takes long.
fn glob(pattern: &[char], text: &[char]) -> bool {
    let (mut at, mut read) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while read < text.len() {
        if pattern.get(at) == Some(&'*') {
            star = Some((at + 1, read));
            at += 1;
            continue;
        }
        if let Some(taken) = one(&pattern[at..], text[read]) {
            at += taken;
            read += 1;
            continue;
        }
        let Some((after, swallowed)) = star else { return false };
        star = Some((after, swallowed + 1));
        (at, read) = (after, swallowed + 1);
    }
    pattern[at..].iter().all(|&rest| rest == '*')
}

/// How many characters of the pattern match one of the text; `None` if they do not.
fn one(pattern: &[char], found: char) -> Option<usize> {
    match *pattern.first()? {
        '?' => Some(1),
        '\\' if pattern.len() > 1 => (pattern[1] == found).then_some(2),
        '[' => match class(pattern) {
            Some((inside, len)) => among(inside, found).then_some(len),
            None => (found == '[').then_some(1),
        },
        literal => (literal == found).then_some(1),
    }
}

/// What stands between `[` and `]`, and the length of it all.
fn class(pattern: &[char]) -> Option<(&[char], usize)> {
    let negated = matches!(pattern.get(1), Some('!' | '^'));
    // A bracket that comes first is meant.
    let first = 1 + usize::from(negated) + 1;
    let end = (first..pattern.len()).find(|&at| pattern[at] == ']')?;
    Some((&pattern[1..end], end + 1))
}

fn among(class: &[char], found: char) -> bool {
    let negated = matches!(class.first(), Some('!' | '^'));
    let mut rest = &class[usize::from(negated)..];
    let mut matched = false;
    while let Some(&low) = rest.first() {
        if rest.len() > 2 && rest[1] == '-' {
            matched |= (low..=rest[2]).contains(&found);
            rest = &rest[3..];
        } else {
            matched |= low == found;
            rest = &rest[1..];
        }
    }
    matched != negated
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(pattern: &str, glob: bool, allowed: bool) -> Rule {
        Rule { pattern: pattern.to_owned(), glob, allowed }
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let rules = vec![rule("CN=bad,O=X", false, false), rule("CN=*,O=X", true, true)];
        let list = Authz::List { rules, otherwise_allowed: false };
        assert!(!list.allows("CN=bad,O=X"));
        assert!(list.allows("CN=good,O=X"));
        assert!(!list.allows("CN=good,O=Y"));
        assert!(!list.allows(""));
        assert!(!Authz::Simple { identity: "CN=*".into() }.allows("CN=a"));
        assert!(Authz::Simple { identity: "CN=a".into() }.allows("CN=a"));
        assert!(Authz::List { rules: vec![], otherwise_allowed: true }.allows("CN=a"));
    }

    #[test]
    fn patterns_are_the_shells() {
        let matches = |pattern: &str, text: &str| rule(pattern, true, true).matches(text);
        for (pattern, text) in [
            ("*", ""),
            ("*", "abc"),
            ("a?c", "abc"),
            ("a*b*c", "aXbYbZc"),
            ("[a-c]x", "bx"),
            ("[!a]", "b"),
            ("[]]", "]"),
            ("\\*", "*"),
            ("[a", "[a"),
            ("a**", "a"),
        ] {
            assert!(matches(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in
            [("a", ""), ("a?", "a"), ("a*b", "aXc"), ("[a-c]", "d"), ("[!a]", "a"), ("\\*", "x"), ("", "a")]
        {
            assert!(!matches(pattern, text), "{pattern} {text}");
        }
        // Exponential in a naive matcher.
        assert!(!matches(&"a*".repeat(50), &"a".repeat(2000).replace("aaaa", "aaab")[..40]));
        assert!(!matches(&format!("{}b", "a*".repeat(50)), &"a".repeat(2000)));
    }
}
