//! XML documents, looked at by local names: what prefix a program gives a namespace is its own business, and some get the
//! namespaces wrong.
//!
//! The parser is `roxmltree`: a read-only tree without unsafe code, entities of one's own are refused (no DTD), the number of
//! nodes is bounded, and parsing does not recurse with the depth of the document. A streaming parser would save memory that
//! 16 MiB do not need, and would cost the order-independent look-ups that OVF is made of.

use block::{Error, Result};
use roxmltree::{Document, Node, ParsingOptions};

/// The most nodes of a document.
const MOST_NODES: u32 = 400_000;

/// Parses a document.
///
/// # Errors
/// `Invalid`, with line and column.
pub(crate) fn parse(text: &str) -> Result<Document<'_>> {
    let options = ParsingOptions { nodes_limit: MOST_NODES, ..ParsingOptions::default() };
    Document::parse_with_options(text, options)
        .map_err(|error| Error::invalid(format!("not valid XML: {error}")))
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

    /// A stack that a document can exhaust would be the end of the process.
    #[test]
    fn depth_costs_no_stack() {
        let depth = 300_000;
        let text = format!("{}{}", "<a>".repeat(depth), "</a>".repeat(depth));
        let walk = || {
            let document = parse(&text).unwrap();
            document.root_element().descendants().count()
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, walk).unwrap();
            assert_eq!(thread.join().unwrap(), depth);
        });
    }
}
