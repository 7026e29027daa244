//! Arranges a run's data: examples fill rows, rows form micro-batches, micro-batches form steps.

use std::collections::BTreeSet;
use std::ops::Range;

use super::data::{Dataset, Example};
use crate::error::{Error, Result};
use crate::nn::{IGNORE_LABEL, PADDING, Tokens};
use crate::seed::{mix, shuffled};

/// Options for batching examples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchOptions {
    /// Maximum rows in a micro-batch.
    pub batch_size: usize,
    /// Micro-batches per step; the last step of an epoch may have fewer.
    pub grad_accum: usize,
    /// Maximum tokens in a row.
    pub seq_len: usize,
    /// Whether a row may hold several examples. They don't see each other.
    pub packing: bool,
    /// Whether to shuffle anew in every epoch; otherwise the file's order is kept.
    pub shuffle: bool,
    /// Seed for shuffling.
    pub seed: u64,
}

impl Default for BatchOptions {
    /// One packed row of 512 tokens per step, shuffled.
    fn default() -> Self {
        BatchOptions { batch_size: 1, grad_accum: 1, seq_len: 512, packing: true, shuffle: true, seed: 0 }
    }
}

/// Token ids and labels (in Hugging Face's form, not shifted) of some rows, padded to the longest.
#[derive(Clone, Debug)]
pub struct MicroBatch {
    /// Tokens of the rows.
    pub tokens: Tokens,
    /// One label per token.
    pub labels: Vec<i64>,
}

impl MicroBatch {
    /// Number of tokens without padding.
    pub fn token_count(&self) -> usize {
        self.tokens.segments.iter().filter(|&&segment| segment != PADDING).count()
    }
}

/// A run's examples arranged in rows, with the order of the rows in each epoch.
#[derive(Clone, Debug)]
pub struct Batches {
    examples: Vec<Example>,
    /// The parts of the examples that are trained on.
    pieces: Vec<Piece>,
    /// Indices of the pieces in each row.
    rows: Vec<Vec<usize>>,
    options: BatchOptions,
    /// The epoch requested last, and the order of its rows.
    order: (u32, Vec<usize>),
    /// Amount of data that was cut.
    pub cut: Cut,
}

/// Tokens of an example that fit into a row.
#[derive(Clone, Debug)]
struct Piece {
    example: usize,
    tokens: Range<usize>,
}

/// Data left out because of the row length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cut {
    /// Number of examples longer than a row.
    pub truncated: usize,
    /// Number of tokens cut from them.
    pub tokens: usize,
    /// Number of examples dropped because no remaining token carries loss.
    pub dropped: usize,
}

impl Batches {
    /// Arranges the examples of a dataset. Examples longer than a row are cut (and counted); a
    /// text without lines continues in the next row instead.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a size is 0, or no label is left.
    pub fn new(dataset: Dataset, options: BatchOptions) -> Result<Batches> {
        const OP: &str = "training data";
        let sizes = [
            ("the batch size", options.batch_size, 1),
            ("the number of micro-batches", options.grad_accum, 1),
            ("the sequence length", options.seq_len, 2),
        ];
        if let Some((what, got, least)) = sizes.into_iter().find(|&(_, got, least)| got < least) {
            return Err(Error::invalid(OP, what, got, format!("it must be at least {least}")));
        }
        let (pieces, cut) = cut(&dataset, options.seq_len);
        if pieces.is_empty() {
            return Err(Error::invalid(
                OP,
                "the number of tokens that carry loss",
                "0",
                format!(
                    "all {} examples are cut to {} tokens before their first label; a longer sequence length may help",
                    cut.dropped, options.seq_len
                ),
            ));
        }
        let rows = if options.packing {
            pack(&pieces.iter().map(|piece| piece.tokens.len()).collect::<Vec<_>>(), options.seq_len)
        } else {
            (0..pieces.len()).map(|index| vec![index]).collect()
        };
        let mut batches = Batches { examples: dataset.examples, pieces, rows, options, order: (0, Vec::new()), cut };
        batches.order = (0, batches.order_of(0));
        Ok(batches)
    }

