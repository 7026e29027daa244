//! Generation: each token goes through the model once; its keys and values are kept.

use super::decoder::Decoder;
use crate::autograd::Tape;
use crate::error::{Error, Result};
use crate::indices::Indices;
use crate::kernels::attention::attention;
use crate::kernels::attention::visibility::Visibility;
use crate::kernels::elementwise::rope_append::rope_append;
use crate::kernels::qmatmul::qmatmul;
use crate::kernels::rows::embedding::{check_ids, embedding};
use crate::tensor::Tensor;

/// Keys and values for the tokens of one sequence, in every layer.
pub struct KvCache {
    /// Per layer: keys (rotated) and values, [capacity, kv_heads * head_dim] each.
    layers: Vec<[Tensor; 2]>,
    capacity: usize,
    len: usize,
}

impl KvCache {
    /// Number of tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the cache is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Maximum number of tokens.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all tokens after the first `len`.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

impl Decoder {
    /// Creates an empty cache for `capacity` tokens.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the model has fewer positions; errors of the device.
    pub fn cache(&self, capacity: usize) -> Result<KvCache> {
        self.rope_table(capacity)?;
        let width = self.config.kv_heads * self.config.head_dim;
        let zeros = || Tensor::zeros(&self.device, &[capacity, width]);
        let layers = (0..self.config.layers).map(|_| Ok([zeros()?, zeros()?])).collect::<Result<_>>()?;
        Ok(KvCache { layers, capacity, len: 0 })
    }

    /// Appends tokens to a sequence and returns the logits for the next one, [1, vocabulary].
    ///
    /// # Errors
    /// [`Error::Invalid`] for no tokens, an id outside the vocabulary, or more tokens than the
    /// cache has room for; errors of the device. After an error, truncate the cache or make a new
    /// one.
    pub fn extend(&self, cache: &mut KvCache, ids: &[u32]) -> Result<Tensor> {
        check_ids(ids, self.config.vocab_size)?;
        self.append(cache, &Indices::from_slice(&self.device, ids)?)
    }

    /// Like [`Decoder::extend`], for ids on the device; doesn't check them.
    pub(crate) fn append(&self, cache: &mut KvCache, ids: &Indices) -> Result<Tensor> {
        let (start, end) = (cache.len, cache.len + ids.len());
        if ids.is_empty() || end > cache.capacity {
            return Err(Error::invalid(
                "generation",
                "the number of tokens",
                format!("{} after {start}", ids.len()),
                format!("there is room for 1 to {} more", cache.capacity - start),
            ));
        }
        let rope = self.rope_table(end)?;
        let seen = |window: Option<usize>| {
            let range = |at: u32| (window.map_or(0, |window| (at + 1).saturating_sub(window as u32)), at + 1);
            let ranges: Vec<_> = (start as u32..end as u32).map(range).collect();
            Visibility::ranges(&self.device, &ranges, cache.capacity)
        };
        let all = seen(None)?;
        let window = self.config.sliding_window();
        let windowed = window.filter(|&window| window < end).map(|window| seen(Some(window))).transpose()?;

        let mut tape = Tape::inference();
        let mut h = tape.constant(embedding(&self.embedding, ids)?);
        for (layer, [keys, values]) in self.layers.iter().zip(&mut cache.layers) {
            let visibility = windowed.as_ref().filter(|_| layer.windowed).unwrap_or(&all);
            h = layer.forward(&mut tape, &h, &self.config, None, |tape, [q, k, v], shape| {
                let q = rope_append([&mut *keys, &mut *values], start, [q.value(), k.value(), v.value()], &rope)?;
                Ok(tape.constant(attention(&q, keys, values, &shape, visibility)?.o))
            })?;
        }
        cache.len = end;
        let last = h.value().rows(ids.len() - 1..ids.len())?;
        let normed = tape.rms_norm(&tape.constant(last), &self.norm, self.config.rms_norm_eps)?;
        qmatmul(normed.value(), &self.head, None, None)
    }
}
