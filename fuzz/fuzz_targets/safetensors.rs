//! safetensors files: tensors, checkpoints, the 4-bit weights of bitsandbytes.

#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use serde_json::Value;

#[allow(dead_code, unused_imports, reason = "the other targets use the rest")]
#[path = "../../tests/common/readers.rs"]
mod readers;

fuzz_target!(|bytes: &[u8]| drop(readers::safetensors(bytes)));

// A change of the header's length, or of the data's, alone would be refused at once. Of sixteen changes, one stays so.
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let size = fuzzer_mutate(data, size, max_size);
    if seed.is_multiple_of(16) { size } else { made_consistent(data, size).unwrap_or(size) }
});

/// Writes the length of the header, which ends with the last `}}`, before it, and cuts or fills up the data to what it
/// says. The file's new size, if there is a header and room.
fn made_consistent(data: &mut [u8], size: usize) -> Option<usize> {
    let end = data[..size].windows(2).rposition(|pair| pair == b"}}")? + 2;
    let length = end.checked_sub(8)? as u64;
    data.first_chunk_mut::<8>()?.copy_from_slice(&length.to_le_bytes());
    let header: Value = serde_json::from_slice(&data[8..end]).ok()?;
    let ends = header.as_object()?.values().filter_map(|tensor| tensor.get("data_offsets")?.get(1)?.as_u64());
    let new_size = end.checked_add(usize::try_from(ends.max()?).ok()?)?;
    data.get_mut(size..new_size.max(size))?.fill(0);
    Some(new_size)
}
