//! Models in several files, as written by llama.cpp's `gguf-split`: `NAME-00001-of-00003.gguf` and
//! so on. Each file has its number (`split.no`, from 0) and the number of files (`split.count`).
//! The first has the model's metadata.

use std::path::PathBuf;

use super::GgufFile;
use crate::error::{Error, Result};

const NUMBER: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";

/// Keys that only a split model has.
pub(crate) const SPLIT_KEYS: [&str; 3] = [NUMBER, COUNT, TENSORS];

/// Opens the other files of the model whose first file is `first`; empty for a model in one file.
///
/// # Errors
/// [`Error::Io`] for a missing part; [`Error::File`] if the file isn't the first part, or the
/// parts don't belong together.
pub(super) fn others(first: &GgufFile) -> Result<Vec<GgufFile>> {
    let (number, count): (usize, usize) = (first.get(NUMBER)?.unwrap_or(0), first.get(COUNT)?.unwrap_or(1));
    if number == 0 && count <= 1 {
        return Ok(Vec::new());
    }
    let refuse = |message: String| Err(Error::File { path: first.path().into(), message });
    let part = format!("is part {} of {count} of a model", number.saturating_add(1));
    let Some(names) = names(first, number, count) else {
        let end = format!("-{:05}-of-{count:05}.gguf", number.saturating_add(1));
        return refuse(format!("{part}; its name must end in {end}, so that the others can be found"));
    };
    if number != 0 {
        return refuse(format!("{part}; give the first, {}", names[0].display()));
    }
    let open = |(i, path): (usize, PathBuf)| {
        let file = GgufFile::open_one(&path).map_err(|error| match error {
            Error::Io { path, kind, message } => {
                let message = format!("{message}; it is part {} of {count} of {}", i + 1, first.path().display());
                Error::Io { path, kind, message }
            }
            error => error,
        })?;
        if (file.get(NUMBER)?, file.get(COUNT)?) == (Some(i), Some(count)) {
            return Ok(file);
        }
        let message = format!("is not part {} of {count} of {}", i + 1, first.path().display());
        Err(Error::File { path, message })
    };
    names.into_iter().enumerate().skip(1).map(open).collect()
}

/// Paths of all parts, from the path of one; `None` if its name doesn't have this form.
fn names(file: &GgufFile, number: usize, count: usize) -> Option<Vec<PathBuf>> {
    let name = file.path().file_name()?.to_str()?;
    let end = |number: usize| format!("-{number:05}-of-{count:05}.gguf");
    let stem = name.strip_suffix(&end(number.checked_add(1)?))?;
    // Names have five digits.
    (count <= 99_999)
        .then(|| (1..=count).map(|number| file.path().with_file_name(format!("{stem}{}", end(number)))).collect())
}

impl GgufFile {
    /// Adds the tensors of another part.
    pub(super) fn append(&mut self, part: GgufFile) -> Result<()> {
        let file = self.maps.len();
        let overlap = part.header.tensors.keys().find(|name| self.contains(name));
        if let Some(name) = overlap {
            return Err(part.tensor_error(name, format!("is in {} too", self.map_of(name).path().display())));
        }
        self.maps.extend(part.maps);
        for (name, mut place) in part.header.tensors {
            place.file = file;
            self.header.tensors.insert(name, place);
        }
        Ok(())
    }

    /// Checks that the number of tensors is the total stated in the first part.
    pub(super) fn check_count(&self) -> Result<()> {
        match self.get::<usize>(TENSORS)? {
            Some(count) if count != self.header.tensors.len() => Err(self.metadata_error(
                TENSORS,
                format!("is {count}, but the model's files have {} tensors", self.header.tensors.len()),
            )),
            _ => Ok(()),
        }
    }
}
