{% if f16 %}
enable f16;
{% endif %}
// dX = dY * W + mask * (G * A) by register tiles of {{ side }} rows of dY by {{ side }} columns of
// W. Tiles of dY and W are staged in workgroup memory; W is decoded on the way.
//
// Floor: 2 M N K FLOP over the rate of f32. dY is read K / {{ side }} times, W is read and decoded
// M / {{ side }} times.
//
// The adapter comes first, because its mask must not affect the rest.
{% if f16 %}
// Staged as f16: rows of dY multiplied by a power of two from their own largest value, W by
// `m.factor`; undone at the end. The adapter's part is f32 and waits in dX.
{% endif %}
{% import "shared/entry.wgsl" as entry %}
{% import "shared/row_quads.wgsl" as row_quads %}
{% import "qmatmul/shared/tile_sums.wgsl" as tile_sums %}
{% set type = "vec4<f16>" if f16 else "vec4<f32>" %}
{% set quads_staged = 4 %}
{% set rank_staged = 2 if f16 else 4 %}

{% include "qmatmul/shared/backward.wgsl" %}

// The power of two for each row of dY. Only f16 staging uses it.
@group(0) @binding(4) var<storage, read> row_factor: array<f32>;
@group(0) @binding(5) var<storage, read> w4: array<vec4<u32>>; // W, bound again
@group(0) @binding(6) var<storage, read_write> dx: array<{{ "f32" if ragged else "vec4<f32>" }}>;

{% include "shared/matrix.wgsl" %}

{{ row_quads.load("a") }}

