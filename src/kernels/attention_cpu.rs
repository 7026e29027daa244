//! [`attention`](super::attention) and its backward on the CPU, fast: a task is a block of queries (or keys) of one head of
//! keys; scores of the block against the keys that it sees come from a GEMM crate.

use std::ops::Range;

use gemm::Parallelism;
use rayon::prelude::*;

use super::attention::AttentionShape;
use super::exp::exp;
use super::product::{Columns, View};
use super::visibility::Visibility;
use crate::device::Cpu;
use crate::error::Result;

/// Queries, or keys, a task.
const BLOCK: usize = 64;
/// Queries at a time within a block of keys: their scores stay in the cache.
const STRETCH: usize = 256;

/// Rows of one head of a matrix [rows, heads * D], from `row` on.
fn head_rows<'a>(data: &'a [f32], heads: usize, head: usize, head_dim: usize, row: usize) -> View<'a> {
    View { data: &data[(row * heads + head) * head_dim..], row_stride: heads * head_dim, col_stride: 1 }
}

/// The same matrix with rows and columns exchanged.
fn transposed(view: View<'_>) -> View<'_> {
    View { row_stride: view.col_stride, col_stride: view.row_stride, ..view }
}

/// A matrix of `cols` columns without gaps.
fn dense(data: &[f32], cols: usize) -> View<'_> {
    View { data, row_stride: cols, col_stride: 1 }
}

/// The part of `seen` within `block`, counted from the block's start.
fn within(seen: Range<usize>, block: &Range<usize>) -> Range<usize> {
    let at = |key: usize| key.clamp(block.start, block.end) - block.start;
    at(seen.start)..at(seen.end)
}

/// Blocks of rows, and which rows each has.
fn blocks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(BLOCK).map(move |start| start..(start + BLOCK).min(rows))
}

/// Each block of rows of a matrix [rows, heads * width], cut into heads.
fn head_columns(data: &mut [f32], heads: usize, width: usize) -> impl Iterator<Item = Columns<'_>> {
    data.chunks_mut(BLOCK * heads * width).flat_map(move |chunk| {
        let rows = chunk.len() / (heads * width);
        Columns::new(chunk, rows, heads * width).split(width)
    })
}

/// O and log-sum-exp of [Q, K, V]; the caller has checked the shapes, `o` and `lse` are zeros.
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

/// The largest value; minus infinity of none.
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

/// Turns scores into exp(score - shift); their sum, in eight partial sums.
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

/// Operands of the backward; the caller has checked their shapes.
pub(crate) struct Backward<'a> {
    pub cpu: &'a Cpu,
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub d_o: &'a [f32],
    /// Log-sum-exp of every query and head.
    pub lse: &'a [f32],
    /// The sum over d of dO * O, of every query and head.
    pub deltas: &'a [f32],
    pub shape: &'a AttentionShape,
    pub visibility: &'a Visibility,
}

/// P and dS of some queries of a head and some keys.
struct Scores<'a> {
    weights: &'a mut [f32],
    d_scores: &'a mut [f32],
}

impl Backward<'_> {
    /// dQ, block by block of queries; `dq` is zeros.
    pub fn queries(&self, dq: &mut [f32]) -> Result<()> {
        let AttentionShape { kv_heads, head_dim, scale, .. } = *self.shape;
        let group = self.shape.group();
        let tasks = blocks(self.visibility.queries())
            .flat_map(|block| (0..kv_heads).map(move |head| (block.clone(), head)))
            .zip(head_columns(dq, kv_heads, group * head_dim));
        let tasks: Vec<_> = tasks.collect();
        tasks.into_par_iter().with_max_len(1).try_for_each(|((queries, kv_head), dq)| {
            let keys = self.visibility.of_queries(&queries);
            let size = queries.len() * keys.len();
            let (mut weights, mut d_scores) = (self.cpu.zeros(size)?, self.cpu.zeros(size)?);
            if keys.is_empty() {
                return Ok(());
            }
            for (g, mut dq) in dq.split(head_dim).into_iter().enumerate() {
                let scores = Scores { weights: &mut weights, d_scores: &mut d_scores };
                self.scores(scores, kv_head * group + g, &queries, &keys);
                let k = head_rows(self.k, kv_heads, kv_head, head_dim, keys.start);
                dq.product(dense(&d_scores, keys.len()), k, keys.len(), scale, false, Parallelism::None);
            }
            Ok(())
        })
    }

    /// dK and dV, block by block of keys; `dk` and `dv` are zeros.
    pub fn keys(&self, dk: &mut [f32], dv: &mut [f32]) -> Result<()> {
        let AttentionShape { heads, kv_heads, head_dim, scale } = *self.shape;
        let group = self.shape.group();
        let tasks = blocks(self.visibility.keys())
            .flat_map(|block| (0..kv_heads).map(move |head| (block.clone(), head)))
            .zip(head_columns(dk, kv_heads, head_dim).zip(head_columns(dv, kv_heads, head_dim)));
        let tasks: Vec<_> = tasks.collect();
        tasks.into_par_iter().with_max_len(1).try_for_each(|((keys, kv_head), (mut dk, mut dv))| {
            let seen_by = self.visibility.of_keys(&keys);
            let size = seen_by.len().min(STRETCH) * keys.len();
            let (mut weights, mut d_scores) = (self.cpu.zeros(size)?, self.cpu.zeros(size)?);
            let mut add = false;
            for start in seen_by.clone().step_by(STRETCH) {
                let queries = start..(start + STRETCH).min(seen_by.end);
                let size = queries.len() * keys.len();
                let (weights, d_scores) = (&mut weights[..size], &mut d_scores[..size]);
                for head in kv_head * group..(kv_head + 1) * group {
                    self.scores(Scores { weights, d_scores }, head, &queries, &keys);
                    let q = head_rows(self.q, heads, head, head_dim, queries.start);
                    let d_o = head_rows(self.d_o, heads, head, head_dim, queries.start);
                    let (weights, d_scores) = (dense(weights, keys.len()), dense(d_scores, keys.len()));
                    dv.product(transposed(weights), d_o, queries.len(), 1.0, add, Parallelism::None);
                    dk.product(transposed(d_scores), q, queries.len(), scale, add, Parallelism::None);
                    add = true;
                }
            }
            Ok(())
        })
    }

    /// P = exp(scale * Q * K^T - lse) and dS = P * (dO * V^T - delta) of one head, [queries, keys].
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
