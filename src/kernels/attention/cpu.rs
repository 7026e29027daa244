//! Fast [`attention`](crate::kernels::attention) and its backward on the CPU. A task covers some
//! queries of one key head. A GEMM crate multiplies a block of queries with the keys that it sees.

use std::ops::Range;

use gemm::Parallelism;
use rayon::prelude::*;

use super::call::AttentionShape;
use super::visibility::Visibility;
use crate::device::Cpu;
use crate::error::Result;
use crate::kernels::Scratch;
use crate::kernels::cpu::exp::exp;
use crate::kernels::cpu::product::{Columns, View};

/// Queries per block.
const BLOCK: usize = 64;
/// Maximum spans of queries that the backward works on at once. Each has its own gradients of K
/// and V.
const SPANS: usize = 8;

/// Returns the rows of one head of a matrix [rows, heads * D], from `row` on.
fn head_rows<'a>(data: &'a [f32], heads: usize, head: usize, head_dim: usize, row: usize) -> View<'a> {
    View { data: &data[(row * heads + head) * head_dim..], row_stride: heads * head_dim, col_stride: 1 }
}

/// Returns the transposed matrix.
fn transposed(view: View<'_>) -> View<'_> {
    View { row_stride: view.col_stride, col_stride: view.row_stride, ..view }
}

/// Returns a view of a row-major matrix of `cols` columns without gaps.
fn dense(data: &[f32], cols: usize) -> View<'_> {
    View { data, row_stride: cols, col_stride: 1 }
}

/// Returns the part of `seen` that lies within `block`, counted from the block's start.
fn within(seen: Range<usize>, block: &Range<usize>) -> Range<usize> {
    let at = |key: usize| key.clamp(block.start, block.end) - block.start;
    at(seen.start)..at(seen.end)
}

/// Returns the rows of each block.
fn blocks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(BLOCK).map(move |start| start..(start + BLOCK).min(rows))
}

/// Returns each block of rows of a matrix [rows, heads * width], split into heads.
fn head_columns(data: &mut [f32], heads: usize, width: usize) -> impl Iterator<Item = Columns<'_>> {
    data.chunks_mut(BLOCK * heads * width).flat_map(move |chunk| {
        let rows = chunk.len() / (heads * width);
        Columns::new(chunk, rows, heads * width).split(width)
    })
}

/// Returns the number of rows per span of queries, and the spans for `m` queries.
fn spans(m: usize) -> (usize, Vec<Range<usize>>) {
    let rows = m.div_ceil(SPANS).max(1).next_multiple_of(BLOCK);
    (rows, (0..m).step_by(rows).map(|start| start..(start + rows).min(m)).collect())
}

/// Number of values in the gradients of K and V that a span holds for itself.
fn own_values(visibility: &Visibility, span: &Range<usize>, width: usize) -> usize {
    2 * visibility.of_queries(span).len() * width
}

/// Number of scores of each task. Every key head has its own tasks.
fn scores(shape: &AttentionShape, visibility: &Visibility) -> Vec<usize> {
    let of_block = |block: Range<usize>| block.len() * visibility.of_queries(&block).len();
    blocks(visibility.queries()).flat_map(|block| vec![of_block(block); shape.kv_heads]).collect()
}

/// Memory that [`forward`] takes.
pub(crate) fn scratch(shape: &AttentionShape, visibility: &Visibility) -> Scratch {
    Scratch::tasks(scores(shape, visibility))
}

/// Memory that [`Backward::run`] takes.
pub(crate) fn backward_scratch(shape: &AttentionShape, visibility: &Visibility) -> Scratch {
    let width = shape.kv_heads * shape.head_dim;
    let kept = spans(visibility.queries()).1.iter().map(|span| own_values(visibility, span, width)).collect();
    Scratch { kept, tasks: scores(shape, visibility), of_task: 2 }
}