    /// Options that the examples were batched with.
    pub fn options(&self) -> &BatchOptions {
        &self.options
    }

    /// Number of steps in which every example is seen once.
    pub fn steps_per_epoch(&self) -> u32 {
        let micro_batches = self.rows.len().div_ceil(self.options.batch_size);
        u32::try_from(micro_batches.div_ceil(self.options.grad_accum)).unwrap_or(u32::MAX)
    }

    /// Number of examples that are trained on.
    pub fn examples(&self) -> usize {
        self.pieces.len()
    }

    /// Number of tokens in all examples.
    pub fn tokens(&self) -> usize {
        self.pieces.iter().map(|piece| piece.tokens.len()).sum()
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Tokens in the longest row.
    pub(crate) fn longest_row(&self) -> usize {
        self.rows.iter().map(|row| self.len_of(row)).max().unwrap_or(0)
    }

    /// A hash of the data and its arrangement.
    pub(crate) fn fingerprint(&self) -> u64 {
        let ids = self.pieces.iter().flat_map(|piece| self.ids(piece).iter().map(|&id| u64::from(id)));
        let labels = self.pieces.iter().flat_map(|piece| self.labels(piece).map(|label| label as u64));
        let rows = self.rows.iter().flat_map(|row| row.iter().map(|&index| index as u64).chain([u64::MAX]));
        ids.chain([self.pieces.len() as u64]).chain(labels).chain(rows).fold(0, mix)
    }

    /// Returns the micro-batches of step `step`, counted from 0 over all epochs.
    pub fn step(&mut self, step: u32) -> Result<Vec<MicroBatch>> {
        let steps = self.steps_per_epoch();
        let epoch = step / steps;
        if self.order.0 != epoch {
            self.order = (epoch, self.order_of(epoch));
        }
        let rows_a_step = self.options.batch_size * self.options.grad_accum;
        let start = (step % steps) as usize * rows_a_step;
        let rows = &self.order.1[start..(start + rows_a_step).min(self.rows.len())];
        rows.chunks(self.options.batch_size).map(|rows| self.micro_batch(rows)).collect()
    }

    fn order_of(&self, epoch: u32) -> Vec<usize> {
        if self.options.shuffle {
            shuffled(mix(self.options.seed, epoch.into()), self.rows.len())
        } else {
            (0..self.rows.len()).collect()
        }
    }

    fn len_of(&self, row: &[usize]) -> usize {
        row.iter().map(|&index| self.pieces[index].tokens.len()).sum()
    }

    fn ids(&self, piece: &Piece) -> &[u32] {
        &self.examples[piece.example].ids()[piece.tokens.clone()]
    }

    fn labels(&self, piece: &Piece) -> impl Iterator<Item = i64> {
        self.examples[piece.example].labels_of(piece.tokens.clone())
    }

    fn micro_batch(&self, rows: &[usize]) -> Result<MicroBatch> {
        let rows: Vec<&[usize]> = rows.iter().map(|&row| &*self.rows[row]).collect();
        let length = rows.iter().map(|row| self.len_of(row)).max().unwrap_or(0);
        let (mut ids, mut labels, mut segments) = (Vec::new(), Vec::new(), Vec::new());
        for (number, row) in (1..).zip(&rows) {
            for (segment, &index) in (1..).zip(row.iter()) {
                let piece = &self.pieces[index];
                ids.extend_from_slice(self.ids(piece));
                labels.extend(self.labels(piece));
                segments.resize(ids.len(), segment);
            }
            ids.resize(number * length, 0);
            labels.resize(number * length, IGNORE_LABEL);
            segments.resize(number * length, PADDING);
        }
        Ok(MicroBatch { tokens: Tokens::packed(ids, rows.len(), segments)?, labels })
    }
}

/// Cuts the examples into pieces of at most `seq_len` tokens.
fn cut(dataset: &Dataset, seq_len: usize) -> (Vec<Piece>, Cut) {
    let mut cut = Cut::default();
    let mut pieces = Vec::with_capacity(dataset.examples.len());
    for (index, example) in dataset.examples.iter().enumerate() {
        let count = example.ids().len();
        let piece = |tokens| Piece { example: index, tokens };
        if dataset.continuous {
            pieces.extend(example.ranges(seq_len).map(piece));
            continue;
        }
        if count > seq_len {
            cut.truncated += 1;
            cut.tokens += count - seq_len;
        }
        pieces.push(piece(0..count.min(seq_len)));
    }
    let before = pieces.len();
    pieces.retain(|Piece { example, tokens }| {
        dataset.examples[*example].labels_of(tokens.clone()).skip(1).any(|label| label != IGNORE_LABEL)
    });
    if !dataset.continuous {
        cut.dropped = before - pieces.len();
    }
    (pieces, cut)
}

/// Packs examples of these lengths into rows of at most `room` tokens, each example once: longest
/// first, each into the fullest row with room for it. Rows are sorted by their first example; so
/// are the examples in a row.
fn pack(lengths: &[usize], room: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(lengths[index]));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    // Room left, and the row's index.
    let mut open: BTreeSet<(usize, usize)> = BTreeSet::new();
    for index in order {
        let length = lengths[index];
        let (left, row) = match open.range((length, 0)..).next().copied() {
            Some(found) => {
                open.remove(&found);
                found
            }
            None => {
                rows.push(Vec::new());
                (room, rows.len() - 1)
            }
        };
        rows[row].push(index);
        open.insert((left - length, row));
    }
    rows.iter_mut().for_each(|row| row.sort_unstable());
    rows.sort_unstable_by_key(|row| row[0]);
    rows
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn dataset(lengths: &[usize]) -> Dataset {
        let example =
            |(at, &len): (usize, &usize)| Example::all((0..len as u32).map(|i| at as u32 * 100 + i).collect());
        Dataset { examples: lengths.iter().enumerate().map(example).collect(), ..Dataset::default() }
    }

