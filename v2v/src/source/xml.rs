//! XML documents, looked at by local names: what prefix a program gives a namespace is its own business, and some get the
//! namespaces wrong.
//!
//! The parser is `roxmltree`: a read-only tree without unsafe code, entities of one's own are refused (no DTD), the number of
//! nodes is bounded, and parsing does not recurse with the depth of the document. Its time is quadratic in the attributes of
//! an element, and grows with depth times namespaces, so that these are counted before ([`check_bounds`]). A streaming parser would save memory that
//! 16 MiB do not need, and would cost the order-independent look-ups that OVF is made of.

use block::{Error, Result};
use roxmltree::{Document, Node, ParsingOptions};

/// The most nodes of a document.
const MOST_NODES: u32 = 400_000;

/// The most attributes of an element.
const MOST_ATTRIBUTES: usize = 256;
/// The most declarations of namespaces in a document.
const MOST_NAMESPACES: usize = 512;
/// How deep elements may be nested; real descriptions are less than 20 deep.
const MOST_DEPTH: usize = 256;

/// Parses a document.
///
/// # Errors
/// `Invalid`, with line and column.
pub(crate) fn parse(text: &str) -> Result<Document<'_>> {
    check_bounds(text)?;
    let options = ParsingOptions { nodes_limit: MOST_NODES, ..ParsingOptions::default() };
    Document::parse_with_options(text, options)
        .map_err(|error| Error::invalid(format!("not valid XML: {error}")))
}

/// Refuses what would take the parser long. Knows just enough of XML not to count what is no tag; what is not well-formed is
/// for the parser to say.
fn check_bounds(text: &str) -> Result<()> {
    let wrong = |what: &str, most: usize| Err(Error::invalid(format!("the XML has {what} than {most}")));
    if text.matches("xmlns").count() > MOST_NAMESPACES {
        return wrong("more declarations of namespaces", MOST_NAMESPACES);
    }
    let (mut rest, mut depth) = (text, 0_usize);
    while let Some(at) = rest.find('<') {
        rest = rest.get(at..).unwrap_or_default();
        let opaque = [("<!--", "-->"), ("<![CDATA[", "]]>"), ("<?", "?>"), ("<!", ">")];
        if let Some((_, end)) = opaque.into_iter().find(|(begin, _)| rest.starts_with(begin)) {
            let Some(at) = rest.find(end) else { return Ok(()) };
            rest = rest.get(at + end.len()..).unwrap_or_default();
            continue;
        }
        let (len, attributes) = tag(rest);
        if attributes > MOST_ATTRIBUTES {
            return wrong("an element with more attributes", MOST_ATTRIBUTES);
        }
        let whole = rest.get(..len).unwrap_or(rest);
        match () {
            () if whole.starts_with("</") => depth = depth.saturating_sub(1),
            () if whole.ends_with("/>") => {}
            () => depth += 1,
        }
        if depth > MOST_DEPTH {
            return wrong("elements nested deeper", MOST_DEPTH);
        }
        rest = rest.get(len..).unwrap_or_default();
    }
    Ok(())
}

/// Length of a tag, and how many attributes it has.
fn tag(text: &str) -> (usize, usize) {
    let (mut quote, mut attributes) = (None, 0);
    for (at, byte) in text.bytes().enumerate() {
        match (byte, quote) {
            (byte, Some(open)) if byte == open => quote = None,
            (_, Some(_)) => {}
            (b'"' | b'\'', None) => quote = Some(byte),
            (b'=', None) => attributes += 1,
            (b'>', None) => return (at + 1, attributes),
            _ => {}
        }
    }
    (text.len(), attributes)
}