// dY is staged as [row][n / 4], W as [n][k / 4].
var<workgroup> dy_tile: array<{{ type }}, {{ side * (quads_staged + 1) }}>;
var<workgroup> w_tile: array<{{ type }}, {{ 4 * quads_staged * (side // 4 + 1) }}>;
{% if f16 %}
var<workgroup> g_tile: array<vec4<f32>, {{ side * (rank_staged + 1) }}>;
var<workgroup> a_tile: array<vec4<f32>, {{ 4 * rank_staged * (side // 4 + 1) }}>;
{% endif %}

{{ tile_sums.rank4("g") }}

{# The block handles every four results of a thread that lie in dX, in a variable whose name it is
   given; they belong at `row` and `q`. #}
{% macro each_four() %}
{% for i in range(8) %}
    {
        let row = p.row + row_base + {{ side // 8 * i }}u + ty;
        if (row < p.row + p.rows) {
{% for half in range(2) %}
            {
                let q = quad_base + {{ side // 8 * half }}u + tx;
                if (q < quads) {
{{ caller("sum" ~ i ~ "_" ~ half) }}
                }
            }
{% endfor %}
        }
    }
{% endfor %}
{% endmacro %}

{% set threads = side * side // 64 %}
{# A thread stages one of every `dy_step` rows of dY, or `g_step` rows of G. #}
{% set dy_step = threads // quads_staged %}
{% set g_step = threads // rank_staged %}
{# Words of a row of W that a thread stages at a time, and threads that share a row. #}
{% set words_each = side * quads_staged // 2 // threads %}
{% set sharing = side // 8 // words_each %}

{% call entry.each_group(threads) %}
    fill_codebook(thread);
    let column_groups = (p.k + {{ side - 1 }}u) / {{ side }}u;
    let row_group = group / column_groups;
    let quad_base = (group - row_group * column_groups) * {{ side // 4 }}u;
    let row_base = row_group * {{ side }}u;
    let tx = thread % {{ side // 8 }}u;
    let ty = thread / {{ side // 8 }}u;
    let quads = (p.k + 3u) >> 2u;

    // This thread's share of staging: a quad of some rows of dY, and words of one row of W. Rows
    // and words past the end repeat the last ones.
    let dy_quad = thread % {{ quads_staged }}u;
    let dy_local = thread / {{ quads_staged }}u;
{% for i in range(side // dy_step) %}
    let row{{ i }} = p.row + min(row_base + dy_local + {{ dy_step * i }}u, p.rows - 1u);
{% if f16 %}
    let factor{{ i }} = row_factor[row{{ i }}];
{% endif %}
{% endfor %}
    let n_local = thread / {{ sharing }}u;
    let w_local = thread % {{ sharing }}u * {{ words_each }}u;
    let w_first = quad_base / 2u + w_local;
    let w_at = n_local * {{ side // 4 + 1 }}u + 2u * w_local;
{{ tile_sums.sums() }}

{% set left, right = ("g_tile", "a_tile") if f16 else ("dy_tile", "w_tile") %}
    let g_quad = thread % {{ rank_staged }}u;
    let g_local = thread / {{ rank_staged }}u;
    for (var start = 0u; start < p.rank; start = start + {{ 4 * rank_staged }}u) {
        workgroupBarrier();
{% for i in range(side // g_step) %}
        {
            let row = p.row + min(row_base + g_local + {{ g_step * i }}u, p.rows - 1u);
            let at = (g_local + {{ g_step * i }}u) * {{ rank_staged + 1 }}u + g_quad;
            {{ left }}[at] = g4(row, start + 4u * g_quad);
        }
{% endfor %}
{% for i in range(rank_staged * side // threads) %}
        {
            let j = (thread + {{ threads * i }}u) / {{ side // 4 }}u;
            let q = thread % {{ side // 4 }}u;
            let values = a4(min(start + j, p.rank - 1u), min(quad_base + q, quads - 1u));
            {{ right }}[j * {{ side // 4 + 1 }}u + q] = values;
        }
{% endfor %}
        workgroupBarrier();
{{ tile_sums.multiply_columns(left, right, rank_staged) }}
    }
{% if dropout %}
    if (p.rank > 0u) {
{% call(sum) each_four() %}
                    {{ sum }} = {{ sum }} * dropout_factor4(row, 4u * q);
{% endcall %}
    }
{% endif %}
{% if f16 %}
    if (p.rank > 0u) {
{% call(sum) each_four() %}
                    if (p.accumulate != 0u) {
                        {{ sum }} = {{ sum }} + load4(row, q);
                    }
                    store4(row, q, {{ sum }});
{% endcall %}
{% for i in range(8) %}
        sum{{ i }}_0 = vec4<f32>(0.0);
        sum{{ i }}_1 = vec4<f32>(0.0);
{% endfor %}
    }
{% endif %}

    for (var start = 0u; start < p.n; start = start + {{ 4 * quads_staged }}u) {
        // Starts loads before the barrier. Past N the last values are repeated, and dY counts as
        // zero.
{% for i in range(side // dy_step) %}
        let own{{ i }} = dy4(row{{ i }}, start + 4u * dy_quad);
{% endfor %}
{% if chunked %}
        let n = min(start + n_local, p.n - 1u);
        let chunk = min(w_first >> 2u, (p.words - 1u) >> 2u);
        let codes = codes_of(n, chunk);
        let block = block_of(n, 32u * chunk);
        let scale = scale_of(block){{ " * p.m.factor" if f16 }};
{% if mins != "none" %}
        let low = min_of(block){{ " * p.m.factor" if f16 }};
{% endif %}
{% endif %}
        workgroupBarrier();
{% for i in range(side // dy_step) %}
        dy_tile[(dy_local + {{ dy_step * i }}u) * {{ quads_staged + 1 }}u + dy_quad] =
            {{ type }}(own{{ i }}{{ " * factor" ~ i if f16 }});
{% endfor %}
{% if chunked %}
{% if words_each == 2 %}
        let pair = select(codes.xy, codes.zw, (w_local & 2u) != 0u);
{% elif words_each == 1 %}
        let pair = select(codes.xz, codes.yw, (w_local & 1u) != 0u);
{% endif %}
{% for i in range(words_each) %}
        {
{% if words_each == 2 %}
            let word = pair.{{ "xy"[i] }};
{% else %}
            let word = select(pair.x, pair.y, (w_local & 2u) != 0u);
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
            let n = min(start + n_local, p.n - 1u);
            let weights = weights8(n, min(w_first + {{ i }}u, p.words - 1u));
            w_tile[w_at + {{ 2 * i }}u] = {{ type }}(weights.lo{{ " * p.m.factor" if f16 }});
            w_tile[w_at + {{ 2 * i + 1 }}u] = {{ type }}(weights.hi{{ " * p.m.factor" if f16 }});
        }
{% endfor %}
{% endif %}
        workgroupBarrier();
{{ tile_sums.multiply_columns("dy_tile", "w_tile", quads_staged) }}
    }

    let add = p.accumulate != 0u{{ " || p.rank > 0u" if f16 }};
{% call(sum) each_four() %}
{% if f16 %}
                    {{ sum }} = {{ sum }} * (1.0 / row_factor[row] / p.m.factor);
{% endif %}
                    if (add) {
                        {{ sum }} = {{ sum }} + load4(row, q);
                    }
                    store4(row, q, {{ sum }});
{% endcall %}
{% endcall %}
