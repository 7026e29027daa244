//! The one error type. Every variant says which operation failed and on what: shapes, a file, a key.

use std::fmt::Display;
use std::path::{Path, PathBuf};

/// A `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong. Errors are values: no function of this crate panics on bad input.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two shapes that must agree do not.
    #[error("{op}: {what}: expected {expected}, got {got}")]
    Shape { op: &'static str, what: &'static str, expected: String, got: String },

    /// A setting outside what the operation accepts.
    #[error("{op}: {what} is {got}; {expected}")]
    Invalid { op: &'static str, what: &'static str, got: String, expected: String },

    /// A weight to be quantized (or a scale read from a file) is NaN or infinite.
    #[error("{op}: the value at flat index {index} is {value}; only finite values can be quantized")]
    NonFinite { op: &'static str, index: usize, value: f32 },

    /// The loss or a gradient of a training step is NaN or infinite. Adapters and optimizer are as before the step.
    #[error("step {step}: {what} is {value}; nothing was updated. A lower learning rate, or clipping, may help")]
    Diverged { step: u32, what: String, value: f32 },

    /// A run is to be resumed with another setting, model or data than it was started with.
    #[error("{}: is a run with {setting} {before}, which is {now} now; resume it as it was", path.display())]
    OtherRun { path: PathBuf, setting: &'static str, before: String, now: String },

    /// Whoever asked for it has ended it before it was done.
    #[error("{op}: interrupted; nothing was written")]
    Interrupted { op: &'static str },

    /// No adapter of this name is loaded in the layer.
    #[error("no adapter named {name:?}; loaded: {loaded}")]
    NoSuchAdapter { name: String, loaded: String },

    /// No GPU (nor software driver) answers the request.
    #[error("no adapter matches {wanted}; found: {found}. {hint}")]
    NoDevice { wanted: String, found: String, hint: String },

    /// The device lacks something that was asked for.
    #[error("{device}: {what} is not supported; {hint}")]
    Unsupported { device: String, what: String, hint: String },

    /// The device has no room for an allocation.
    #[error("{device}: out of memory allocating {bytes} bytes for {what}")]
    OutOfMemory { device: String, what: String, bytes: u64 },

    /// A single tensor or row is larger than the device can bind.
    #[error("{device}: {what} takes {bytes} bytes, but one binding holds at most {limit}")]
    TooLarge { device: String, what: String, bytes: u64, limit: u64 },

    /// The device is gone (driver reset, watchdog, unplugged, destroyed). Later calls return this again.
    #[error("{device}: the device was lost: {reason}")]
    DeviceLost { device: String, reason: String },

    /// The driver or wgpu refused an operation; with wgpu's own words.
    #[error("{device}: {op} failed: {message}")]
    Device { device: String, op: String, message: String },

    /// Tensors of one operation live on different devices.
    #[error("{op}: tensors are on different devices: {left} and {right}")]
    DeviceMismatch { op: &'static str, left: String, right: String },

    /// A file cannot be opened, read or written.
    #[error("{}: {message}", path.display())]
    Io { path: PathBuf, message: String },

    /// A file is not what it should be.
    #[error("{}: {message}", path.display())]
    File { path: PathBuf, message: String },

    /// A chat template is malformed, refuses the messages, or does what is not supported.
    #[error("line {line} of the chat template: {message}")]
    Template { line: usize, message: String },

    /// A tensor in a file is missing, has the wrong type or shape, or contradicts its description.
    #[error("{}: tensor {key:?}: {message}", path.display())]
    Tensor { path: PathBuf, key: String, message: String },
}

impl Error {
    /// [`Error::Io`]: what the system says of the file at `path`.
    pub(crate) fn io(path: &Path, error: impl Display) -> Error {
        Error::Io { path: path.into(), message: error.to_string() }
    }
}