/// What descriptions need of an element.
pub(crate) trait NodeExt<'a, 'i: 'a> {
    /// Whether it is an element of that name, whatever its namespace.
    fn is(&self, name: &str) -> bool;
    /// The child elements of that name.
    fn all(&self, name: &str) -> impl Iterator<Item = Node<'a, 'i>>;
    /// The first of them.
    fn one(&self, name: &str) -> Option<Node<'a, 'i>>;
    /// The first element at the end of a path of names.
    fn at(&self, path: &[&str]) -> Option<Node<'a, 'i>>;
    /// Its text, trimmed; `None` if there is none.
    fn words(&self) -> Option<&'a str>;
    /// The text of its first child of that name.
    fn text_of(&self, name: &str) -> Option<&'a str>;
    /// Its attribute of that local name, trimmed; `None` if it is empty.
    fn attr(&self, name: &str) -> Option<&'a str>;
}

impl<'a, 'i: 'a> NodeExt<'a, 'i> for Node<'a, 'i> {
    fn is(&self, name: &str) -> bool {
        self.is_element() && self.tag_name().name() == name
    }

    fn all(&self, name: &str) -> impl Iterator<Item = Node<'a, 'i>> {
        self.children().filter(move |child| child.is(name))
    }

    fn one(&self, name: &str) -> Option<Self> {
        self.all(name).next()
    }

    fn at(&self, path: &[&str]) -> Option<Self> {
        path.iter().try_fold(*self, |node, name| node.one(name))
    }

    fn words(&self) -> Option<&'a str> {
        self.text().map(str::trim).filter(|text| !text.is_empty())
    }

    fn text_of(&self, name: &str) -> Option<&'a str> {
        self.one(name)?.words()
    }

    fn attr(&self, name: &str) -> Option<&'a str> {
        let found = self.attributes().find(|attribute| attribute.name() == name)?;
        Some(found.value().trim()).filter(|value| !value.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_count_and_prefixes_do_not() {
        let text = "<e xmlns:o='urn:o'><o:a o:id=' 1 '> x </o:a><a/></e>";
        let document = parse(text).unwrap();
        let root = document.root_element();
        assert_eq!(root.all("a").count(), 2);
        assert_eq!(root.one("a").unwrap().attr("id"), Some("1"));
        assert_eq!(root.text_of("a"), Some("x"));
        assert!(root.at(&["a", "b"]).is_none());
    }

    #[test]
    fn bombs_do_not_go_off() {
        let bomb = "<!DOCTYPE a [<!ENTITY b \"bbbb\"><!ENTITY c \"&b;&b;\">]><a>&c;</a>";
        assert!(parse(bomb).unwrap_err().to_string().contains("XML"));
        let external = "<!DOCTYPE a [<!ENTITY b SYSTEM \"file:///etc/passwd\">]><a>&b;</a>";
        parse(external).unwrap_err();
        parse(&"<a/>".repeat(500_000)).unwrap_err();
        parse(&format!("<a>{}</a>", "<b/>".repeat(500_000))).unwrap_err();
    }

    /// What is quadratic in the parser, or would cost a stack, is refused before.
    #[test]
    fn extremes_are_refused_at_once() {
        let started = std::time::Instant::now();
        let many = |count: usize, one: &dyn Fn(usize) -> String| (0..count).map(one).collect::<String>();
        let attributes = |count| format!("<a {}/>", many(count, &|index| format!("a{index}='>' ")));
        let deep = |depth| format!("{}{}", "<a>".repeat(depth), "</a>".repeat(depth));
        let spaces = |count| {
            format!(
                "{}{}",
                many(count, &|index| format!("<a xmlns:n{index}='{index}'>")),
                "</a>".repeat(count)
            )
        };
        for (text, wanted) in [
            (attributes(500_000), "attributes"),
            (deep(300_000), "nested"),
            (spaces(100_000), "namespaces"),
            (format!("<a b='<' c=\"'\" {}", "x=".repeat(1 << 20)), "attributes"),
        ] {
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
        assert!(started.elapsed().as_secs() < 20);
        for text in
            [attributes(250), deep(250), spaces(200), "<a><!-- <b> = = --><![CDATA[<c>]]><d/></a>".to_owned()]
        {
            parse(&text).unwrap();
        }
        parse("<a b='").unwrap_err();
        parse("<!-- ").unwrap_err();
    }
}
