//! Training text: reads files of examples and converts them to token ids and labels.
//!
//! A file is JSON Lines (one object per line; empty lines are skipped), a JSON list of objects,
//! objects over several lines, a table of comma- or tab-separated values whose first row names its
//! columns, or one text. The content decides, whatever the file's name. Objects and table rows
//! have one of these forms:
//!
//! | keys | becomes | loss on |
//! |---|---|---|
//! | `prompt`, `completion` | prompt, then completion; messages: chat template | completion |
//! | `messages`: a list of `role`, `content` | the model's chat template | the assistant's turns |
//! | `conversations`: a list of `from`, `value` | the same | the same |
//! | `instruction`, `output`, perhaps `input` | messages; no template: Stanford Alpaca | output |
//! | `text` | itself | everything |
//! | `input_ids`, perhaps `labels` | themselves | the labels that are not -100 |
//!
//! Chats may also have `tools`, `documents`, `chat_template_kwargs` and `system`, if the template
//! uses them. Instructions may have `system` and `history`, a list of questions with their
//! answers. `input_ids` may have the masks `attention_mask`, `assistant_masks` and
//! `completion_mask`. Keys that only say where an example comes from (`id`, `source` and the like)
//! are ignored and counted. Any other key is an error, so that nothing is lost unnoticed.
//!
//! A turn of the assistant ends with its end-of-turn token. Any other text ends with the
//! tokenizer's end token, which is added if it is missing. These tokens carry loss; otherwise a
//! model wouldn't learn to stop.

mod foreign;
mod ids;
mod line;
mod object;
mod records;
mod table;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use self::line::{Reader, check_columns};
use self::records::Content;
pub use self::records::Format;
pub use super::example::Example;
use crate::error::{Error, Result};
use crate::seed::shuffled;
use crate::text::Tokenizer;

/// Path that stands for standard input.
pub const STDIN: &str = "-";

/// Options for reading examples.
#[derive(Clone, Copy, Debug, Default)]
pub struct DataOptions {
    /// Skip and count malformed lines instead of failing at the first.
    pub skip_bad_lines: bool,
    /// Rows of the model's embedding, an upper bound for ids and labels; `None`: the number of the
    /// tokenizer's ids.
    pub vocabulary: Option<usize>,
}

/// The examples of a file, in the file's order.
#[derive(Clone, Debug, Default)]
pub struct Dataset {
    /// At least one example.
    pub examples: Vec<Example>,
    /// Format of the file.
    pub format: Format,
    /// Whether the only example is a text without lines. It may have any length and is cut into
    /// pieces.
    pub continuous: bool,
    /// Number of lines (or objects, or rows) skipped.
    pub bad_lines: usize,
    /// Error for the first of them.
    pub first_bad_line: Option<Error>,
    /// Ignored keys, each with the number of lines that have it.
    pub passed_over: Vec<(&'static str, usize)>,
}

impl Dataset {
    /// Reads the file at `path`, which may be a pipe or [`STDIN`], in a single pass, and tokenizes
    /// it on all cores. Only `input_ids` work without a tokenizer; for text, the error says why
    /// there is none.
    ///
    /// # Errors
    /// [`Error::Io`] if it can't be read. [`Error::File`], with the line number, for a line that
    /// is malformed, has no known form, is refused by the chat template, has no token with loss,
    /// or has an unknown key or an id outside the vocabulary; also for a file that isn't text or
    /// has no examples.
    pub fn read(path: impl AsRef<Path>, tokenizer: Result<&Tokenizer, &Error>, options: &DataOptions) -> Result<Self> {
        Dataset::read_with(path, tokenizer, options, |_| ())
    }

