//! Encodes a long text piece by piece on all cores. Encoding it at once with `tokenizers` takes
//! more than a hundred times the text's size.
//!
//! Every piece is encoded together with some of the text on either side. Pieces are joined if the
//! tokens around the cut are the same in both encodings. The result then equals that of the whole
//! text: a pre-tokenizer continues after a cut between two words as it would have without it, and
//! BPE's tokens around a cut depend on the text near it. Pieces that don't agree are encoded again,
//! as one.

use std::ops::Range;

use rayon::prelude::*;

use crate::error::Result;

/// Size of a piece in bytes. Every core encodes one at a time.
const PIECE: usize = 16 << 10;

/// Bytes of text on either side that a piece is encoded with.
const AROUND: usize = 512;

/// Bytes on either side of a cut in which the tokens must agree.
const SAME: usize = 128;

/// A token and the bytes of text that it stands for.
type Token = (u32, Range<usize>);

/// Whether a text of this many bytes is worth cutting.
pub(super) fn is_long(bytes: usize) -> bool {
    bytes > 2 * PIECE
}

/// Returns the ids of `text`, encoding it in parts with `spans`.
pub(super) fn encode(text: &str, spans: impl Fn(&str) -> Result<Vec<Token>> + Sync) -> Result<Vec<u32>> {
    let mut parts: Vec<Part> = ranges(text).into_iter().map(Part::Range).collect();
    loop {
        let read = |part| match part {
            Part::Range(range) => Piece::read(text, range, &spans),
            Part::Piece(piece) => Ok(piece),
        };
        let pieces = parts.into_par_iter().map(read).collect::<Result<Vec<_>>>()?;
        if pieces.windows(2).all(|pair| pair[0].joins(&pair[1])) {
            let mut ids = Vec::with_capacity(pieces.iter().map(|piece| piece.ids.len()).sum());
            pieces.into_iter().for_each(|piece| ids.extend(piece.ids));
            return Ok(ids);
        }
        parts = united(pieces);
    }
}

/// A part of the text, encoded or not.
enum Part {
    Range(Range<usize>),
    Piece(Piece),
}

struct Piece {
    range: Range<usize>,
    /// Ids of the tokens that start in the range.
    ids: Vec<u32>,
    /// Tokens around its start and its end.
    head: Vec<Token>,
    tail: Vec<Token>,
}

impl Piece {
    fn read(text: &str, range: Range<usize>, spans: impl Fn(&str) -> Result<Vec<Token>>) -> Result<Piece> {
        let from = boundary(text, range.start.saturating_sub(AROUND));
        let to = boundary(text, range.end + AROUND);
        let mut tokens = spans(&text[from..to])?;
        tokens.iter_mut().for_each(|(_, span)| *span = span.start + from..span.end + from);
        let around = |cut: usize| {
            let near = cut.saturating_sub(SAME)..cut + SAME;
            tokens.iter().filter(|(_, span)| near.contains(&span.start)).cloned().collect()
        };
        let (head, tail) = (around(range.start), around(range.end));
        let ids = tokens.iter().filter(|(_, span)| range.contains(&span.start)).map(|&(id, _)| id);
        // The last piece includes what starts at the text's end: a token that stands for no text.
        let rest = tokens.iter().filter(|(_, span)| to == range.end && span.start >= to).map(|&(id, _)| id);
        Ok(Piece { ids: ids.chain(rest).collect(), head, tail, range })
    }

    fn joins(&self, next: &Piece) -> bool {
        !self.tail.is_empty() && self.tail == next.head
    }
}

/// Merges pieces that don't join into one part each.
fn united(pieces: Vec<Piece>) -> Vec<Part> {
    let joins: Vec<bool> = pieces.windows(2).map(|pair| pair[0].joins(&pair[1])).collect();
    let mut parts: Vec<Part> = Vec::new();
    for (at, piece) in pieces.into_iter().enumerate() {
        match parts.last_mut() {
            Some(last) if !joins[at - 1] => {
                let start = match last {
                    Part::Range(range) => range.start,
                    Part::Piece(piece) => piece.range.start,
                };
                *last = Part::Range(start..piece.range.end);
            }
            _ => parts.push(Part::Piece(piece)),
        }
    }
    parts
}

/// Cuts the text after lines if possible, otherwise after words, otherwise between characters.
fn ranges(text: &str) -> Vec<Range<usize>> {
    let (mut ranges, mut start) = (Vec::new(), 0);
    while text.len() - start > PIECE {
        let most = boundary(text, start + PIECE);
        let least = boundary(text, start + PIECE / 2);
        let after = |end: char| text[least..most].rfind(end).map(|at| least + at + 1);
        let end = after('\n').or_else(|| after(' ')).unwrap_or(most);
        ranges.push(start..end);
        start = end;
    }
    ranges.push(start..text.len());
    ranges
}

/// The last character boundary at or before `at`.
fn boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Encodes words and the blanks between them as tokens; `longest` becomes the maximum number
    /// of bytes requested at once.
    fn words(longest: &AtomicUsize) -> impl Fn(&str) -> Result<Vec<Token>> + Sync {
        |text| {
            longest.fetch_max(text.len(), Ordering::Relaxed);
            let mut tokens: Vec<Token> = Vec::new();
            for (at, character) in text.char_indices() {
                let (blank, end) = (character.is_whitespace(), at + character.len_utf8());
                match tokens.last_mut() {
                    Some((id, span)) if (*id == 0) == blank => {
                        *id += u32::from(!blank);
                        span.end = end;
                    }
                    _ => tokens.push((u32::from(!blank), at..end)),
                }
            }
            Ok(tokens)
        }
    }

    #[test]
    fn pieces_have_the_ids_of_the_whole() {
        let line = "über twenty words, in a line\r\n\n  of text ".repeat(5000);
        let (word, blank) = ("x".repeat(100_000), " ".repeat(100_000));
        let texts = [
            (line.clone(), PIECE + 2 * AROUND),
            // Nowhere to cut: encoded as one.
            (word.clone(), word.len()),
            (blank.clone(), blank.len()),
            ([&*line, &word, &line, &blank, &line, "\n"].concat(), 150_000),
            ("é".repeat(70_000), 140_000),
            (String::new(), 0),
        ];
        for (text, most) in texts {
            let longest = AtomicUsize::new(0);
            let ids = encode(&text, words(&longest)).unwrap();
            assert!(longest.load(Ordering::Relaxed) <= most, "{} of {}", longest.load(Ordering::Relaxed), text.len());
            let whole: Vec<u32> = words(&longest)(&text).unwrap().into_iter().map(|(id, _)| id).collect();
            assert!(ids == whole, "{} bytes", text.len());
        }
    }
}
