{% if f16 %}
enable f16;
{% endif %}
// Y = X * W^T + bias + s * H * B^T by register tiles of {{ side }} rows of X by {{ side }} rows of
// W. Tiles of X and W are staged in workgroup memory; W is decoded on the way. The adapter's rank
// is {{ "a stretch of its own, in f32" if f16 else "one more stretch of the same loop" }}.
//
// Floor: 2 M N K FLOP over the rate of f32. X is read N / {{ side }} times, W is read and decoded
// M / {{ side }} times.
{% if f16 %}
// Staged as f16: rows of X multiplied by a power of two from their own largest value, W by
// `m.factor`; undone at the end.
{% endif %}
{% import "shared/entry.wgsl" as entry %}
{% import "shared/row_quads.wgsl" as row_quads %}
{% set quads_staged = 4 %}
{% set rank_staged = 2 if f16 else 4 %}
{% set type = "vec4<f16>" if f16 else "vec4<f32>" %}
{% import "qmatmul/shared/tile_sums.wgsl" as tile_sums %}

{% include "qmatmul/shared/forward.wgsl" %}

// The power of two for each row of X. Only f16 staging uses it.
@group(0) @binding(5) var<storage, read> row_factor: array<f32>;
@group(0) @binding(6) var<storage, read> w4: array<vec4<u32>>; // W, bound again
@group(0) @binding(7) var<storage, read_write> y: array<{{ "vec4<f32>" if quads else "f32" }}>;

{% include "shared/matrix.wgsl" %}

{{ row_quads.load("x") }}

{% set slots = side + 3 %}

var<workgroup> x_tile: array<{{ type }}, {{ side * (quads_staged + 1) }}>;
var<workgroup> w_tile: array<{{ type }}, {{ slots * (quads_staged + 1) }}>;
{% if f16 %}
var<workgroup> h_tile: array<vec4<f32>, {{ side * (rank_staged + 1) }}>;
var<workgroup> b_tile: array<vec4<f32>, {{ slots * (rank_staged + 1) }}>;
{% endif %}

{{ tile_sums.rank4("h") }}
{{ tile_sums.rank4("b") }}

