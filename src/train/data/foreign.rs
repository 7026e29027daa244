//! Recognizes files that aren't training text by their first bytes, and says what to do.

/// Describes data in a format that can't be read.
pub(super) fn name(bytes: &[u8]) -> Option<String> {
    const UNPACK: &str = "unpack it first";
    const CONVERT: &str =
        "write its rows as JSON Lines first, for example by to_json with lines=True in pandas or datasets";
    const TEXT: &str = "extract its text first";
    const UTF8: &str = "convert it to UTF-8 first, for example: iconv -f UTF-16 -t UTF-8";
    const KINDS: [(&[u8], &str, &str); 34] = [
        (b"\x1f\x8b", "compressed with gzip", UNPACK),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd", UNPACK),
        (b"\xfd7zXZ\0", "compressed with xz", UNPACK),
        (b"BZh", "compressed with bzip2", UNPACK),
        (b"\x04\x22\x4d\x18", "compressed with lz4", UNPACK),
        (b"PK\x03\x04", "a zip archive (perhaps a document or arrays)", UNPACK),
        (b"PK\x05\x06", "an empty zip archive", UNPACK),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
        (b"Rar!\x1a\x07", "a rar archive", UNPACK),
        (b"PAR1", "a Parquet table", CONVERT),
        (b"ARROW1", "an Arrow table", CONVERT),
        (b"\xff\xff\xff\xff", "a stream of Arrow tables, or other binary data", CONVERT),
        (b"FEA1", "a Feather table", CONVERT),
        (b"ORC", "an ORC table", CONVERT),
        (b"Obj\x01", "an Avro file", CONVERT),
        (b"SQLite format 3\0", "an SQLite database", CONVERT),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file", CONVERT),
        (b"\x93NUMPY", "a NumPy array", CONVERT),
        (b"%PDF-", "a PDF document", TEXT),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", TEXT),
        (b"{\\rtf", "an RTF document", TEXT),
        (b"GGUF", "a GGUF model", "give it as --model"),
        (b"\x7fELF", "a program", "give text or JSON Lines"),
        (b"\x89PNG\r\n\x1a\n", "a PNG image", "give text or JSON Lines"),
        (b"\xff\xd8\xff", "a JPEG image", "give text or JSON Lines"),
        (b"GIF8", "a GIF image", "give text or JSON Lines"),
        (b"RIFF", "audio, video or an image", "give text or JSON Lines"),
        (b"OggS", "audio or video", "give text or JSON Lines"),
        (b"ID3", "audio", "give text or JSON Lines"),
        (b"fLaC", "audio", "give text or JSON Lines"),
        (b"\xff\xfe\0\0", "UTF-32 text", "convert it to UTF-8 first, for example: iconv -f UTF-32 -t UTF-8"),
        (b"\0\0\xfe\xff", "UTF-32 text", "convert it to UTF-8 first, for example: iconv -f UTF-32 -t UTF-8"),
        (b"\xff\xfe", "UTF-16 text", UTF8),
        (b"\xfe\xff", "UTF-16 text", UTF8),
    ];
    const POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";
    if bytes.starts_with(POINTER) {
        return Some("is a Git LFS pointer, not the data; `git lfs pull` fetches the data".into());
    }
    if bytes.get(257..262) == Some(b"ustar") {
        return Some(format!("is a tar archive, not text; {UNPACK}"));
    }
    let known = KINDS.into_iter().find(|(magic, ..)| bytes.starts_with(magic));
    // Text may begin with these words, so look at what follows.
    let is_text = |magic: &[u8]| magic.is_ascii() && !magic.contains(&0) && is_plain(bytes);
    let (_, kind, hint) =
        known.filter(|(magic, ..)| magic.starts_with(b"%PDF") || magic.starts_with(b"{\\rtf") || !is_text(magic))?;
    Some(format!("is {kind}, not text; {hint}"))
}

/// Whether data begin as UTF-8 without control characters that don't occur in text.
fn is_plain(bytes: &[u8]) -> bool {
    let start = &bytes[..bytes.len().min(4096)];
    let valid = match str::from_utf8(start) {
        Ok(_) => true,
        Err(error) => error.error_len().is_none(),
    };
    valid && !start.iter().any(|&byte| is_control(byte))
}

/// Whether a control character doesn't occur in text. Tabs, line ends, form feeds and terminal
/// escapes do.
fn is_control(byte: u8) -> bool {
    byte < 0x20 && !matches!(byte, b'\t' | b'\n' | 0x0b | 0x0c | b'\r' | 0x1b | 0x08 | 0x07)
}

/// Returns bytes as text.
///
/// # Errors
/// Says what they are instead.
pub(super) fn text(bytes: &[u8]) -> Result<&str, String> {
    let line = |at: usize| bytes[..at].iter().filter(|&&byte| byte == b'\n').count() + 1;
    let start = &bytes[..bytes.len().min(4096)];
    let zeros = start.iter().filter(|&&byte| byte == 0).count();
    if zeros > 0 && zeros * 5 > start.len() * 2 && zeros * 5 < start.len() * 3 {
        return Err(
            "is UTF-16 text, or binary data; convert it to UTF-8 first, for example: iconv -f UTF-16LE -t UTF-8".into(),
        );
    }
    if let Some(at) = bytes.iter().position(|&byte| byte == 0) {
        return Err(format!("is binary data, not text: byte {at} is zero"));
    }
    match str::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(_) if start.iter().filter(|&&byte| is_control(byte)).count() * 50 > start.len() => {
            Err("is binary data, not text".into())
        }
        Err(error) => {
            let at = error.valid_up_to();
            Err(format!(
                "is not UTF-8: byte {:#04x} in line {}; convert it first, for example: iconv -f WINDOWS-1252 -t UTF-8",
                bytes[at],
                line(at)
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_are_named_by_their_first_bytes() {
        let mut tar = vec![0; 512];
        tar[257..262].copy_from_slice(b"ustar");
        let cases: [(&[u8], &str); 10] = [
            (b"\x1f\x8b\x08\0\0", "gzip"),
            (b"PAR1\x15\x04\x15", "Parquet"),
            (b"SQLite format 3\0\x10", "SQLite"),
            (b"PK\x03\x04\x14\0", "zip"),
            (b"%PDF-1.7\n", "PDF"),
            (b"ARROW1\0\0", "Arrow"),
            (b"\xff\xfe{\0\"\0", "UTF-16"),
            (b"\xff\xfe\0\0{\0\0\0", "UTF-32"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
            (&tar, "tar"),
        ];
        for (bytes, wanted) in cases {
            assert!(name(bytes).unwrap_or_default().contains(wanted), "{wanted}");
        }
        for text in ["", "version 1", "ORCs and elves", "PAR1 is a word", "GIF89a", "{\"a\": 1}", "BZhang said"] {
            assert_eq!(name(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_named() {
        assert_eq!(text("é\u{1b}[1m\n".as_bytes()), Ok("é\u{1b}[1m\n"));
        for (bytes, wanted) in [
            (&b"a\n\xe9t\xe9"[..], "byte 0xe9 in line 2"),
            (b"a\0b c d e f g", "byte 1 is zero"),
            (b"a\0b\0c\0d\0", "UTF-16"),
            (b"\x01\x02\x80\x81\x90", "binary data"),
        ] {
            let error = text(bytes).unwrap_err();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