    /// Removes the labels up to the seventh token.
    fn late(example: &Example) -> Example {
        let labels = example.labels().enumerate().map(|(at, label)| if at < 6 { IGNORE_LABEL } else { label });
        Example::new(example.ids().to_vec(), labels.collect()).unwrap()
    }

    fn options(batch_size: usize, grad_accum: usize, seq_len: usize) -> BatchOptions {
        BatchOptions { batch_size, grad_accum, seq_len, packing: false, shuffle: false, seed: 0 }
    }

    #[test]
    fn rows_are_padded_to_the_longest_of_their_micro_batch() {
        let mut batches = Batches::new(dataset(&[2, 3, 4]), options(2, 1, 8)).unwrap();
        assert_eq!(batches.steps_per_epoch(), 2);
        let first = &batches.step(0).unwrap()[0];
        assert_eq!(first.tokens.ids, [0, 1, 0, 100, 101, 102]);
        assert_eq!(first.tokens.segments, [1, 1, 0, 1, 1, 1]);
        assert_eq!(first.labels, [0, 1, -100, 100, 101, 102]);
        assert_eq!((first.tokens.rows, first.token_count()), (2, 5));
        assert_eq!(batches.step(1).unwrap()[0].tokens.ids, [200, 201, 202, 203]);
        // Start of the next epoch.
        assert_eq!(batches.step(2).unwrap()[0].tokens.ids, first.tokens.ids);
    }

    #[test]
    fn the_last_step_of_an_epoch_has_what_is_left() {
        let mut batches = Batches::new(dataset(&[2; 7]), options(2, 3, 8)).unwrap();
        let sizes = |step: Vec<MicroBatch>| step.iter().map(|micro| micro.tokens.rows).collect::<Vec<_>>();
        assert_eq!(batches.steps_per_epoch(), 2);
        assert_eq!(sizes(batches.step(0).unwrap()), [2, 2, 2]);
        assert_eq!(sizes(batches.step(1).unwrap()), [1]);
    }

