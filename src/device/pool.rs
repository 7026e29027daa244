//! Reuses buffers by size class and counts resident memory.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Memory of one device, in bytes; read with [`Device::memory`](super::Device::memory).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryCounters {
    /// Bytes held by live tensors and matrices.
    pub live_bytes: u64,
    /// Maximum of `live_bytes` since the device was made or the peak was reset.
    pub peak_bytes: u64,
    /// Bytes freed and kept for the next allocation of the same size class.
    pub pooled_bytes: u64,
    /// Maximum of `live_bytes` plus `pooled_bytes` over the same time: the most memory ever taken
    /// from the driver or the system. When memory runs out, a pool first gives its free memory
    /// back.
    pub peak_held_bytes: u64,
    /// Allocations made by the driver (or the system's allocator).
    pub allocations: u64,
    /// Allocations served by a pooled buffer.
    pub reuses: u64,
}

impl MemoryCounters {
    fn add_live(&mut self, bytes: u64) {
        self.live_bytes += bytes;
        self.peak_bytes = self.peak_bytes.max(self.live_bytes);
        self.peak_held_bytes = self.peak_held_bytes.max(self.live_bytes + self.pooled_bytes);
    }
}

/// Free memory that exceeds live memory by more than this is given back when a new size is
/// requested.
const SLACK_BYTES: u64 = 64 << 20;

/// Rounds a size up so that few distinct sizes exist: to 256 bytes, and above 4 KiB to eighths of
/// a power of two (at most 12.5 % more than requested).
pub(crate) fn size_class(bytes: u64) -> u64 {
    let step = (bytes.max(1).next_power_of_two() / 16).max(256);
    bytes.max(1).next_multiple_of(step)
}

/// Free lists of `T` by size, and the counters. `T` is a GPU buffer or host memory.
pub(crate) struct Pool<T> {
    limit: Option<u64>,
    state: Mutex<State<T>>,
}

struct State<T> {
    /// Free items by size.
    free: BTreeMap<u64, BinaryHeap<Free<T>>>,
    /// Number of items returned so far.
    returns: u64,
    counters: MemoryCounters,
    /// Bytes held when growth was last reported.
    told: u64,
}

/// A free item. The greatest one is taken next: the one with the lowest number, among equals the
/// last one returned.
struct Free<T> {
    order: (Reverse<u64>, u64),
    item: T,
}

impl<T> PartialEq for Free<T> {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl<T> Eq for Free<T> {}

impl<T> PartialOrd for Free<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Free<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.order.cmp(&other.order)
    }
}

/// Result of [`Pool::take`].
pub(crate) enum Taken<T> {
    /// A pooled item of the requested size.
    Reused(T),
    /// Nothing fits. The caller allocates, and drops the items trimmed to make room.
    Allocate { trimmed: Vec<T> },
    /// The device's memory limit would be exceeded, even without the trimmed items.
    OverLimit { trimmed: Vec<T> },
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Pool::new(None)
    }
}

