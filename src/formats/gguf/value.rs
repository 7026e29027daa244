//! Values of a GGUF file's metadata, read in place.

use std::result;

/// The error says what is wrong with the bytes.
pub(super) type Result<T> = result::Result<T, String>;

/// Maximum depth of nested arrays.
const MAX_DEPTH: usize = 4;

/// A metadata value. Text is borrowed from the mapped file; arrays are decoded on demand.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Value<'a> {
    /// An unsigned integer of 8 to 64 bits.
    Unsigned(u64),
    /// A signed integer of 8 to 64 bits.
    Signed(i64),
    /// A float of 32 or 64 bits.
    Float(f64),
    /// A byte with the value 0 or 1.
    Bool(bool),
    /// UTF-8 text.
    String(&'a str),
    /// Values of one type.
    Array(Array<'a>),
}

/// A metadata array.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Array<'a> {
    kind: u32,
    len: usize,
    bytes: &'a [u8],
}

/// Type numbers in a file.
pub(super) mod kind {
    pub const U8: u32 = 0;
    pub const I8: u32 = 1;
    pub const U16: u32 = 2;
    pub const I16: u32 = 3;
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const STRING: u32 = 8;
    pub const ARRAY: u32 = 9;
    pub const U64: u32 = 10;
    pub const I64: u32 = 11;
    pub const F64: u32 = 12;
}

impl<'a> Array<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements, in order.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let (kind, mut reader) = (self.kind, Reader::new(self.bytes));
        // Opening the file has read them once, so none fails here.
        (0..self.len).map_while(move |_| reader.value(kind, 1).ok())
    }
}

impl Value<'_> {
    /// Describes the value for messages.
    pub(super) fn describe(&self) -> String {
        match self {
            Value::Unsigned(value) => value.to_string(),
            Value::Signed(value) => value.to_string(),
            Value::Float(value) => value.to_string(),
            Value::Bool(value) => value.to_string(),
            Value::String(value) => format!("{value:.60?}"),
            Value::Array(array) => format!("an array of {}", array.len),
        }
    }
}

/// Types that a [`Value`] can be read as. Integers convert if they fit; floats are rounded to 32
/// bits.
pub trait FromValue<'a>: Sized {
    /// Name of the type, for messages.
    const NAME: &'static str;

    /// Converts the value, if its type and size fit.
    fn from_value(value: Value<'a>) -> Option<Self>;
}

macro_rules! integers {
    ($($type:ty: $name:literal),*) => {$(
        impl FromValue<'_> for $type {
            const NAME: &'static str = $name;

            fn from_value(value: Value<'_>) -> Option<Self> {
                match value {
                    Value::Unsigned(value) => value.try_into().ok(),
                    Value::Signed(value) => value.try_into().ok(),
                    _ => None,
                }
            }
        }
    )*};
}

integers!(u32: "an unsigned 32-bit integer", i32: "a 32-bit integer", usize: "an unsigned integer");

impl FromValue<'_> for f32 {
    const NAME: &'static str = "a float";

    fn from_value(value: Value<'_>) -> Option<Self> {
        if let Value::Float(value) = value { Some(value as f32) } else { None }
    }
}

impl FromValue<'_> for bool {
    const NAME: &'static str = "true or false";

    fn from_value(value: Value<'_>) -> Option<Self> {
        if let Value::Bool(value) = value { Some(value) } else { None }
    }
}

impl<'a> FromValue<'a> for &'a str {
    const NAME: &'static str = "text";

    fn from_value(value: Value<'a>) -> Option<Self> {
        if let Value::String(value) = value { Some(value) } else { None }
    }
}

impl<'a, T: FromValue<'a>> FromValue<'a> for Vec<T> {
    const NAME: &'static str = "an array of another type";

    fn from_value(value: Value<'a>) -> Option<Self> {
        if let Value::Array(array) = value { array.iter().map(T::from_value).collect() } else { None }
    }
}

/// Reads little-endian values one after another; reading past the end is an error.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    /// Number of bytes read so far.
    pub at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Reader { bytes, at: 0 }
    }

    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let taken = rest.get(..len).ok_or_else(|| {
            format!(
                "is truncated: {len} bytes are needed at byte {}, but {} follow; copy or download it again",
                self.at,
                rest.len()
            )
        })?;
        self.at += len;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let bytes = self.take(N)?;
        Ok(std::array::from_fn(|i| bytes[i]))
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// Reads a 64-bit length or count. If this machine can't address it, no file has that many.
    pub(super) fn length(&mut self) -> Result<usize> {
        self.u64().map(|length| usize::try_from(length).unwrap_or(usize::MAX))
    }

    pub(super) fn string(&mut self) -> Result<&'a str> {
        let len = self.length()?;
        let at = self.at;
        str::from_utf8(self.take(len)?).map_err(|e| format!("has text at byte {at} that is not UTF-8: {e}"))
    }

    /// Reads a value of this type, at this depth of nested arrays.
    pub(super) fn value(&mut self, kind: u32, depth: usize) -> Result<Value<'a>> {
        Ok(match kind {
            kind::U8 => Value::Unsigned(self.array().map(u8::from_le_bytes)?.into()),
            kind::I8 => Value::Signed(self.array().map(i8::from_le_bytes)?.into()),
            kind::U16 => Value::Unsigned(self.array().map(u16::from_le_bytes)?.into()),
            kind::I16 => Value::Signed(self.array().map(i16::from_le_bytes)?.into()),
            kind::U32 => Value::Unsigned(self.u32()?.into()),
            kind::I32 => Value::Signed(self.array().map(i32::from_le_bytes)?.into()),
            kind::U64 => Value::Unsigned(self.u64()?),
            kind::I64 => Value::Signed(self.array().map(i64::from_le_bytes)?),
            kind::F32 => Value::Float(self.array().map(f32::from_le_bytes)?.into()),
            kind::F64 => Value::Float(self.array().map(f64::from_le_bytes)?),
            kind::BOOL => match self.array()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(format!("has a flag of {other} before byte {}", self.at)),
            },
            kind::STRING => Value::String(self.string()?),
            kind::ARRAY if depth < MAX_DEPTH => {
                let (kind, len) = (self.u32()?, self.length()?);
                let start = self.at;
                match fixed_size(kind) {
                    Some(size) => drop(self.take(len.saturating_mul(size))?),
                    // Every element takes bytes, so this ends at the end of the file at the
                    // latest.
                    None => (0..len).try_for_each(|_| self.value(kind, depth + 1).map(drop))?,
                }
                Value::Array(Array { kind, len, bytes: &self.bytes[start..self.at] })
            }
            kind::ARRAY => return Err(format!("has arrays nested deeper than {MAX_DEPTH}")),
            other => return Err(format!("has a value of unknown type {other} at byte {}", self.at)),
        })
    }
}

/// Size of a value in bytes, for types without invalid bit patterns.
fn fixed_size(kind: u32) -> Option<usize> {
    match kind {
        kind::U8 | kind::I8 => Some(1),
        kind::U16 | kind::I16 => Some(2),
        kind::U32 | kind::I32 | kind::F32 => Some(4),
        kind::U64 | kind::I64 | kind::F64 => Some(8),
        _ => None,
    }
}