    #[test]
    fn long_examples_are_cut_and_counted_and_long_texts_go_on() {
        let mut data = dataset(&[10, 3, 10]);
        data.examples[2] = late(&data.examples[2]);
        let mut batches = Batches::new(data, options(1, 1, 4)).unwrap();
        assert_eq!(batches.cut, Cut { truncated: 2, tokens: 12, dropped: 1 });
        assert_eq!(batches.examples(), 2);
        assert_eq!(batches.step(0).unwrap()[0].tokens.ids, [0, 1, 2, 3]);

        let text = Dataset { continuous: true, ..dataset(&[9]) };
        let mut batches = Batches::new(text, options(1, 1, 4)).unwrap();
        // The ninth token starts a row, so no token before it can predict it.
        assert_eq!((batches.cut, batches.examples()), (Cut::default(), 2));
        assert_eq!(batches.step(1).unwrap()[0].tokens.ids, [4, 5, 6, 7]);
    }

    #[test]
    fn without_labels_there_is_nothing_to_train_on() {
        let mut data = dataset(&[10]);
        data.examples[0] = late(&data.examples[0]);
        let error = Batches::new(data.clone(), options(1, 1, 4)).unwrap_err().to_string();
        assert!(error.contains("cut to 4 tokens"), "{error}");
        assert!(Batches::new(data.clone(), options(0, 1, 4)).unwrap_err().to_string().contains("batch size"));
        assert!(Batches::new(data, options(1, 1, 1)).unwrap_err().to_string().contains("sequence length"));
    }

    #[test]
    fn epochs_have_orders_of_their_own_which_the_seed_decides() {
        let arranged = |seed| {
            let options = BatchOptions { shuffle: true, seed, ..options(1, 1, 8) };
            Batches::new(dataset(&[2; 50]), options).unwrap()
        };
        let epoch = |batches: &mut Batches, epoch: u32| -> Vec<u32> {
            (0..50).map(|step| batches.step(epoch * 50 + step).unwrap()[0].tokens.ids[0]).collect()
        };
        let mut batches = arranged(1);
        let (first, second) = (epoch(&mut batches, 0), epoch(&mut batches, 1));
        assert_ne!(first, second);
        // Independent of what was requested before.
        assert_eq!(epoch(&mut arranged(1), 1), second);
        assert_ne!(epoch(&mut arranged(2), 0), first);
        let sorted = |mut ids: Vec<u32>| {
            ids.sort_unstable();
            ids
        };
        assert_eq!(sorted(first), sorted(second));
    }

    #[test]
    fn packed_examples_have_segments_of_their_own() {
        let packed = BatchOptions { packing: true, ..options(2, 1, 6) };
        let mut batches = Batches::new(dataset(&[4, 3, 2, 3]), packed).unwrap();
        let step = batches.step(0).unwrap();
        assert_eq!(step[0].tokens.ids, [0, 1, 2, 3, 200, 201, 100, 101, 102, 300, 301, 302]);
        assert_eq!(step[0].tokens.segments, [1, 1, 1, 1, 2, 2, 1, 1, 1, 2, 2, 2]);
        assert_eq!(batches.longest_row(), 6);
        let other = Batches::new(dataset(&[4, 3, 3, 2]), packed).unwrap();
        assert_ne!(batches.fingerprint(), other.fingerprint());
        assert_eq!(batches.fingerprint(), Batches::new(dataset(&[4, 3, 2, 3]), packed).unwrap().fingerprint());
    }

    proptest! {
        #[test]
        fn every_example_is_packed_once_and_rows_are_full(lengths in prop::collection::vec(1usize..40, 1..80)) {
            let rows = pack(&lengths, 40);
            let mut seen: Vec<usize> = rows.concat();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            let full = |row: &Vec<usize>| row.iter().map(|&i| lengths[i]).sum::<usize>();
            prop_assert!(rows.iter().all(|row| full(row) <= 40));
            // No two rows fit into one.
            for (i, row) in rows.iter().enumerate() {
                prop_assert!(rows[..i].iter().all(|other| full(row) + full(other) > 40));
            }
        }
    }
}