impl<T> Pool<T> {
    /// An empty pool; `limit` bounds live and pooled bytes together.
    pub(crate) fn new(limit: Option<u64>) -> Self {
        let state = State { free: BTreeMap::new(), returns: 0, counters: MemoryCounters::default(), told: 1 << 20 };
        Pool { limit, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        // The state is consistent after every statement below, so a panic elsewhere doesn't
        // corrupt it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an item of exactly `size` bytes and counts it as live, even if the caller has to
    /// allocate it. If `reuse` is false, the caller always has to.
    pub(crate) fn take(&self, size: u64, reuse: bool) -> Taken<T> {
        let state = &mut *self.state();
        let reused = state.free.get_mut(&size).filter(|_| reuse).and_then(BinaryHeap::pop).map(|free| free.item);
        if reused.is_some() {
            state.counters.pooled_bytes -= size;
            state.counters.reuses += 1;
        }
        let counters = &mut state.counters;
        let over = |counters: &MemoryCounters| {
            self.limit.is_some_and(|limit| counters.live_bytes + counters.pooled_bytes + size > limit)
        };
        let mut trimmed = Vec::new();
        if reused.is_none() {
            if counters.pooled_bytes > counters.live_bytes + SLACK_BYTES || over(counters) {
                trimmed = items(&mut state.free);
                counters.pooled_bytes = 0;
            }
            if over(counters) {
                return Taken::OverLimit { trimmed };
            }
            counters.allocations += 1;
        }
        counters.add_live(size);
        reused.map_or(Taken::Allocate { trimmed }, Taken::Reused)
    }

    /// Counts `size` bytes held elsewhere as live.
    pub(crate) fn count(&self, size: u64) {
        self.state().counters.add_live(size);
    }

    /// Takes back an item of `size` bytes for reuse. The free item with the lowest number is taken
    /// next, among equals the last one returned. Thanks to the numbers, the choice depends on
    /// which items are free and not on the order in which they came back: a training step takes
    /// the buffers of the step before, and their bind groups still exist.
    pub(crate) fn put(&self, size: u64, number: u64, item: T) {
        let state = &mut *self.state();
        state.counters.live_bytes -= size;
        state.counters.pooled_bytes += size;
        state.returns += 1;
        let order = (Reverse(number), state.returns);
        state.free.entry(size).or_default().push(Free { order, item });
    }

    /// Counts `size` bytes as gone: the owner dropped the item, or didn't allocate it after
    /// [`Pool::take`].
    pub(crate) fn forget(&self, size: u64) {
        self.state().counters.live_bytes -= size;
    }

    /// Empties the free lists.
    pub(crate) fn trim(&self) -> Vec<T> {
        let state = &mut *self.state();
        state.counters.pooled_bytes = 0;
        items(&mut state.free)
    }

    /// Reports a new maximum of held memory to listeners whenever it has doubled.
    pub(crate) fn tell_growth(&self, device: &str) {
        if !tracing::enabled!(tracing::Level::DEBUG) {
            return;
        }
        let state = &mut *self.state();
        let MemoryCounters { live_bytes, pooled_bytes, .. } = state.counters;
        let held_bytes = live_bytes + pooled_bytes;
        if held_bytes >= state.told.saturating_mul(2) {
            state.told = held_bytes;
            tracing::debug!(held_bytes, live_bytes, "memory of {device} has grown");
        }
    }

    pub(crate) fn counters(&self) -> MemoryCounters {
        self.state().counters
    }

    /// Starts a new peak at the bytes that are live now.
    pub(crate) fn reset_peak(&self) {
        let counters = &mut self.state().counters;
        counters.peak_bytes = counters.live_bytes;
        counters.peak_held_bytes = counters.live_bytes + counters.pooled_bytes;
    }
}

/// Takes out all items.
fn items<T>(free: &mut BTreeMap<u64, BinaryHeap<Free<T>>>) -> Vec<T> {
    std::mem::take(free).into_values().flatten().map(|free| free.item).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_classes_waste_at_most_an_eighth() {
        for bytes in (1..100_000u64).chain([1 << 20, (1 << 20) + 1, 123_456_789]) {
            let class = size_class(bytes);
            assert!(class >= bytes && class.is_multiple_of(256), "{bytes} -> {class}");
            assert!(class <= (bytes + bytes / 8).max(bytes + 256), "{bytes} -> {class}");
            assert_eq!(size_class(class), class, "a class is its own class");
        }
    }

    #[test]
    fn an_item_comes_back_and_the_counters_follow() {
        let pool = Pool::new(None);
        assert!(matches!(pool.take(512, true), Taken::Allocate { .. }));
        pool.put(512, 0, "first");
        assert!(matches!(pool.take(1024, true), Taken::Allocate { .. }), "another size is another list");
        assert!(matches!(pool.take(512, false), Taken::Allocate { .. }), "a new one, although one is pooled");
        pool.forget(512);
        assert!(matches!(pool.take(512, true), Taken::Reused("first")));
        let counters = pool.counters();
        assert_eq!((counters.live_bytes, counters.peak_bytes), (1536, 1536));
        assert_eq!((counters.allocations, counters.reuses, counters.pooled_bytes), (3, 1, 0));
        assert_eq!(counters.peak_held_bytes, 2048, "with the pooled 512 beside two live ones");
        pool.put(1024, 0, "second");
        pool.reset_peak();
        let counters = pool.counters();
        assert_eq!((counters.peak_bytes, counters.peak_held_bytes), (512, 1536));
    }

    #[test]
    fn the_lowest_number_is_taken_first_and_among_equals_the_last_to_come_back() {
        let pool = Pool::new(None);
        let order = |numbers: [u64; 5]| {
            numbers.iter().for_each(|_| drop(pool.take(256, false)));
            (0..).zip(numbers).for_each(|(item, number)| pool.put(256, number, item));
            let next =
                |_| if let Taken::Reused(item) = pool.take(256, true) { numbers[item] * 10 + item as u64 } else { 0 };
            let taken: Vec<u64> = (0..5).map(next).collect();
            (0..5).for_each(|_| pool.forget(256));
            taken
        };
        assert_eq!(order([3, 1, 5, 2, 4]), [11, 23, 30, 44, 52]);
        assert_eq!(order([1, 0, 1, 0, 1]), [3, 1, 14, 12, 10]);
    }

    #[test]
    fn a_limit_trims_first_and_then_refuses() {
        let pool = Pool::new(Some(1000));
        assert!(matches!(pool.take(600, true), Taken::Allocate { .. }));
        pool.put(600, 0, 1);
        match pool.take(700, true) {
            Taken::Allocate { trimmed } => assert_eq!(trimmed, [1]),
            _ => panic!("the pooled 600 bytes make room"),
        }
        assert!(matches!(pool.take(400, true), Taken::OverLimit { .. }));
        assert_eq!(pool.counters().live_bytes, 700);
    }
}
