//! Which query sees which keys: a contiguous range of keys per query. This covers causal order,
//! packed segments, padding, sliding windows and a cache of keys.

use std::ops::Range;
use std::sync::OnceLock;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::indices::Indices;

const OP: &str = "attention visibility";

/// The keys that each query sees. From one query to the next neither the first key nor the end
/// decreases, so each key is seen by a contiguous range of queries, and a block of queries sees a
/// contiguous range of keys.
#[derive(Debug)]
pub struct Visibility {
    device: Device,
    keys: usize,
    /// First key and end for each query.
    ranges: Vec<(u32, u32)>,
    /// `ranges` on the device, one after the other.
    key_ranges: Indices,
    /// First query and end for each key, on the device; used only by backward passes.
    query_ranges: OnceLock<Indices>,
}

impl Visibility {
    /// Causal self-attention. `segments` holds the segment id of every token, in rows of `length`
    /// tokens. A token sees itself and the earlier tokens of its row's current run of equal ids
    /// (an id that comes back later in a row is another run), at most the `window` nearest, itself
    /// included. Padding is a segment of its own, left or right: it sees only padding.
    ///
    /// # Errors
    /// [`Error::Invalid`] unless `segments` consists of whole rows of at least one token, or for a
    /// window of 0; and the errors of [`Visibility::ranges`].
    pub fn causal(device: &Device, segments: &[u32], length: usize, window: Option<usize>) -> Result<Visibility> {
        if length == 0 || !segments.len().is_multiple_of(length) {
            let expected = format!("{} segment ids must be a multiple of it", segments.len());
            return Err(Error::invalid(OP, "the length of a row", length, expected));
        }
        if window == Some(0) {
            return Err(Error::invalid(OP, "the window", 0, "it must be at least 1, because a token sees itself"));
        }
        let mut run = 0;
        let range = |i: usize| {
            if i.is_multiple_of(length) || segments[i] != segments[i - 1] {
                run = i;
            }
            let first = window.map_or(run, |window| run.max((i + 1).saturating_sub(window)));
            (first as u32, i as u32 + 1)
        };
        let ranges = (0..segments.len()).map(range).collect();
        Visibility::new(device, ranges, segments.len())
    }

    /// Query i sees the keys `ranges[i].0..ranges[i].1` out of `keys`; an empty range sees none.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range that ends before it starts or after `keys`, or whose first
    /// key or end is less than that of the query before; [`Error::TooLarge`] and
    /// [`Error::OutOfMemory`] from the device.
    pub fn ranges(device: &Device, ranges: &[(u32, u32)], keys: usize) -> Result<Visibility> {
        let mut before = (0, 0);
        for (query, &(first, end)) in ranges.iter().enumerate() {
            if first > end || end as usize > keys || first < before.0 || end < before.1 {
                return Err(Error::invalid(
                    OP,
                    "a query's range of keys",
                    format!("{first}..{end} for query {query}, after {}..{}", before.0, before.1),
                    format!("it must lie in 0..{keys}, and neither its start nor its end may decrease"),
                ));
            }
            before = (first, end);
        }
        Visibility::new(device, ranges.to_vec(), keys)
    }

    fn new(device: &Device, ranges: Vec<(u32, u32)>, keys: usize) -> Result<Visibility> {
        let key_ranges = upload(device, &ranges)?;
        Ok(Visibility { device: device.clone(), keys, ranges, key_ranges, query_ranges: OnceLock::new() })
    }

    /// Number of queries.
    pub fn queries(&self) -> usize {
        self.ranges.len()
    }

    /// Number of keys.
    pub fn keys(&self) -> usize {
        self.keys
    }

    /// The keys that a query sees.
    ///
    /// # Panics
    /// If the query doesn't exist.
    pub fn of_query(&self, query: usize) -> Range<usize> {
        let (first, end) = self.ranges[query];
        first as usize..end as usize
    }

    /// Number of pairs of a query and a key that it sees.
    pub fn pairs(&self) -> u64 {
        self.ranges.iter().map(|(first, end)| u64::from(end - first)).sum()
    }

    /// First key and end for each query, one after the other.
    pub(crate) fn key_ranges(&self) -> &Indices {
        &self.key_ranges
    }

    /// Range of the keys that a block of queries sees.
    pub(crate) fn of_queries(&self, queries: &Range<usize>) -> Range<usize> {
        self.ranges[queries.start].0 as usize..self.ranges[queries.end - 1].1 as usize
    }