{# A thread stages one of every `x_step` rows of X, or `h_step` rows of H. #}
{% set threads = side * side // 64 %}
{% set x_step = threads // quads_staged %}
{% set h_step = threads // rank_staged %}
{# Words of a row of W that a thread stages at a time. #}
{% set words_each = side * quads_staged // 2 // threads %}

{% call entry.each_group(threads) %}
    fill_codebook(thread);
    let column_groups = (p.n + {{ side - 1 }}u) / {{ side }}u;
    let row_group = group / column_groups;
    let n_base = (group - row_group * column_groups) * {{ side }}u;
    let row_base = row_group * {{ side }}u;
    let tx = thread % {{ side // 8 }}u;
    let ty = thread / {{ side // 8 }}u;

    // This thread's share of staging: a quad of some rows of X, and words of one row of W. Rows
    // past the end repeat the last one.
    let x_quad = thread % {{ quads_staged }}u;
    let x_local = thread / {{ quads_staged }}u;
{% for i in range(side // x_step) %}
    let row{{ i }} = p.row + min(row_base + x_local + {{ x_step * i }}u, p.rows - 1u);
{% if f16 %}
    let factor{{ i }} = row_factor[row{{ i }}];
{% endif %}
{% endfor %}
    let n_local = thread % {{ side }}u;
    let n = min(n_base + n_local, p.n - 1u);
    let w_part = thread / {{ side }}u * {{ words_each }}u;
    let w_at = {{ tile_sums.slot("n_local") }} * {{ quads_staged + 1 }}u + 2u * w_part;
{{ tile_sums.sums() }}

    let quads = (p.k + 3u) >> 2u;
    let words = (p.k + 7u) >> 3u;
    for (var start = 0u; start < quads; start = start + {{ quads_staged }}u) {
        // Starts loads before the barrier. Past K the last values are repeated, and X counts as
        // zero.
{% for i in range(side // x_step) %}
        let own{{ i }} = x4(row{{ i }}, min(start + x_quad, quads - 1u));
{% endfor %}
{% if chunked %}
        let chunk = min(start >> 3u, (words - 1u) >> 2u);
        let codes = codes_of(n, chunk);
        let block = block_of(n, 32u * chunk);
        let scale = scale_of(block){{ " * p.m.factor" if f16 }};
{% if mins != "none" %}
        let low = min_of(block){{ " * p.m.factor" if f16 }};
{% endif %}
{% endif %}
        workgroupBarrier();
{% for i in range(side // x_step) %}
        {
            let scaled = own{{ i }}{{ " * factor" ~ i if f16 }};
{% if chunked %}
            let known = scaled;
{% else %}
            let known = select(vec4<f32>(0.0), scaled, start + x_quad < quads);
{% endif %}
            let at = (x_local + {{ x_step * i }}u) * {{ quads_staged + 1 }}u + x_quad;
            x_tile[at] = {{ type }}(known);
        }
{% endfor %}
{% if chunked %}
        let pair = select(codes.xy, codes.zw, (start & 4u) != 0u);
{% for i in range(words_each) %}
        {
{% if words_each == 2 %}
            let word = pair.{{ "xy"[i] }};
{% else %}
            let word = select(pair.x, pair.y, w_part != 0u);
{% endif %}
{% for half, name in [(0, "low"), (1, "high")] %}
            w_tile[w_at + {{ 2 * i + half }}u] =
                {{ type }}(decode_{{ name }}(word) * scale{{ " + low" if mins != "none" }});
{% endfor %}
        }
{% endfor %}
{% else %}
{% for i in range(words_each) %}
        {
            let weights = weights8(n, min(start / 2u + w_part + {{ i }}u, words - 1u));
            w_tile[w_at + {{ 2 * i }}u] = {{ type }}(weights.lo{{ " * p.m.factor" if f16 }});
            w_tile[w_at + {{ 2 * i + 1 }}u] = {{ type }}(weights.hi{{ " * p.m.factor" if f16 }});
        }
{% endfor %}
{% endif %}
        workgroupBarrier();
{{ tile_sums.multiply_rows("x_tile", "w_tile", quads_staged) }}
    }

{% if f16 %}
{% for i in range(8) %}
    {
        let row = p.row + min(row_base + {{ side // 8 * i }}u + ty, p.rows - 1u);
        let undo = 1.0 / row_factor[row] / p.m.factor;
        sum{{ i }}_0 = sum{{ i }}_0 * undo;
        sum{{ i }}_1 = sum{{ i }}_1 * undo;
    }
{% endfor %}
{% endif %}

{% set left, right = ("h_tile", "b_tile") if f16 else ("x_tile", "w_tile") %}
    let h_quad = thread % {{ rank_staged }}u;
    let h_local = thread / {{ rank_staged }}u;
    for (var start = 0u; start < p.rank; start = start + {{ 4 * rank_staged }}u) {
        workgroupBarrier();
        let j = start + 4u * h_quad;
{% for i in range(side // h_step) %}
        {
            let row = p.row + min(row_base + h_local + {{ h_step * i }}u, p.rows - 1u);
            {{ left }}[(h_local + {{ h_step * i }}u) * {{ rank_staged + 1 }}u + h_quad] =
                h4(row, j);
            let column = h_local + {{ h_step * i }}u;
            let of_column = p.column + min(n_base + column, p.n - 1u);
            {{ right }}[{{ tile_sums.slot("column") }} * {{ rank_staged + 1 }}u + h_quad] =
                b4(of_column, j) * p.lora_scale;
        }
{% endfor %}
        workgroupBarrier();
{{ tile_sums.multiply_rows(left, right, rank_staged) }}
    }

{% for half in range(2) %}
    {
        let column = n_base + {{ side // 2 * half }}u + 4u * tx;
{% if not quads %}
{% for j in range(4) %}
        let c{{ j }} = p.column + min(column + {{ j }}u, p.n - 1u);
{% endfor %}
{% endif %}
{% for i in range(8) %}
        {
            let row = row_base + {{ side // 8 * i }}u + ty;
            var value = sum{{ i }}_{{ half }};
            let at = (p.row + row) * p.y_stride + p.column + column;
            if (row < p.rows) {
                if (p.bias_rows > 0u) {
{% if quads %}
                    let first = bias_at(p.row + row, p.column + min(column, p.n - 4u));
                    value = value + bias[first >> 2u];
{% else %}
                    let first = bias_at(p.row + row, 0u);
                    value = value + vec4<f32>(
                        bias[first + c0], bias[first + c1], bias[first + c2], bias[first + c3],
                    );
{% endif %}
                }
{% if quads %}
                if (column < p.n) { y[at >> 2u] = value; }
{% else %}
{% for j in range(4) %}
                if (column + {{ j }}u < p.n) { y[at + {{ j }}u] = value.{{ "xyzw"[j] }}; }
{% endfor %}
{% endif %}
            }
        }
{% endfor %}
    }
{% endfor %}
{% endcall %}
