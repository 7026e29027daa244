//! Writes a tokenizer as Hugging Face files that [`Tokenizer::from_dir`] reads.

use std::path::Path;

use serde_json::json;
use tokenizers::processors::template::TemplateProcessing;

use super::steps::Chain;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

impl Tokenizer {
    /// Returns names and contents of `tokenizer.json`, `tokenizer_config.json` and, if there is a
    /// template, `chat_template.jinja`. `path` is the tokenizer's origin, for errors.
    ///
    /// # Errors
    /// [`Error::File`] if the tokenizers library can't write them.
    pub(crate) fn files(&self, path: &Path) -> Result<Vec<(String, Vec<u8>)>> {
        let failed = |message: String| Error::File { path: path.into(), message };
        let mut inner = self.inner().clone();
        // The tokens around a text, which `Tokenizer` adds itself.
        let (add_bos, add_eos) = self.adds();
        let around =
            [(self.bos().filter(|_| add_bos), self.bos_text()), (self.eos().filter(|_| add_eos), self.eos_text())];
        if around.iter().any(|(id, _)| id.is_some()) {
            let piece = |(id, text): &(Option<u32>, &str)| id.map(|_| format!("{text}:0 ")).unwrap_or_default();
            let single = format!("{}$A:0 {}", piece(&around[0]), piece(&around[1]));
            let special = around.iter().filter_map(|(id, text)| Some((text.to_string(), (*id)?))).collect::<Vec<_>>();
            let template = TemplateProcessing::builder()
                .try_single(single.trim())
                .map_err(|e| failed(e.to_string()))?
                .special_tokens(special)
                .build()
                .map_err(|e| failed(e.to_string()))?;
            inner.with_post_processor(Some(Chain::of([template.into()])));
        }
        let text = inner.to_string(true).map_err(|e| failed(e.to_string()))?;
        let named = |id: Option<u32>, text: &str| id.map(|_| text.to_owned());
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": named(self.bos(), self.bos_text()),
            "eos_token": named(self.eos(), self.eos_text()),
            "add_bos_token": add_bos,
            "add_eos_token": add_eos,
            "clean_up_tokenization_spaces": false,
        });
        let mut files = vec![
            ("tokenizer.json".to_owned(), text.into_bytes()),
            ("tokenizer_config.json".to_owned(), format!("{config:#}\n").into_bytes()),
        ];
        files.extend(self.chat_template().map(|text| ("chat_template.jinja".to_owned(), text.as_bytes().to_vec())));
        Ok(files)
    }
}