    /// First query and end for each key, one after the other, on the device.
    pub(crate) fn query_ranges(&self) -> Result<&Indices> {
        if let Some(indices) = self.query_ranges.get() {
            return Ok(indices);
        }
        let (mut start, mut end) = (0, 0);
        let of_key = |key: usize| {
            while start < self.ranges.len() && self.ranges[start].1 as usize <= key {
                start += 1;
            }
            while end < self.ranges.len() && self.ranges[end].0 as usize <= key {
                end += 1;
            }
            (start as u32, end.max(start) as u32)
        };
        let ranges: Vec<_> = (0..self.keys).map(of_key).collect();
        let indices = upload(&self.device, &ranges)?;
        Ok(self.query_ranges.get_or_init(|| indices))
    }
}

fn upload(device: &Device, ranges: &[(u32, u32)]) -> Result<Indices> {
    let flat: Vec<u32> = ranges.iter().flat_map(|&(first, end)| [first, end]).collect();
    Indices::from_slice(device, &flat)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn causal(segments: &[u32], length: usize, window: Option<usize>) -> Vec<(u32, u32)> {
        Visibility::causal(&Device::cpu(), segments, length, window).unwrap().ranges
    }

    #[test]
    fn a_token_sees_its_own_run_up_to_itself() {
        assert_eq!(causal(&[1, 1, 1], 3, None), [(0, 1), (0, 2), (0, 3)]);
        // Two rows; the second starts anew although its id is the same.
        assert_eq!(causal(&[1, 1, 1, 1], 2, None), [(0, 1), (0, 2), (2, 3), (2, 4)]);
        // Padding left and right; id 1 comes back as another run.
        assert_eq!(causal(&[0, 1, 1, 2, 1, 0], 6, None), [(0, 1), (1, 2), (1, 3), (3, 4), (4, 5), (5, 6)]);
        assert_eq!(causal(&[7; 4], 4, Some(2)), [(0, 1), (0, 2), (1, 3), (2, 4)]);
        assert_eq!(causal(&[], 4, None), []);
    }

    #[test]
    fn what_is_not_contiguous_is_an_error() {
        let device = Device::cpu();
        for segments in [&[1, 1, 1][..], &[1]] {
            let error = Visibility::causal(&device, segments, 2, None).unwrap_err().to_string();
            let count = segments.len();
            let wanted = format!("the length of a row is 2; {count} segment ids must be a multiple of it");
            assert_eq!(error, format!("attention visibility: {wanted}"));
        }
        assert_eq!(
            Visibility::causal(&device, &[], 0, None).unwrap_err().to_string(),
            "attention visibility: the length of a row is 0; 0 segment ids must be a multiple of it"
        );
        assert_eq!(
            Visibility::causal(&device, &[1], 1, Some(0)).unwrap_err().to_string(),
            "attention visibility: the window is 0; it must be at least 1, because a token sees itself"
        );
        for (ranges, wanted) in [
            (&[(2, 1)][..], "2..1 for query 0, after 0..0;"),
            (&[(0, 5)], "0..5 for query 0, after 0..0;"),
            (&[(1, 2), (0, 2)], "0..2 for query 1, after 1..2;"),
            (&[(0, 3), (0, 2)], "0..2 for query 1, after 0..3;"),
        ] {
            let error = Visibility::ranges(&device, ranges, 4).unwrap_err().to_string();
            let wanted = format!("attention visibility: a query's range of keys is {wanted} it must lie in 0..4, ");
            assert!(error.starts_with(&wanted), "{error}");
        }
    }

    proptest! {
        #[test]
        fn each_key_knows_the_queries_that_see_it(
            mut firsts in prop::collection::vec(0..20u32, 1..30),
            lengths in prop::collection::vec(0..6u32, 30),
        ) {
            firsts.sort();
            let mut end = 0;
            let ranges: Vec<_> = firsts.iter().zip(&lengths).map(|(&first, &length)| {
                end = end.max(first + length);
                (first, end)
            }).collect();
            let device = Device::cpu();
            let visibility = Visibility::ranges(&device, &ranges, 26).unwrap();
            let query_ranges = visibility.query_ranges().unwrap().host(OP).unwrap().to_vec();
            for (key, pair) in query_ranges.chunks(2).enumerate() {
                let wanted: Vec<u32> = (0..ranges.len())
                    .filter(|&query| visibility.of_query(query).contains(&key))
                    .map(|query| query as u32)
                    .collect();
                prop_assert_eq!((pair[0]..pair[1]).collect::<Vec<_>>(), wanted, "key {}", key);
            }
        }
    }
}
