//! The matrix of qcow2 variants that the differential tests go through.

/// One kind of qcow2 image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// A short name.
    pub name: &'static str,
    /// What comes after `-o`, without backing file and data file.
    pub options: &'static str,
    /// Cluster size in bytes.
    pub cluster: u64,
    /// Layers under the image.
    pub backing: u32,
    /// With an external data file (1), which is raw (2).
    pub data_file: u8,
}

const fn plain(name: &'static str, options: &'static str, cluster: u64) -> Shape {
    Shape { name, options, cluster, backing: 0, data_file: 0 }
}

/// Every value of every dimension at least once, and the combinations that meet in practice or in code.
pub const SHAPES: &[Shape] = &[
    plain("default", "cluster_size=64k", 64 << 10),
    plain("v2", "compat=0.10", 64 << 10),
    plain("v2-512", "compat=0.10,cluster_size=512", 512),
    plain("v2-4k", "compat=v2,cluster_size=4k", 4 << 10),
    plain("v2-2m", "compat=0.10,cluster_size=2M", 2 << 20),
    plain("512", "cluster_size=512", 512),
    plain("1k", "cluster_size=1k", 1 << 10),
    plain("2k", "cluster_size=2k", 2 << 10),
    plain("4k", "compat=v3,cluster_size=4k", 4 << 10),
    plain("8k", "cluster_size=8k", 8 << 10),
    plain("16k", "cluster_size=16k", 16 << 10),
    plain("32k", "cluster_size=32k", 32 << 10),
    plain("128k", "cluster_size=128k", 128 << 10),
    plain("256k", "cluster_size=256k", 256 << 10),
    plain("512k", "cluster_size=512k", 512 << 10),
    plain("1m", "cluster_size=1M", 1 << 20),
    plain("2m", "cluster_size=2M", 2 << 20),
    plain("refcount-1", "cluster_size=4k,refcount_bits=1", 4 << 10),
    plain("refcount-2", "cluster_size=512,refcount_bits=2", 512),
    plain("refcount-4", "cluster_size=64k,refcount_bits=4", 64 << 10),
    plain("refcount-8", "cluster_size=1k,refcount_bits=8", 1 << 10),
    plain("refcount-32", "cluster_size=64k,refcount_bits=32", 64 << 10),
    plain("refcount-64", "cluster_size=512,refcount_bits=64", 512),
    plain("lazy", "cluster_size=64k,lazy_refcounts=on", 64 << 10),
    plain("zstd", "cluster_size=64k,compression_type=zstd", 64 << 10),
    plain("zstd-4k", "cluster_size=4k,compression_type=zstd", 4 << 10),
    plain("extended", "cluster_size=64k,extended_l2=on", 64 << 10),
    plain("extended-16k", "cluster_size=16k,extended_l2=on", 16 << 10),
    plain("extended-2m-zstd", "cluster_size=2M,extended_l2=on,compression_type=zstd", 2 << 20),
    plain("pre-metadata", "cluster_size=64k,preallocation=metadata", 64 << 10),
    plain("pre-metadata-v2", "compat=0.10,cluster_size=4k,preallocation=metadata", 4 << 10),
    plain("pre-metadata-extended", "cluster_size=64k,extended_l2=on,preallocation=metadata", 64 << 10),
    plain("pre-falloc", "cluster_size=64k,preallocation=falloc", 64 << 10),
    plain("pre-full", "cluster_size=16k,preallocation=full", 16 << 10),
    Shape { backing: 1, ..plain("backing-1", "cluster_size=64k", 64 << 10) },
    Shape { backing: 1, ..plain("backing-1-v2", "compat=0.10,cluster_size=4k", 4 << 10) },
    Shape { backing: 2, ..plain("backing-2", "cluster_size=16k", 16 << 10) },
    Shape { backing: 3, ..plain("backing-3-512", "cluster_size=512", 512) },
    Shape { backing: 1, ..plain("backing-1-extended", "cluster_size=64k,extended_l2=on", 64 << 10) },
    Shape {
        backing: 2,
        ..plain("backing-2-extended-pre", "cluster_size=16k,extended_l2=on,preallocation=metadata", 16 << 10)
    },
    Shape { data_file: 1, ..plain("data-file", "cluster_size=64k", 64 << 10) },
    Shape { data_file: 1, backing: 1, ..plain("data-file-backing", "cluster_size=4k", 4 << 10) },
    Shape { data_file: 2, ..plain("data-file-raw", "cluster_size=64k", 64 << 10) },
    Shape { data_file: 1, ..plain("data-file-extended", "cluster_size=64k,extended_l2=on", 64 << 10) },
    Shape { data_file: 1, ..plain("data-file-pre", "cluster_size=4k,preallocation=metadata", 4 << 10) },
];

impl Shape {
    /// A disk size that gives the tour of [`Ops`](crate::Ops) room and ends in the middle of a cluster.
    pub fn size(&self) -> u64 {
        (24 * self.cluster).max(512 << 10) + if self.cluster > 512 { 1024 } else { 0 }
    }

    /// Whether compressed clusters can be stored.
    pub fn compressible(&self) -> bool {
        self.data_file == 0
    }

    /// Whether a discard reads as zeros in qemu: not with backing layers under a version 2 image.
    pub fn version2(&self) -> bool {
        self.options.contains("compat=0.10") || self.options.contains("compat=v2")
    }

    /// The value of `-o` for an image called `name`; the data file is called `name.data`.
    pub fn o(&self, name: &str) -> String {
        let mut options = self.options.to_owned();
        if self.data_file > 0 {
            options += &format!(",data_file={name}.data");
        }
        if self.data_file > 1 {
            options += ",data_file_raw=on";
        }
        options
    }

    /// The words that create the image `name` on top of `backing`.
    pub fn create_words(&self, name: &str, backing: Option<&str>) -> String {
        let backing = backing.map_or(String::new(), |file| format!("-b {file} -F qcow2 "));
        format!("create -f qcow2 {backing}-o {} {name} {}", self.o(name), self.size())
    }

    /// Creates, with `create` (which gets the words of a command line), the layers `base0.NAME`,
    /// `base1.NAME` and so on, and on top the image `name`. Calls `fill` with each name and its number,
    /// the top having the highest.
    pub fn build(&self, name: &str, create: impl Fn(&str), fill: impl Fn(&str, u8)) {
        let mut below: Option<String> = None;
        for layer in 0..self.backing {
            let this = format!("base{layer}.{name}");
            let base = Self { backing: 0, data_file: 0, ..*self };
            let base = Self { options: without_prealloc(base.options), ..base };
            create(&base.create_words(&this, below.as_deref()));
            fill(&this, u8::try_from(layer + 1).unwrap());
            below = Some(this);
        }
        create(&self.create_words(name, below.as_deref()));
        fill(name, u8::try_from(self.backing + 1).unwrap());
    }

    /// Lets qemu build it, and fill every layer with a tour.
    pub fn build_with_qemu(&self, dir: &crate::Dir, name: &str, discards: bool) {
        self.build(
            name,
            |words| {
                dir.qemu_ok(words);
            },
            |layer, seed| dir.qemu_io("qcow2", layer, &self.tour(seed, discards && layer == name)),
        );
    }

    /// The tour of this shape.
    pub fn tour(&self, seed: u8, discards: bool) -> crate::Ops {
        let compressed = self.compressible() && !self.options.contains("preallocation");
        crate::Ops::tour(self.size(), self.cluster, seed, compressed, discards)
    }
}

fn without_prealloc(options: &'static str) -> &'static str {
    match options.split_once(",preallocation=") {
        Some((before, _)) => before,
        None => options,
    }
}
