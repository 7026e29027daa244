//! Reading training and evaluation data.

use std::path::Path;

use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::text::Tokenizer;
use qlora_wgpu::train::data::{DataOptions, Dataset, STDIN};

use super::output;
use super::paths::exists;

/// Checks that these paths exist, before anything else is done. Standard input may be one of them.
pub(super) fn check<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<()> {
    let mut read = false;
    for path in paths {
        if path != Path::new(STDIN) {
            exists(path)?;
        } else if std::mem::replace(&mut read, true) {
            let expected = "standard input can be read only once; name a file";
            return Err(Error::invalid("data", "more than one file", STDIN, expected));
        }
    }
    Ok(())
}

/// Reads and tokenizes a file with a progress bar, for a model with `vocabulary` rows in its
/// embedding. Warns of what it left out.
pub(super) fn read(
    path: &Path,
    tokenizer: Result<&Tokenizer, &Error>,
    skip_bad_lines: bool,
    vocabulary: usize,
) -> Result<Dataset> {
    let bar = output::bar(0, "tokenizing {wide_bar} {pos}/{len} lines");
    let options = DataOptions { skip_bad_lines, vocabulary: Some(vocabulary) };
    let data = Dataset::read_with(path, tokenizer, &options, |lines| {
        bar.set_length(lines as u64);
        bar.inc(1);
    })?;
    bar.finish_and_clear();
    if let Some(first) = &data.first_bad_line {
        output::warning(format!("{}: left out {} bad lines; the first: {first}", path.display(), data.bad_lines));
    }
    if !data.passed_over.is_empty() {
        let keys: Vec<_> = data.passed_over.iter().map(|(key, count)| format!("{key} ({count})")).collect();
        output::warning(format!("{}: ignored keys: {}", path.display(), keys.join(", ")));
    }
    Ok(data)
}