/// Computes O and the log-sum-exp of [Q, K, V]. The caller has checked the shapes; `o` and `lse`
/// are zeros.
pub(crate) fn forward(
    cpu: &Cpu,
    [q, k, v]: [&[f32]; 3],
    shape: &AttentionShape,
    visibility: &Visibility,
    o: &mut [f32],
    lse: &mut [f32],
) -> Result<()> {
    let AttentionShape { heads, kv_heads, head_dim, scale } = *shape;
    let group = shape.group();
    let results = head_columns(o, kv_heads, group * head_dim).zip(head_columns(lse, kv_heads, group));
    let tasks = blocks(visibility.queries()).flat_map(|block| (0..kv_heads).map(move |head| (block.clone(), head)));
    let tasks: Vec<_> = tasks.zip(results).collect();
    tasks.into_par_iter().with_max_len(1).try_for_each(|((queries, kv_head), (o, mut lse))| {
        let keys = visibility.of_queries(&queries);
        let mut scores = cpu.zeros(queries.len() * keys.len())?;
        for (g, mut o) in o.split(head_dim).into_iter().enumerate() {
            let q = head_rows(q, heads, kv_head * group + g, head_dim, queries.start);
            if keys.is_empty() {
                (0..queries.len()).for_each(|row| lse.row(row)[g] = f32::NEG_INFINITY);
                continue;
            }
            let k = transposed(head_rows(k, kv_heads, kv_head, head_dim, keys.start));
            Columns::new(&mut scores, queries.len(), keys.len()).product(
                q,
                k,
                head_dim,
                scale,
                false,
                Parallelism::None,
            );
            let mut sums = [0.0; BLOCK];
            for ((row, scores), sum) in scores.chunks_exact_mut(keys.len()).enumerate().zip(&mut sums) {
                let seen = within(visibility.of_query(queries.start + row), &keys);
                scores[..seen.start].fill(0.0);
                scores[seen.end..].fill(0.0);
                let most = largest(&scores[seen.clone()]);
                *sum = weights(&mut scores[seen], most);
                lse.row(row)[g] = most + sum.ln();
            }
            let v = head_rows(v, kv_heads, kv_head, head_dim, keys.start);
            o.product(dense(&scores, keys.len()), v, keys.len(), 1.0, false, Parallelism::None);
            for (row, &sum) in sums[..queries.len()].iter().enumerate().filter(|(_, sum)| **sum != 0.0) {
                let inverse = 1.0 / sum;
                o.row(row).iter_mut().for_each(|value| *value *= inverse);
            }
        }
        Ok(())
    })
}

/// Returns the largest value, or minus infinity if there are none.
fn largest(values: &[f32]) -> f32 {
    let (chunks, tail) = values.as_chunks::<8>();
    let mut most = [f32::NEG_INFINITY; 8];
    for chunk in chunks {
        for lane in 0..8 {
            most[lane] = if chunk[lane] > most[lane] { chunk[lane] } else { most[lane] };
        }
    }
    most.iter().chain(tail).fold(f32::NEG_INFINITY, |most, &value| most.max(value))
}

/// Turns scores into exp(score - shift) and returns their sum, added up in eight partial sums.
fn weights(scores: &mut [f32], shift: f32) -> f32 {
    let (chunks, tail) = scores.as_chunks_mut::<8>();
    let mut sums = [0.0f32; 8];
    for chunk in chunks {
        for lane in 0..8 {
            chunk[lane] = exp(chunk[lane] - shift);
            sums[lane] += chunk[lane];
        }
    }
    for score in &mut *tail {
        *score = exp(*score - shift);
    }
    sums.iter().sum::<f32>() + tail.iter().sum::<f32>()
}

/// Operands of the backward. The caller has checked their shapes.
pub(crate) struct Backward<'a> {
    pub cpu: &'a Cpu,
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub d_o: &'a [f32],
    /// Log-sum-exp of every query and head.
    pub lse: &'a [f32],
    /// The sum over d of dO * O for every query and head.
    pub deltas: &'a [f32],
    pub shape: &'a AttentionShape,
    pub visibility: &'a Visibility,
}

/// P and dS for some queries of a head and some keys.
struct Scores<'a> {
    weights: &'a mut [f32],
    d_scores: &'a mut [f32],
}

