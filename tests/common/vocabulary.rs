//! Makes GGUF files with a tokenizer from lines that may be changed at will. Most changes make
//! another valid tokenizer, while a change of a file's lengths and counts hardly ever does.

/// Makes a file from lines. The first byte of a line gives its meaning.
///
/// | first byte | the rest |
/// |---|---|
/// | `0` to `9` | a token of this type |
/// | `m` | a merge |
/// | `s` | the next token's score; the model is then `llama`, else `gpt2` |
/// | `p` | the pre-tokenizer |
/// | `b`, `e`, `t` | the id of the begin token, the end token, the token that ends a turn |
/// | `f` | three flags, `1` for true: `add_bos_token`, `add_eos_token`, `add_space_prefix` |
/// | other | a line of the chat template |
pub fn file(bytes: &[u8]) -> Vec<u8> {
    let lines = String::from_utf8_lossy(bytes);
    let (mut tokens, mut types, mut merges) = (Vec::new(), Vec::new(), Vec::new());
    let (mut scores, mut model) = (Vec::new(), "gpt2");
    let (mut entries, mut template) = (Vec::new(), String::new());
    for line in lines.split('\n') {
        let mut rest = line.chars();
        let Some(first) = rest.next() else { continue };
        let rest = rest.as_str();
        let mut id = |key: &str| rest.parse().map(|id: u32| entries.push(entry(key, 4, &id.to_le_bytes()))).ok();
        match first {
            '0'..='9' => {
                tokens.push(text(rest));
                types.push((first as u32 - u32::from(b'0')).to_le_bytes().to_vec());
                scores.resize(tokens.len(), (-(tokens.len() as f32)).to_le_bytes().to_vec());
            }
            'm' => merges.push(text(rest)),
            's' => {
                model = "llama";
                scores.extend(rest.parse::<f32>().map(|score| score.to_le_bytes().to_vec()));
            }
            'p' => entries.push(entry("pre", 8, &text(rest))),
            'b' => drop(id("bos_token_id")),
            'e' => drop(id("eos_token_id")),
            't' => drop(id("eot_token_id")),
            'f' => {
                let keys = ["add_bos_token", "add_eos_token", "add_space_prefix"];
                entries
                    .extend(keys.iter().zip(rest.bytes()).map(|(key, flag)| entry(key, 7, &[u8::from(flag == b'1')])));
            }
            _ => template.extend([line, "\n"]),
        }
    }
    scores.truncate(tokens.len());
    entries.extend([
        entry("model", 8, &text(model)),
        entry("tokens", 9, &array(8, &tokens)),
        entry("token_type", 9, &array(5, &types)),
        entry("merges", 9, &array(8, &merges)),
        entry("scores", 9, &array(6, &scores)),
        pair("tokenizer.chat_template", 8, &text(&template)),
    ]);
    let counts = [0_u64.to_le_bytes(), (entries.len() as u64).to_le_bytes()].concat();
    [&b"GGUF"[..], &3_u32.to_le_bytes(), &counts, &entries.concat()].concat()
}

fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    pair(&format!("tokenizer.ggml.{key}"), kind, value)
}

fn pair(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(key), &kind.to_le_bytes()[..], value].concat()
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn array(kind: u32, elements: &[Vec<u8>]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &(elements.len() as u64).to_le_bytes(), &elements.concat()].concat()
}