    /// Like [`Dataset::read`]; calls `progress` after every line with the number of lines so far.
    ///
    /// # Errors
    /// Same as [`Dataset::read`].
    pub fn read_with(
        path: impl AsRef<Path>,
        tokenizer: Result<&Tokenizer, &Error>,
        options: &DataOptions,
        progress: impl Fn(usize) + Sync,
    ) -> Result<Self> {
        let path = path.as_ref();
        let (bytes, path) = if path == Path::new(STDIN) {
            let mut bytes = Vec::new();
            let path = Path::new("standard input");
            io::stdin().lock().read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
            (bytes, path)
        } else {
            (bytes(path)?, path)
        };
        let file_error = |message: String| Error::File { path: path.into(), message };
        let (content, columns) = records::read(&bytes, path, check_columns).map_err(file_error)?;
        let reader = Reader::new(tokenizer, options.vocabulary);
        let (format, records) = match content {
            Content::Records(format, records) => (format, records),
            Content::Text(text) => {
                let examples = vec![reader.whole(text).map_err(file_error)?];
                return Ok(Dataset { examples, format: Format::Text, continuous: true, ..Dataset::default() });
            }
        };

        let count = records.len();
        // Index of the first record that ends reading; later ones needn't be read.
        let ends_at = AtomicUsize::new(usize::MAX);
        let read: Vec<_> = records
            .into_par_iter()
            .enumerate()
            .inspect(|_| progress(count))
            .filter(|(at, _)| *at <= ends_at.load(Ordering::Relaxed))
            .map(|(at, record)| {
                let example = record.object(&columns).and_then(|object| reader.example(&object));
                let place = if format == Format::JsonList { format!("element {}, ", at + 1) } else { String::new() };
                if example.is_err() && !options.skip_bad_lines {
                    ends_at.fetch_min(at, Ordering::Relaxed);
                }
                example.map_err(|message| file_error(format!("{place}line {}: {message}", record.line)))
            })
            .collect();

        let mut dataset = Dataset { format, passed_over: reader.passed_over(), ..Dataset::default() };
        for example in read {
            match example {
                Ok(example) => dataset.examples.push(example),
                Err(error) if options.skip_bad_lines => {
                    dataset.bad_lines += 1;
                    dataset.first_bad_line.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        if dataset.examples.is_empty() {
            let first =
                dataset.first_bad_line.map(|error| format!("; the first bad line: {error}")).unwrap_or_default();
            return Err(file_error(format!("has no examples{first}")));
        }
        Ok(dataset)
    }
}

/// Reads the bytes of a file or a pipe. A device might have no end.
fn bytes(path: &Path) -> Result<Vec<u8>> {
    let metadata = fs::metadata(path).map_err(|e| Error::io(path, e))?;
    let refused = |what: &str| Err(Error::File { path: path.into(), message: format!("is {what}, not a data file") });
    if metadata.is_dir() {
        return refused("a directory");
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if metadata.file_type().is_char_device() || metadata.file_type().is_block_device() {
            return refused("a device");
        }
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)).map_err(|e| Error::io(path, e))?;
    Ok(bytes)
}

impl Dataset {
    /// Removes and returns this share of the examples: at least one and not all, chosen by the
    /// seed.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is only one example, or the share isn't between 0 and 1.
    pub fn split(&mut self, share: f64, seed: u64) -> Result<Vec<Example>> {
        const OP: &str = "data split";
        let count = self.examples.len();
        if !(share > 0.0 && share < 1.0) {
            return Err(Error::invalid(OP, "the share", share, "it must be between 0 and 1"));
        }
        if count < 2 {
            let expected = "splitting needs at least two; give a separate file for evaluation instead";
            return Err(Error::invalid(OP, "the number of examples", count, expected));
        }
        let taken = ((share * count as f64).round() as usize).clamp(1, count - 1);
        let out: BTreeSet<usize> = shuffled(seed, count).into_iter().take(taken).collect();
        let (mut kept, mut split) = (Vec::new(), Vec::new());
        for (index, example) in std::mem::take(&mut self.examples).into_iter().enumerate() {
            if out.contains(&index) { split.push(example) } else { kept.push(example) }
        }
        self.examples = kept;
        Ok(split)
    }
}
