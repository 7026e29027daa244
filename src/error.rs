//! The one error type. Every variant names the operation that failed and what it failed on:
//! shapes, a file, a key.

use std::fmt::{self, Display, Write};
use std::io;
use std::path::PathBuf;

use crate::printable::OneLine;

/// A `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong. Errors are values: no function of this crate panics on bad input.
/// An error displays as one line; control characters that come from files are escaped.
#[derive(Debug, Clone)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum Error {
    /// Two shapes that must agree don't.
    Shape { op: &'static str, what: &'static str, expected: String, got: String },

    /// A setting that the operation doesn't accept.
    Invalid { op: &'static str, what: &'static str, got: String, expected: String },

    /// A weight to be quantized (or a scale read from a file) is NaN or infinite.
    NonFinite { op: &'static str, index: usize, value: f32 },

    /// The loss or a gradient of a training step is NaN or infinite. Adapters and optimizer are
    /// unchanged by that step.
    Diverged { step: u32, what: String, value: f32 },

    /// A run can't be resumed: a setting, the model or the data differ from those it was started
    /// with.
    OtherRun { path: PathBuf, setting: &'static str, before: String, now: String },

    /// Cancelled by the caller.
    Interrupted { op: &'static str },

    /// No adapter of this name is loaded in the layer.
    NoSuchAdapter { name: String, loaded: String },

    /// No GPU or software driver matches the request.
    NoDevice { wanted: String, found: String, hint: String },

    /// The device lacks a requested feature.
    Unsupported { device: String, what: String, hint: String },

    /// The device has no memory left for an allocation.
    OutOfMemory { device: String, what: String, bytes: u64 },

    /// A single tensor or row is larger than one binding of the device.
    TooLarge { device: String, what: String, bytes: u64, limit: u64 },

    /// The device is gone (driver reset, watchdog, unplugged, destroyed). Later calls return this
    /// error again.
    DeviceLost { device: String, reason: String },

    /// The driver or wgpu refused an operation. `message` says why, in wgpu's words
    /// if it is wgpu's reason.
    Device { device: String, op: String, message: String },

    /// Tensors of one operation are on different devices.
    DeviceMismatch { op: &'static str, left: String, right: String },

    /// A file can't be opened, read or written.
    Io { path: PathBuf, kind: io::ErrorKind, message: String },

    /// The contents of a file aren't what they should be.
    File { path: PathBuf, message: String },

    /// A chat template is malformed, rejects the messages, or uses something unsupported.
    Template { line: usize, message: String },

    /// A tensor in a file is missing, has the wrong type or shape, or contradicts its description.
    Tensor { path: PathBuf, key: String, message: String },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = OneLine(f);
        match self {
            Error::Shape { op, what, expected, got } => write!(f, "{op}: {what}: expected {expected}, got {got}"),
            Error::Invalid { op, what, got, expected } => write!(f, "{op}: {what} is {got}; {expected}"),
            Error::NonFinite { op, index, value } => {
                write!(f, "{op}: the value at flat index {index} is {value}; only finite values can be quantized")
            }
            Error::Diverged { step, what, value } => write!(
                f,
                "step {step}: {what} is {value}; nothing was updated. A lower learning rate, or clipping, may help"
            ),
            Error::OtherRun { path, setting, before, now } => {
                write!(
                    f,
                    "{}: started with {setting} {before}, now {now}; resume with the original setting",
                    path.display()
                )
            }
            Error::Interrupted { op } => write!(f, "{op}: interrupted; nothing was written"),
            Error::NoSuchAdapter { name, loaded } => write!(f, "no adapter named {name:?}; loaded: {loaded}"),
            Error::NoDevice { wanted, found, hint } => write!(f, "no device matches {wanted}; found: {found}. {hint}"),
            Error::Unsupported { device, what, hint } => write!(f, "{device}: {what} is not supported; {hint}"),
            Error::OutOfMemory { device, what, bytes } => {
                write!(f, "{device}: out of memory allocating {bytes} bytes for {what}")
            }
            Error::TooLarge { device, what, bytes, limit } => {
                write!(f, "{device}: {what} takes {bytes} bytes, but one binding holds at most {limit}")
            }
            Error::DeviceLost { device, reason } => write!(f, "{device}: the device was lost: {reason}"),
            Error::Device { device, op, message } => write!(f, "{device}: {op} failed: {message}"),
            Error::DeviceMismatch { op, left, right } => {
                write!(f, "{op}: tensors are on different devices: {left} and {right}")
            }
            Error::Io { path, message, .. } => write!(f, "{}: {message}", path.display()),
            Error::File { path, message } => write!(f, "{}: {message}", path.display()),
            Error::Template { line, message } => write!(f, "line {line} of the chat template: {message}"),
            Error::Tensor { path, key, message } => write!(f, "{}: tensor {key:?}: {message}", path.display()),
        }
    }
}

impl std::error::Error for Error {}

impl Error {
    /// [`Error::Shape`].
    pub fn shape(op: &'static str, what: &'static str, expected: impl Display, got: impl Display) -> Error {
        Error::Shape { op, what, expected: expected.to_string(), got: got.to_string() }
    }

    /// [`Error::Invalid`].
    pub fn invalid(op: &'static str, what: &'static str, got: impl Display, expected: impl Display) -> Error {
        Error::Invalid { op, what, got: got.to_string(), expected: expected.to_string() }
    }

    /// [`Error::Io`] for the file at `path`, with the error's message and kind.
    pub fn io(path: impl Into<PathBuf>, error: impl Into<io::Error>) -> Error {
        let error = error.into();
        Error::Io { path: path.into(), kind: error.kind(), message: error.to_string() }
    }

    /// The kind of an [`Error::Io`], such as a file that doesn't exist.
    pub fn io_kind(&self) -> Option<io::ErrorKind> {
        match self {
            Error::Io { kind, .. } => Some(*kind),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_whatever_files_say() {
        let error = Error::File { path: "a\nb".into(), message: "has \x1b[2J\r\u{202e}".into() };
        assert_eq!(error.to_string(), r"a\nb: has \u{1b}[2J\r\u{202e}");
        let error = Error::Tensor { path: "m".into(), key: "\x1b[31m".into(), message: "is\nmissing".into() };
        assert_eq!(error.to_string(), r#"m: tensor "\u{1b}[31m": is\nmissing"#);
    }

    #[test]
    fn an_error_of_a_file_keeps_its_kind() {
        let error = Error::io("there", io::Error::new(io::ErrorKind::NotFound, "no such file"));
        assert_eq!((error.to_string(), error.io_kind()), ("there: no such file".into(), Some(io::ErrorKind::NotFound)));
        let json = serde_json::from_str::<u32>("x").unwrap_err();
        let text = json.to_string();
        let error = Error::io("there", json);
        assert_eq!((error.to_string(), error.io_kind()), (format!("there: {text}"), Some(io::ErrorKind::InvalidData)));
        assert_eq!(Error::invalid("op", "what", 0, "wanted").io_kind(), None);
    }
}
