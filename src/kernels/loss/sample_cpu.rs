//! Chooses a token on the CPU by the definition in [`sample`](crate::kernels::loss::sample). The
//! order is sorted only as far as needed.

use super::sampling::{SampleParams, key, weight};

/// Returns the first of the largest logits, like argmax, or `None` if a logit is NaN.
pub(crate) fn likeliest(logits: &[f32]) -> Option<u32> {
    if logits.iter().any(|logit| logit.is_nan()) {
        return None;
    }
    (0..logits.len()).reduce(|best, at| if logits[at] > logits[best] { at } else { best }).map(|best| best as u32)
}

/// Tokens in order of likelihood, sorted only as far as needed.
struct Order {
    /// Inverted key and id in one number.
    tokens: Vec<u64>,
    sorted: usize,
}

impl Order {
    fn id(&mut self, at: usize) -> u32 {
        while at >= self.sorted {
            let end = (4 * self.sorted).clamp(256, self.tokens.len().max(256)).min(self.tokens.len());
            let rest = &mut self.tokens[self.sorted..];
            let few = end - self.sorted;
            if few < rest.len() {
                rest.select_nth_unstable(few);
            }
            rest[..few].sort_unstable();
            self.sorted = end;
        }
        self.tokens[at] as u32
    }
}

/// Draws a token at random, or returns `None` if a logit is NaN.
pub(crate) fn draw(logits: &[f32], params: &SampleParams) -> Option<u32> {
    let largest = logits[likeliest(logits)? as usize];
    let weight_of = |logit: f32| params.steps(logit, largest).map_or(0, weight);
    let likely =
        |(id, &logit): (u32, &f32)| params.steps(logit, largest).map(|_| u64::from(!key(logit)) << 32 | u64::from(id));
    let mut order = Order { tokens: (0..).zip(logits).filter_map(likely).collect(), sorted: 0 };
    let mut kept: u64 = logits.iter().map(|&logit| weight_of(logit)).sum();
    if params.top_k > 0 {
        let few = (params.top_k as usize).min(order.tokens.len());
        kept = (0..few).map(|at| weight_of(logits[order.id(at) as usize])).sum();
    }
    // Returns the first token at which the sum of weights reaches the target, and that sum.
    let mut reach = |target: u64| {
        let mut sum = 0;
        for at in 0..order.tokens.len() {
            let id = order.id(at);
            sum += weight_of(logits[id as usize]);
            if sum >= target {
                return Some((id, sum));
            }
        }
        None
    };
    let part_of = |sum: u64, part: u32| ((u128::from(sum) * u128::from(part)) >> 32) as u64;
    if params.cut_p > 0 {
        kept = reach(part_of(kept, params.top_p).max(1))?.1;
    }
    reach(part_of(kept, params.random) + 1).map(|(id, _)| id)
}
