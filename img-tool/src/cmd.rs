//! The verbs, one file each: its options (`Args`) and what it does (`run`); and what some of them share.

pub(crate) mod amend;
pub(crate) mod bench;
pub(crate) mod bitmap;
pub(crate) mod bootcheck;
pub(crate) mod chain;
pub(crate) mod check;
pub(crate) mod checksum;
pub(crate) mod commit;
pub(crate) mod compare;
pub(crate) mod completions;
pub(crate) mod convert;
pub(crate) mod copy;
pub(crate) mod create;
pub(crate) mod dd;
pub(crate) mod doctor;
pub(crate) mod info;
pub(crate) mod man;
pub(crate) mod map;
pub(crate) mod measure;
pub(crate) mod nbd;
pub(crate) mod rebase;
pub(crate) mod resize;
pub(crate) mod serve;
pub(crate) mod snapshot;
