//! XML as a person would indent it.

/// A document that is being written.
#[derive(Debug, Default)]
pub(super) struct Xml {
    text: String,
    depth: usize,
}

/// The attributes of an element.
pub(super) type Attributes<'a> = &'a [(&'a str, &'a str)];

impl Xml {
    /// A document with the declaration that OVF's readers expect.
    pub(super) fn declared() -> Self {
        Self { text: "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n".to_owned(), depth: 0 }
    }

    /// The text so far.
    pub(super) fn finish(self) -> String {
        self.text
    }

    /// `<name attributes/>`
    pub(super) fn leaf(&mut self, name: &str, attributes: Attributes<'_>) {
        self.start(name, attributes);
        self.text.push_str("/>\n");
    }

    /// `<name attributes>text</name>`
    pub(super) fn text(&mut self, name: &str, attributes: Attributes<'_>, text: &str) {
        self.start(name, attributes);
        self.text.push('>');
        escape(text, false, &mut self.text);
        self.end(name);
    }

    /// An element with others inside.
    pub(super) fn element(&mut self, name: &str, attributes: Attributes<'_>, inside: impl FnOnce(&mut Self)) {
        self.start(name, attributes);
        self.text.push_str(">\n");
        self.depth += 1;
        inside(self);
        self.depth -= 1;
        self.indent();
        self.end(name);
    }

    fn indent(&mut self) {
        for _ in 0..self.depth {
            self.text.push_str("  ");
        }
    }

    fn start(&mut self, name: &str, attributes: Attributes<'_>) {
        self.indent();
        self.text.push('<');
        self.text.push_str(name);
        for (key, value) in attributes {
            self.text.push(' ');
            self.text.push_str(key);
            self.text.push_str("=\"");
            escape(value, true, &mut self.text);
            self.text.push('"');
        }
    }

    fn end(&mut self, name: &str) {
        self.text.push_str("</");
        self.text.push_str(name);
        self.text.push_str(">\n");
    }
}

/// Appends `text` as it stands in an element or a quoted attribute. Characters that XML 1.0 cannot hold (section 2.2)
/// become U+FFFD; what a parser would turn into something else (section 2.11, 3.3.3) is written as a reference.
fn escape(text: &str, is_attribute: bool, into: &mut String) {
    for c in text.chars() {
        match c {
            '&' => into.push_str("&amp;"),
            '<' => into.push_str("&lt;"),
            '>' => into.push_str("&gt;"),
            '"' if is_attribute => into.push_str("&quot;"),
            '\t' if is_attribute => into.push_str("&#9;"),
            '\n' if is_attribute => into.push_str("&#10;"),
            '\t' | '\n' => into.push(c),
            '\r' => into.push_str("&#13;"),
            '\0'..='\x1f' | '\u{fffe}' | '\u{ffff}' => into.push('\u{fffd}'),
            c => into.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_indented_and_text_is_escaped() {
        let mut xml = Xml::default();
        xml.element("a", &[("b", "1 \"<&'\n")], |xml| {
            xml.leaf("c", &[]);
            xml.text("d", &[("e", "f")], "x < y &\u{1}\n");
        });
        assert_eq!(
            xml.finish(),
            "<a b=\"1 &quot;&lt;&amp;'&#10;\">\n  <c/>\n  <d e=\"f\">x &lt; y &amp;\u{fffd}\n</d>\n</a>\n"
        );
    }
}
