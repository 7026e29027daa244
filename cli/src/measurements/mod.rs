//! Measurements for `qlora bench`: other programs' times beside the library's, files with date and
//! machine, and all measurements of a GPU.

pub mod parts;
pub mod peer;
pub mod report;

use qlora_wgpu::internal::bench::Row;
use serde::Serialize;

use peer::PeerTime;

/// A measurement; the fields of `qlora bench --json`.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// Ours.
    #[serde(flatten)]
    pub row: Row,
    /// Times of other programs for the same case.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<PeerTime>,
}