impl Backward<'_> {
    /// Computes dQ, dK and dV, which are zeros at first. A task is a span of queries of one key
    /// head. Spans see the same keys, so each adds to its own gradients of K and V; these are
    /// added up in order at the end. So the number of threads doesn't change the sums.
    pub fn run(&self, dq: &mut [f32], dk: &mut [f32], dv: &mut [f32]) -> Result<()> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = *self.shape;
        let (group, width) = (self.shape.group(), kv_heads * head_dim);
        let m = self.visibility.queries();
        let (span_rows, spans) = spans(m);
        let own = |span: &Range<usize>| self.cpu.zeros(own_values(self.visibility, span, width));
        let mut grads = spans.iter().map(own).collect::<Result<Vec<_>>>()?;

        let mut tasks = Vec::new();
        let results = dq.chunks_mut(span_rows * heads * head_dim).zip(&mut grads);
        for (span, (dq, grads)) in spans.iter().zip(results) {
            let keys = grads.len() / 2 / width;
            let (dk, dv) = grads.split_at_mut(keys * width);
            let [dk, dv] = [dk, dv].map(|grad| Columns::new(grad, keys, width).split(head_dim));
            let dq = Columns::new(dq, span.len(), heads * head_dim).split(group * head_dim);
            // Without keys there are no columns.
            tasks.extend(dq.into_iter().zip(dk.into_iter().zip(dv)).enumerate().map(|of_head| (span.clone(), of_head)));
        }
        tasks
            .into_par_iter()
            .with_max_len(1)
            .try_for_each(|(span, (kv_head, (dq, (dk, dv))))| self.span(&span, kv_head, dq, dk, dv))?;

        let rows = dk.par_chunks_mut(BLOCK * width).zip(dv.par_chunks_mut(BLOCK * width)).enumerate();
        rows.for_each(|(block, (dk, dv))| {
            let rows = block * BLOCK..block * BLOCK + dk.len() / width;
            for (span, grads) in spans.iter().zip(&grads) {
                let keys = self.visibility.of_queries(span);
                let shared = keys.start.max(rows.start)..keys.end.min(rows.end);
                if shared.is_empty() {
                    continue;
                }
                let (span_dk, span_dv) = grads.split_at(keys.len() * width);
                let (at, from) = (shared.start - rows.start, shared.start - keys.start);
                for (sum, grad) in [(&mut *dk, span_dk), (&mut *dv, span_dv)] {
                    let grad = &grad[from * width..][..shared.len() * width];
                    sum[at * width..].iter_mut().zip(grad).for_each(|(sum, grad)| *sum += grad);
                }
            }
        });
        Ok(())
    }

    /// Sets `dq` for a span of queries, and adds to `dk` and `dv` for the keys that it sees, all
    /// of one key head.
    fn span(
        &self,
        span: &Range<usize>,
        kv_head: usize,
        mut dq: Columns<'_>,
        mut dk: Columns<'_>,
        mut dv: Columns<'_>,
    ) -> Result<()> {
        let AttentionShape { heads, kv_heads, head_dim, scale } = *self.shape;
        let group = self.shape.group();
        let first_key = self.visibility.of_queries(span).start;
        for start in span.clone().step_by(BLOCK) {
            let queries = start..(start + BLOCK).min(span.end);
            let keys = self.visibility.of_queries(&queries);
            if keys.is_empty() {
                continue;
            }
            let size = queries.len() * keys.len();
            let (mut weights, mut d_scores) = (self.cpu.zeros(size)?, self.cpu.zeros(size)?);
            let own_keys = keys.start - first_key..keys.end - first_key;
            let (mut dk, mut dv) = (dk.rows(own_keys.clone()), dv.rows(own_keys));
            let dq = dq.rows(queries.start - span.start..queries.end - span.start).split(head_dim);
            for (head, mut dq) in (kv_head * group..).zip(dq) {
                self.scores(Scores { weights: &mut weights, d_scores: &mut d_scores }, head, &queries, &keys);
                let q = head_rows(self.q, heads, head, head_dim, queries.start);
                let k = head_rows(self.k, kv_heads, kv_head, head_dim, keys.start);
                let d_o = head_rows(self.d_o, heads, head, head_dim, queries.start);
                let (weights, d_scores) = (dense(&weights, keys.len()), dense(&d_scores, keys.len()));
                dq.product(d_scores, k, keys.len(), scale, false, Parallelism::None);
                dk.product(transposed(d_scores), q, queries.len(), scale, true, Parallelism::None);
                dv.product(transposed(weights), d_o, queries.len(), 1.0, true, Parallelism::None);
            }
        }
        Ok(())
    }

    /// Computes P = exp(scale * Q * K^T - lse) and dS = P * (dO * V^T - delta) for one head,
    /// [queries, keys].
    fn scores(&self, scores: Scores<'_>, head: usize, queries: &Range<usize>, keys: &Range<usize>) {
        let AttentionShape { heads, kv_heads, head_dim, scale } = *self.shape;
        let kv_head = head / self.shape.group();
        let Scores { weights, d_scores } = scores;
        let q = head_rows(self.q, heads, head, head_dim, queries.start);
        let d_o = head_rows(self.d_o, heads, head, head_dim, queries.start);
        let k = transposed(head_rows(self.k, kv_heads, kv_head, head_dim, keys.start));
        let v = transposed(head_rows(self.v, kv_heads, kv_head, head_dim, keys.start));
        let (rows, cols) = (queries.len(), keys.len());
        Columns::new(weights, rows, cols).product(q, k, head_dim, scale, false, Parallelism::None);
        Columns::new(d_scores, rows, cols).product(d_o, v, head_dim, 1.0, false, Parallelism::None);
        let rows = weights.chunks_exact_mut(cols).zip(d_scores.chunks_exact_mut(cols));
        for (query, (weights, d_scores)) in queries.clone().zip(rows) {
            let seen = within(self.visibility.of_query(query), keys);
            for values in [&mut *weights, &mut *d_scores] {
                values[..seen.start].fill(0.0);
                values[seen.end..].fill(0.0);
            }
            let (lse, delta) = (self.lse[query * heads + head], self.deltas[query * heads + head]);
            for (weight, d_score) in weights[seen.clone()].iter_mut().zip(&mut d_scores[seen]) {
                *weight = exp(*weight - lse);
                *d_score = *weight * (*d_score - delta);
            }
        }
    }
}
