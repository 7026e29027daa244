//! Tables of comma- or tab-separated values.

use std::collections::BTreeSet;

use csv_core::{ReadRecordResult, Reader, ReaderBuilder};

/// Returns delimiter and columns if the bytes are a table: the file is named like one, the columns
/// match a form of examples, or the column names are words and the first rows have as many fields
/// as there are columns.
pub(super) fn columns(
    bytes: &[u8],
    called: bool,
    is_form: impl Fn(&[String]) -> Result<(), String>,
) -> Option<(char, Vec<String>)> {
    /// Number of bytes and rows to look at.
    const START: usize = 64 << 10;
    const SAMPLE: usize = 20;

    let end = bytes.get(..START).and_then(|start| start.iter().rposition(|&byte| byte == b'\n'));
    let bytes = &bytes[..end.map_or(bytes.len().min(START), |end| end + 1)];
    let first = |delimiter| -> Option<(char, Vec<String>)> {
        let (_, row) = Rows::new(bytes, delimiter).next()?;
        Some((delimiter, row))
    };
    let (delimiter, written) = ['\t', '|', ';', ','].into_iter().filter_map(first).max_by_key(|(_, row)| row.len())?;
    let columns: Vec<String> = written.iter().map(|name| name.trim().to_owned()).collect();
    let is_name = |name: &String| {
        !name.is_empty() && name.len() <= 64 && name.chars().all(|c| c.is_alphanumeric() || "_-.".contains(c))
    };
    let is_like_one = || {
        // A name with a space after the comma is part of a sentence, not a column name.
        let names: BTreeSet<&String> = written.iter().filter(|name| is_name(name)).collect();
        let mut rows = Rows::new(bytes, delimiter).skip(1).take(SAMPLE).peekable();
        names.len() == columns.len() && rows.peek().is_some() && rows.all(|(_, row)| row.len() == columns.len())
    };
    let is_one = called || columns.len() >= 2 && (is_form(&columns).is_ok() || is_like_one());
    is_one.then_some((delimiter, columns))
}

/// Rows of a table including the column names, each with the line where it begins.
pub(super) struct Rows<'a> {
    reader: Reader,
    rest: &'a [u8],
    line: usize,
}

impl<'a> Rows<'a> {
    pub(super) fn new(bytes: &'a [u8], delimiter: char) -> Self {
        let reader = ReaderBuilder::new().delimiter(delimiter as u8).build();
        Rows { reader, rest: bytes, line: 1 }
    }

    fn advance(&mut self, bytes: usize) {
        let (read, rest) = self.rest.split_at(bytes);
        self.line += read.iter().filter(|&&byte| byte == b'\n').count();
        self.rest = rest;
    }
}

impl Iterator for Rows<'_> {
    type Item = (usize, Vec<String>);

    fn next(&mut self) -> Option<Self::Item> {
        // Empty lines, and the rest of the last line's end.
        let empty = self.rest.iter().take_while(|byte| b"\r\n".contains(byte)).count();
        self.advance(empty);
        let line = self.line;
        let (mut text, mut ends) = (vec![0; 1 << 10], vec![0; 16]);
        let (mut text_len, mut ends_len) = (0, 0);
        loop {
            let (result, read, written, ended) =
                self.reader.read_record(self.rest, &mut text[text_len..], &mut ends[ends_len..]);
            self.advance(read);
            text_len += written;
            ends_len += ended;
            match result {
                // Called again without input, the reader ends the row.
                ReadRecordResult::InputEmpty => {}
                ReadRecordResult::OutputFull => text.resize(2 * text.len(), 0),
                ReadRecordResult::OutputEndsFull => ends.resize(2 * ends.len(), 0),
                ReadRecordResult::Record => break,
                ReadRecordResult::End => return None,
            }
        }
        let starts = [0].into_iter().chain(ends[..ends_len].iter().copied());
        let field = |(start, &end): (usize, &usize)| String::from_utf8_lossy(&text[start..end]).into_owned();
        Some((line, starts.zip(&ends[..ends_len]).map(field).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_know_their_lines_and_quoted_fields_may_have_several() {
        let long = "x".repeat(5000);
        let text = format!("a,b\r\n\r\n\"1\n\"\"2\"\"\",é\r\n{long},\n,{}", ",".repeat(40));
        let rows: Vec<(usize, Vec<String>)> = Rows::new(text.as_bytes(), ',').collect();
        assert_eq!(rows[0], (1, vec!["a".into(), "b".into()]));
        assert_eq!(rows[1], (3, vec!["1\n\"2\"".into(), "é".into()]));
        assert_eq!(rows[2], (5, vec![long, String::new()]));
        assert_eq!((rows[3].0, rows[3].1.len(), rows.len()), (6, 42, 4));
    }
}
