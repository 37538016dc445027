//! What a value holds.

use crate::names::utf16;

/// The data of a value and their type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value {
    /// `REG_SZ` 1, `REG_EXPAND_SZ` 2, `REG_BINARY` 3, `REG_DWORD` 4, `REG_MULTI_SZ` 7 and what else there is: in some keys
    /// (DriverDatabase) it is a number of another meaning.
    pub kind: u32,
    /// The data as they are kept.
    pub data: Vec<u8>,
}

fn terminated(text: &str) -> Vec<u8> {
    text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect()
}

impl Value {
    /// `REG_SZ`.
    pub fn text(text: &str) -> Self {
        Self { kind: 1, data: terminated(text) }
    }

    /// `REG_EXPAND_SZ`: text with names of variables between percent signs.
    pub fn expand(text: &str) -> Self {
        Self { kind: 2, data: terminated(text) }
    }

    /// `REG_BINARY`.
    pub fn binary(data: impl Into<Vec<u8>>) -> Self {
        Self { kind: 3, data: data.into() }
    }

    /// `REG_DWORD`.
    pub fn number(number: u32) -> Self {
        Self { kind: 4, data: number.to_le_bytes().to_vec() }
    }

    /// `REG_MULTI_SZ`.
    pub fn list<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut data: Vec<u8> = texts.into_iter().flat_map(terminated).collect();
        data.extend([0, 0]);
        Self { kind: 7, data }
    }

    /// The text of a `REG_SZ` or `REG_EXPAND_SZ`, up to its first zero.
    pub fn as_text(&self) -> Option<String> {
        let text = utf16(&self.data);
        matches!(self.kind, 1 | 2).then(|| text.split('\0').next().unwrap_or_default().to_owned())
    }

    /// The number of a `REG_DWORD`.
    pub fn as_number(&self) -> Option<u32> {
        let bytes = self.data.first_chunk().filter(|_| self.kind == 4 && self.data.len() == 4)?;
        Some(u32::from_le_bytes(*bytes))
    }

    /// The texts of a `REG_MULTI_SZ`; that of a `REG_SZ` as a list of one.
    pub fn as_list(&self) -> Option<Vec<String>> {
        let text = utf16(&self.data);
        let texts = text.split('\0').filter(|text| !text.is_empty()).map(str::to_owned);
        match self.kind {
            7 => Some(texts.collect()),
            1 | 2 => Some(texts.take(1).collect()),
            _ => None,
        }
    }
}
