//! The report as a JUnit XML file, which build servers read: a suite of test cases, one for each image.

use std::fmt::Write as _;

use super::Report;
use crate::verdict::Verdict;

/// The file.
pub fn junit(reports: &[Report]) -> String {
    let count = |code| reports.iter().filter(|report| report.verdict.exit_code() == code).count();
    let time: f64 = reports.iter().map(|report| report.elapsed.as_secs_f64()).sum();
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let _ = writeln!(
        xml,
        "<testsuites>\n  <testsuite name=\"vimg bootcheck\" tests=\"{}\" failures=\"{}\" errors=\"{}\" skipped=\"0\" time=\"{time:.3}\">",
        reports.len(),
        count(1),
        count(2),
    );
    for report in reports {
        case(&mut xml, report);
    }
    xml.push_str("  </testsuite>\n</testsuites>\n");
    xml
}

fn case(xml: &mut String, report: &Report) {
    let firmware = report.firmware.as_ref().map(|used| format!(" [{}]", used.firmware.name()));
    let name = escape(&format!("{}{}", report.image, firmware.unwrap_or_default()));
    let time = report.elapsed.as_secs_f64();
    let _ = writeln!(xml, "    <testcase classname=\"bootcheck\" name=\"{name}\" time=\"{time:.3}\">");
    let headline = escape(&report.headline());
    let kind = match &report.verdict {
        Verdict::Booted => None,
        Verdict::NotBooted { reason, .. } => Some(("failure", reason.name())),
        Verdict::NotChecked { .. } => Some(("error", "not-checked")),
    };
    if let Some((element, kind)) = kind {
        let text = escape(&report.to_text(true));
        let _ = writeln!(xml, "      <{element} type=\"{kind}\" message=\"{headline}\">{text}</{element}>");
    }
    if !report.watched.tail.is_empty() {
        let tail = escape(&report.watched.tail.join("\n"));
        let _ = writeln!(xml, "      <system-out>{tail}</system-out>");
    }
    xml.push_str("    </testcase>\n");
}

/// Text of an element or attribute; characters that XML 1.0 cannot have (section 2.2) become U+FFFD.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\t' | '\n' | '\r' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'.. => out.push(c),
            _ => out.push('\u{fffd}'),
        }
    }
    out
}
