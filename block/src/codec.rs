//! Reading and writing records byte by byte in the order of their specification.

/// Reads big- and little-endian fields from a slice, never past its end.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
}

macro_rules! reads {
    ($($name:ident $type:ty, $from:ident, $doc:literal;)*) => {$(
        #[doc = $doc]
        pub fn $name(&mut self) -> Option<$type> {
            let bytes = self.take(size_of::<$type>())?;
            Some(<$type>::$from(bytes.try_into().ok()?))
        }
    )*};
}

impl<'a> Reader<'a> {
    /// Reads from the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    /// How many bytes have been read.
    pub fn position(&self) -> usize {
        self.position
    }

    /// How many bytes are left.
    pub fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    /// The next `len` bytes, or `None` if there are fewer.
    pub fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let end = self.position.checked_add(len)?;
        let taken = self.bytes.get(self.position..end)?;
        self.position = end;
        Some(taken)
    }

    /// Skips `len` bytes, or returns `None` if there are fewer.
    pub fn skip(&mut self, len: usize) -> Option<()> {
        self.take(len).map(drop)
    }

    reads! {
        u8 u8, from_be_bytes, "One byte.";
        be_u16 u16, from_be_bytes, "Two bytes, most significant first.";
        be_u32 u32, from_be_bytes, "Four bytes, most significant first.";
        be_u64 u64, from_be_bytes, "Eight bytes, most significant first.";
        le_u16 u16, from_le_bytes, "Two bytes, least significant first.";
        le_u32 u32, from_le_bytes, "Four bytes, least significant first.";
        le_u64 u64, from_le_bytes, "Eight bytes, least significant first.";
    }
}

/// Appends fields to a buffer.
#[derive(Debug, Clone, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

macro_rules! writes {
    ($($name:ident $type:ty, $to:ident, $doc:literal;)*) => {$(
        #[doc = $doc]
        pub fn $name(&mut self, value: $type) -> &mut Self {
            self.bytes.extend_from_slice(&value.$to());
            self
        }
    )*};
}

impl Writer {
    /// An empty buffer.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many bytes have been written.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing has been written.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Appends bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Appends zeros up to a multiple of `align` (a power of two).
    pub fn pad_to(&mut self, align: usize) -> &mut Self {
        self.bytes.resize(self.bytes.len().next_multiple_of(align), 0);
        self
    }

    /// The buffer.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    writes! {
        u8 u8, to_be_bytes, "One byte.";
        be_u16 u16, to_be_bytes, "Two bytes, most significant first.";
        be_u32 u32, to_be_bytes, "Four bytes, most significant first.";
        be_u64 u64, to_be_bytes, "Eight bytes, most significant first.";
        le_u16 u16, to_le_bytes, "Two bytes, least significant first.";
        le_u32 u32, to_le_bytes, "Four bytes, least significant first.";
        le_u64 u64, to_le_bytes, "Eight bytes, least significant first.";
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut writer = Writer::new();
        writer.u8(1).be_u16(2).be_u32(3).be_u64(4).le_u32(5).bytes(b"ab").pad_to(8);
        let bytes = writer.into_bytes();
        assert_eq!(bytes.len() % 8, 0);
        let mut reader = Reader::new(&bytes);
        assert_eq!((reader.u8(), reader.be_u16(), reader.be_u32()), (Some(1), Some(2), Some(3)));
        assert_eq!((reader.be_u64(), reader.le_u32(), reader.take(2)), (Some(4), Some(5), Some(&b"ab"[..])));
    }

    #[test]
    fn nothing_is_read_past_the_end() {
        let mut reader = Reader::new(&[1, 2, 3]);
        assert_eq!(reader.be_u32(), None);
        assert_eq!(reader.be_u16(), Some(0x0102));
        assert_eq!(reader.be_u16(), None);
        assert_eq!(reader.take(usize::MAX), None);
    }
}
