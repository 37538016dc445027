//! The bytes of an attribute: in its record, in clusters, with holes, compressed.

use block::num::to_usize;
use block::{Error, Result};

use super::super::source::Source;
use super::lznt1;
use super::record::{Attribute, Body, Run};
use crate::bytes::corrupt;

/// The most bytes that are compressed together: 16 clusters of 4 KiB are usual.
const MOST_UNIT: u64 = 1 << 20;

/// A volume's clusters.
#[derive(Debug)]
pub(super) struct Clusters {
    pub(super) source: Source,
    /// Bytes of a cluster.
    pub(super) bytes: u64,
    /// How many clusters there are.
    pub(super) count: u64,
}

/// The bytes of an attribute.
#[derive(Debug, Clone)]
pub(super) struct Stream {
    pub(super) size: u64,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Resident(Vec<u8>),
    Runs { runs: Vec<Run>, initialized: u64 },
    Compressed { runs: Vec<Run>, initialized: u64, unit: u64 },
    Encrypted,
}

impl Stream {
    /// All parts of an attribute together.
    pub(super) fn new(mut parts: Vec<&Attribute>) -> Result<Self> {
        parts.sort_by_key(|part| part.first);
        let Some(head) = parts.first() else { return Err(corrupt("an attribute without parts")) };
        let (size, initialized, unit) = match &head.body {
            Body::Resident(bytes) => {
                return Ok(Self { size: bytes.len() as u64, kind: Kind::Resident(bytes.clone()) });
            }
            Body::Runs { size, initialized, unit, .. } => (*size, *initialized, *unit),
        };
        let mut all: Vec<Run> = vec![];
        for part in &parts {
            let Body::Runs { runs, .. } = &part.body else { continue };
            if part.first != all.last().map_or(0, |run| run.vcn + run.len) {
                return Err(corrupt(format!(
                    "a part of an attribute is missing before cluster {:#x}",
                    part.first
                )));
            }
            all.extend_from_slice(runs);
        }
        let kind = if head.flags & 0x4000 != 0 {
            Kind::Encrypted
        } else if head.flags & 0xff != 0 && unit != 0 {
            let unit = 1_u64.checked_shl(unit.into()).unwrap_or(0);
            Kind::Compressed { runs: all, initialized, unit }
        } else {
            Kind::Runs { runs: all, initialized }
        };
        Ok(Self { size, kind })
    }

    /// Fills `buf` from `offset`. What lies behind the end is zeros.
    pub(super) fn read(&self, clusters: &Clusters, buf: &mut [u8], offset: u64) -> Result<()> {
        buf.fill(0);
        let left = to_usize(self.size.saturating_sub(offset).min(buf.len() as u64));
        let buf = &mut buf[..left];
        let written = |initialized: u64| to_usize(initialized.saturating_sub(offset).min(left as u64));
        match &self.kind {
            Kind::Resident(bytes) => {
                let from = to_usize(offset);
                buf.copy_from_slice(bytes.get(from..from + left).unwrap_or_default());
                Ok(())
            }
            Kind::Runs { runs, initialized } => {
                read_runs(runs, clusters, &mut buf[..written(*initialized)], offset)
            }
            Kind::Compressed { runs, initialized, unit } => {
                read_units(runs, clusters, *unit, &mut buf[..written(*initialized)], offset)
            }
            Kind::Encrypted => Err(Error::unsupported("it is encrypted (EFS)")),
        }
    }

    /// All of it, if that is at most `most` bytes.
    pub(super) fn all(&self, clusters: &Clusters, most: u64) -> Result<Vec<u8>> {
        if self.size > most {
            return Err(corrupt(format!("a structure of {} bytes", self.size)));
        }
        let mut bytes = vec![0; to_usize(self.size)];
        self.read(clusters, &mut bytes, 0)?;
        Ok(bytes)
    }
}

/// Fills `buf`, which is zeros, from clusters.
fn read_runs(runs: &[Run], clusters: &Clusters, buf: &mut [u8], offset: u64) -> Result<()> {
    let (mut done, len) = (0, buf.len());
    let mut index = runs.partition_point(|run| (run.vcn + run.len).saturating_mul(clusters.bytes) <= offset);
    while done < len {
        let at = offset + done as u64;
        let Some(run) = runs.get(index) else {
            return Err(corrupt(format!("nothing says where its bytes from {at:#x} on lie")));
        };
        let within = at - run.vcn.saturating_mul(clusters.bytes).min(at);
        let count = to_usize((run.len.saturating_mul(clusters.bytes) - within).min((len - done) as u64));
        if let Some(lcn) = run.lcn {
            clusters.source.read(&mut buf[done..done + count], lcn * clusters.bytes + within)?;
        }
        done += count;
        index += 1;
    }
    Ok(())
}

/// The same for clusters that are compressed `unit` by `unit`.
fn read_units(runs: &[Run], clusters: &Clusters, unit: u64, buf: &mut [u8], offset: u64) -> Result<()> {
    let unit_bytes = unit.checked_mul(clusters.bytes).filter(|bytes| (1..=MOST_UNIT).contains(bytes));
    let unit_bytes = unit_bytes.ok_or_else(|| corrupt(format!("{unit} clusters compressed together")))?;
    let mut done = 0;
    while done < buf.len() {
        let at = offset + done as u64;
        let bytes = read_unit(runs, clusters, at / unit_bytes * unit, unit)?;
        let within = to_usize(at % unit_bytes);
        let count = (bytes.len() - within).min(buf.len() - done);
        buf[done..done + count].copy_from_slice(&bytes[within..within + count]);
        done += count;
    }
    Ok(())
}

/// A unit: as it is if all its clusters are there, zeros if none is, compressed if the last ones are missing.
fn read_unit(runs: &[Run], clusters: &Clusters, first: u64, unit: u64) -> Result<Vec<u8>> {
    let whole = to_usize(unit * clusters.bytes);
    let mut raw = vec![];
    for run in &runs[runs.partition_point(|run| run.vcn + run.len <= first)..] {
        if run.vcn >= first + unit {
            break;
        }
        let (from, to) = (run.vcn.max(first), (run.vcn + run.len).min(first + unit));
        let Some(lcn) = run.lcn else { break };
        raw.extend(
            clusters.source.bytes((lcn + from - run.vcn) * clusters.bytes, (to - from) * clusters.bytes)?,
        );
    }
    match raw.len() {
        0 => Ok(vec![0; whole]),
        len if len >= whole => Ok(raw),
        _ => lznt1::expand(&raw, whole),
    }
}
