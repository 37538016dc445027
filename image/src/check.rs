//! Checking an image: opening just as much as that takes, and the documents of `check`.
//!
//! An image that is checked may be broken in ways that no other command should accept, so that it is not
//! opened as a disk at all: [`qcow2::check`] reads the container. What lies behind the image must be there,
//! as qemu-img wants it, unless the image comes from a stranger and must not lead anywhere.

use std::sync::Arc;

use block::file::HostFile;
use block::image::{CheckReport, Repair};
use block::{Error, Result, ResultExt as _, Storage};
use serde_json::{Map, Value};

use crate::format::Format;
use crate::open::{OpenOptions, Opened, Purpose, open_own};
use crate::spec::{Spec, could_not_open};

/// An image that is ready to be checked.
#[derive(Debug)]
pub struct Subject {
    opened: Opened,
    data_file: Option<Arc<dyn Storage>>,
    extents: Vec<Arc<HostFile>>,
    options: OpenOptions,
    filename: String,
    probed: bool,
}

impl Subject {
    /// Opens an image for checking; for writing if it is to be repaired.
    ///
    /// # Errors
    /// As [`open`](crate::open()), except that a corrupt image can be opened for writing.
    pub fn open(spec: &Spec, options: &OpenOptions) -> Result<Self> {
        let options = OpenOptions { for_check: true, ..options.clone() };
        Self::open_parts(spec, &options).context(|| could_not_open(spec.display_name()))
    }

    fn open_parts(spec: &Spec, options: &OpenOptions) -> Result<Self> {
        let opened = open_own(spec.node().clone(), Purpose::Top, options)?;
        let data_file = opened.open_data_file(options)?.map(|file| file as Arc<dyn Storage>);
        if !options.policy.untrusted {
            opened.check_backing(options)?;
        }
        if opened.format == Format::Luks {
            crate::open::open_luks(&opened, options)?;
        }
        let extents = opened.open_extents(options)?;
        let (probed, options) = (opened.probed, options.clone());
        Ok(Self { opened, data_file, extents, options, filename: spec.display_name().to_owned(), probed })
    }

    /// The format of the image.
    pub fn format(&self) -> Format {
        self.opened.format
    }

    /// What the user should be told about the image itself; without prefix.
    pub fn warnings(&self) -> Vec<String> {
        self.opened.warnings()
    }

    /// The words with which qemu warns before it writes to an image whose format it had to guess.
    pub fn probed_raw_warning(&self) -> Option<String> {
        self.probed.then(|| crate::open::probed_raw_warning(&self.filename))
    }

    /// Checks, and repairs as far as asked.
    ///
    /// # Errors
    /// `Unsupported`, in qemu's words, for a format with nothing to check; otherwise only what prevents the
    /// check as a whole.
    pub fn check(&self, repair: Repair) -> Result<CheckReport> {
        if let Some(found) = &self.opened.found {
            return found.check(self.opened.parts(self.extents.clone(), None, &self.options), repair);
        }
        match self.opened.format {
            Format::Qcow2 => {
                let storage = &self.opened.container.storage;
                let header = qcow2::Header::read_for_check(&**storage)?;
                qcow2::check::check(storage, &header, self.data_file.as_ref(), repair)
            }
            _ => Err(Error::unsupported("This image format does not support checks")),
        }
    }

    /// The JSON document, keys in qemu-img's order; counters that are 0 are left out.
    pub fn to_json(&self, report: &CheckReport) -> Value {
        let mut document = Map::new();
        let mut counter = |key: &str, count: u64| {
            if count != 0 {
                document.insert(key.to_owned(), count.into());
            }
        };
        counter("image-end-offset", report.image_end_offset);
        counter("compressed-clusters", report.compressed_clusters);
        counter("total-clusters", report.total_clusters);
        counter("corruptions", report.corruptions);
        counter("corruptions-fixed", report.corruptions_fixed);
        document.insert("check-errors".to_owned(), report.check_errors.into());
        let mut counter = |key: &str, count: u64| {
            if count != 0 {
                document.insert(key.to_owned(), count.into());
            }
        };
        counter("leaks", report.leaks);
        counter("leaks-fixed", report.leaks_fixed);
        counter("allocated-clusters", report.allocated_clusters);
        document.insert("filename".to_owned(), self.filename.clone().into());
        document.insert("format".to_owned(), self.opened.format.name().into());
        if report.fragmented_clusters != 0 {
            document.insert("fragmented-clusters".to_owned(), report.fragmented_clusters.into());
        }
        Value::Object(document)
    }
}

/// What qemu-img says at the end of a check, several lines.
pub fn summary(report: &CheckReport) -> String {
    let mut text = String::new();
    if report.is_clean() {
        text.push_str("No errors were found on the image.\n");
    }
    if report.corruptions != 0 {
        text.push_str(&format!(
            "\n{} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.\n",
            report.corruptions
        ));
    }
    if report.leaks != 0 {
        text.push_str(&format!(
            "\n{} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.\n",
            report.leaks
        ));
    }
    if report.check_errors != 0 {
        text.push_str(&format!(
            "\n{} internal errors have occurred during the check.\n",
            report.check_errors
        ));
    }
    text + &statistics(report)
}

fn statistics(report: &CheckReport) -> String {
    let mut text = String::new();
    if report.total_clusters != 0 && report.allocated_clusters != 0 {
        text.push_str(&format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            report.allocated_clusters,
            report.total_clusters,
            percent(report.allocated_clusters, report.total_clusters),
            percent(report.fragmented_clusters, report.allocated_clusters),
            percent(report.compressed_clusters, report.allocated_clusters)
        ));
    }
    if report.image_end_offset != 0 {
        text.push_str(&format!("Image end offset: {}\n", report.image_end_offset));
    }
    text
}

#[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole as f64
}

/// What qemu-img says after it has repaired something.
pub fn repair_summary(report: &CheckReport) -> String {
    format!(
        "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\n\
         Double checking the fixed image now...\n",
        report.leaks_fixed, report.corruptions_fixed
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clean_image_is_summed_up_in_three_lines() {
        let report = CheckReport {
            total_clusters: 16,
            allocated_clusters: 3,
            fragmented_clusters: 1,
            compressed_clusters: 1,
            image_end_offset: 524_288,
            ..CheckReport::default()
        };
        assert_eq!(
            summary(&report),
            "No errors were found on the image.\n\
             3/16 = 18.75% allocated, 33.33% fragmented, 33.33% compressed clusters\n\
             Image end offset: 524288\n"
        );
    }

    #[test]
    fn each_kind_of_problem_has_its_paragraph() {
        let report = CheckReport { corruptions: 2, leaks: 1, check_errors: 3, ..CheckReport::default() };
        let text = summary(&report);
        assert!(text.starts_with("\n2 errors were found on the image.\nData may be corrupted"));
        assert!(text.contains("\n\n1 leaked clusters were found"));
        assert!(text.ends_with("\n3 internal errors have occurred during the check.\n"));
    }
}
