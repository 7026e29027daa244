enable f16;
enable wgpu_cooperative_matrix;
// Y = X * W^T + bias + s * H * B^T by cooperative matrices, {{ tile_rows }} rows of X by
// {{ tile_columns }} rows of W per workgroup. Tiles of X and W are staged in workgroup memory as
// f16. W is decoded on the way and multiplied by `m.factor`; X arrives as f16, its rows multiplied
// by powers of two. Both are undone at the end.
//
// Floor: 2 M N K FLOP over the rate of f16 matrices. X is read N / {{ tile_columns }} times, W is
// read and decoded M / {{ tile_rows }} times.
//
// With `splits`, separate workgroups sum parts of K, as [split][row][column], and column_sum adds
// these up.
//
// The adapter's part is f32: it is small beside the rest, and its values may be much smaller or
// larger.
{% set natural = false %}
{% import "shared/coop.wgsl" as coop %}
{% set packed = true %}
{% import "qmatmul/shared/coop_tiles.wgsl" as tiles %}

{% include "qmatmul/shared/forward.wgsl" %}

@group(0) @binding(5) var<storage, read> row_factor: array<f32>; // of X, a power of two per row
@group(0) @binding(6) var<storage, read> w4: array<vec4<u32>>;   // W, bound again
@group(0) @binding(7) var<storage, read_write> y: array<{{ "vec4<f32>" if quads else "f32" }}>;

{% include "shared/matrix.wgsl" %}

{{ tiles.memory() }}
{# Loads the values to stage, from eight `begin + ahead` on. Past K the last weights are repeated,
   and X is padded with zeros. #}
{% macro fetch(set, begin, ahead) %}
        {
        let start = {{ begin }} + {{ ahead }}u;
        let oct = min(start + x_oct, x_octs - 1u);
{% for i in range(tiles.left_each) %}
        left{{ set }}_{{ i }} = x[x_row{{ i }} + oct];
{% endfor %}
{% if chunked %}
        let chunk = min(start, words - 1u) >> 2u;
{% for i in range(tiles.chunks_each) %}
{{ tiles.load_chunk(set, i, "n" ~ i, "chunk") }}
{% endfor %}
{% endif %}
        }
{% endmacro %}
{# Stages the loaded values. #}
{% macro stage_all(buffer, set, begin, ahead) %}
{{ tiles.stage_left(buffer, set, "x_local", "x_oct") }}
{% for i in range(tiles.chunks_each) %}
        {
{% if chunked %}
{{ tiles.scale_chunk(set, i) }}
{% endif %}
{% for j in range(tiles.chunk_words) %}
        {
{% if chunked %}
{{ tiles.decode_chunk(set, i, j) }}
{% else %}
            let word = {{ begin }} + {{ ahead }}u + w_part + {{ j }}u;
            let weights = weights8(n{{ i }}, min(word, words - 1u));
            let lo = weights.lo * p.m.factor;
            let hi = weights.hi * p.m.factor;
{% endif %}
{% call tiles.stage("right", buffer) %}
                let row = w_local + {{ tiles.threads // tiles.sharing * i }}u;
                let oct = w_part + {{ j }}u;
{% endcall %}
        }
{% endfor %}
        }
{% endfor %}
{% endmacro %}

{% call coop.each_group(tiles.threads, "y", "vec4<f32>" if quads else "f32") %}
    fill_codebook(thread);
{{ tiles.begin("p.n", "p.k") }}

    // This thread's share of staging. Rows past the end repeat the last one.
    let x_octs = {{ tiles.octs_of("p.k") }};
    let words = (p.k + 7u) >> 3u;
    let x_oct = thread % {{ tiles.octs }}u;
    let x_local = thread / {{ tiles.octs }}u;
{% for i in range(tiles.left_each) %}
    let x_local{{ i }} = row_base + x_local + {{ tiles.left_step * i }}u;
    let x_row{{ i }} = (p.row + min(x_local{{ i }}, p.rows - 1u)) * x_octs;
{% endfor %}
    let w_local = thread / {{ tiles.sharing }}u;
    let w_part = thread % {{ tiles.sharing }}u * {{ tiles.chunk_words }}u;
{% for i in range(tiles.chunks_each) %}
    let n{{ i }} = min(column_base + w_local + {{ tiles.threads // tiles.sharing * i }}u, p.n - 1u);
{% endfor %}
{{ tiles.loaded(chunked) }}
{{ tiles.stages(fetch, stage_all) }}
{{ tiles.finish_all() }}
{% endcall %}

// Stores 16 rows of a subgroup's results. A thread stores four values of a row at a time.
fn finish(split: u32, row_first: u32, column_first: u32, sums_begin: u32, lane: u32) {
    let first_row = lane / {{ tiles.quads_wide }}u;
{% for i in range(tiles.rows_each) %}
    let local{{ i }} = row_first + first_row + {{ tiles.row_step * i }}u;
    let row{{ i }} = p.row + min(local{{ i }}, p.rows - 1u);
{% endfor %}
    let quad = lane % {{ tiles.quads_wide }}u;
    let n = column_first + 4u * quad;
{% for c in range(4) %}
    let n{{ c }} = p.column + min(n + {{ c }}u, p.n - 1u);
{% endfor %}
{% for i in range(tiles.rows_each) %}
    var up{{ i }} = vec4<f32>(0.0);
{% endfor %}
    // The first split adds the bias and the adapter.
    let rank = select(0u, p.rank, split == 0u);
{% if rank_quads %}
    let ranks = rank >> 2u;
    for (var j = 0u; j < ranks; j = j + 1u) {
{% for c in range(4) %}
        let right{{ c }} = b[n{{ c }} * ranks + j];
{% endfor %}
{% for i in range(tiles.rows_each) %}
        let left{{ i }} = h[row{{ i }} * ranks + j];
{% for e in "xyzw" %}
        up{{ i }} = up{{ i }} + left{{ i }}.{{ e }}
            * vec4<f32>(right0.{{ e }}, right1.{{ e }}, right2.{{ e }}, right3.{{ e }});
{% endfor %}
{% endfor %}
    }
{% else %}
    for (var j = 0u; j < rank; j = j + 1u) {
        let right = vec4<f32>(
            b[n0 * p.rank + j], b[n1 * p.rank + j], b[n2 * p.rank + j], b[n3 * p.rank + j],
        );
{% for i in range(tiles.rows_each) %}
        up{{ i }} = up{{ i }} + h[row{{ i }} * p.rank + j] * right;
{% endfor %}
    }
{% endif %}
    let biased = p.bias_rows > 0u && split == 0u;
{% for i in range(tiles.rows_each) %}
    if (local{{ i }} < p.rows) {
{{ tiles.four(tiles.row_step * i) }}
        let undo = 1.0 / row_factor[row{{ i }}] / p.m.factor;
        var value = sum * undo + p.lora_scale * up{{ i }};
        if (biased) {
{% if quads %}
            value = value + bias[bias_at(row{{ i }}, n0) >> 2u];
{% else %}
            let at = bias_at(row{{ i }}, 0u);
            value = value + vec4<f32>(bias[at + n0], bias[at + n1], bias[at + n2], bias[at + n3]);
{% endif %}
        }
        let to = (split * p.rows + row{{ i }}) * p.y_stride + p.column + n;
{% if quads %}
        if (n < p.n) { y[to >> 2u] = value; }
{% else %}
{% for e in range(4) %}
        if (n + {{ e }}u < p.n) { y[to + {{ e }}u] = value.{{ "xyzw"[e] }}; }
{% endfor %}
{% endif %}
    }
{% endfor %}
}
