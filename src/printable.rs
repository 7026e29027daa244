//! Text that is safe for a terminal. Names and messages come from files, and must not move the
//! cursor, change colours, start new lines or hide text.

use std::borrow::Cow;
use std::fmt;

/// Whether a character is invisible: control characters, marks that change text direction, and
/// zero-width characters. Joiners and variation selectors don't count, as words and emoji need
/// them.
pub fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{180e}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}')
        || matches!(c, '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// The text as one line, with hidden characters escaped as in Rust: `\n`, `\u{1b}`.
pub fn one_line(text: &str) -> Cow<'_, str> {
    escaped(text, is_hidden)
}

/// The text with line breaks and tabs kept and all other hidden characters escaped.
pub fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| !['\n', '\t'].contains(&c) && is_hidden(c))
}

fn escaped(text: &str, is_bad: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&is_bad) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if is_bad(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out.into()
}

/// Writer that escapes like [`one_line`].
pub(crate) struct OneLine<W>(pub W);

impl<W: fmt::Write> fmt::Write for OneLine<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write_str(&one_line(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_hidden_is_escaped_and_letters_are_not() {
        for (text, wanted) in [
            ("a\x1b[31mb\r\n\tc\x07", r"a\u{1b}[31mb\r\n\tc\u{7}"),
            ("\u{7f}\u{9b}31m\u{85}", r"\u{7f}\u{9b}31m\u{85}"),
            ("safe\u{202e}txt.exe\u{2066}", r"safe\u{202e}txt.exe\u{2066}"),
            ("pay\u{200b}pal \u{feff}\u{e0041}\u{2028}", r"pay\u{200b}pal \u{feff}\u{e0041}\u{2028}"),
            (
                "Zoë ไทย e\u{301} 👩\u{200d}🔬 ❤\u{fe0f} می\u{200c}خواهم C:\\n \"q\"",
                "Zoë ไทย e\u{301} 👩\u{200d}🔬 ❤\u{fe0f} می\u{200c}خواهم C:\\n \"q\"",
            ),
        ] {
            assert_eq!(one_line(text), wanted);
            assert!(!one_line(text).chars().any(is_hidden));
        }
    }

    #[test]
    fn lines_and_tabs_may_stay() {
        assert_eq!(lines("a\n\tb\r\x1b"), "a\n\tb\\r\\u{1b}");
    }
}
