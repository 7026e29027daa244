enable f16;
enable wgpu_cooperative_matrix;
// dX = dY * W + mask * (G * A) by cooperative matrices, {{ tile_rows }} rows of dY by
// {{ tile_columns }} columns of W per workgroup. Tiles of dY and W are staged in workgroup memory
// as f16. W is decoded on the way and multiplied by `m.factor`; dY arrives as f16, its rows
// multiplied by powers of two. Both are undone at the end.
//
// Floor: 2 M N K FLOP over the rate of f16 matrices. dY is read K / {{ tile_columns }} times, W is
// read and decoded M / {{ tile_rows }} times.
//
// With `splits`, separate workgroups sum parts of N, as [split][row][column], and column_sum adds
// these up.
//
// The adapter's part is f32, like in the forward.
{% import "shared/row_quads.wgsl" as row_quads %}
{% set natural = true %}
{% set packed = true %}
{% import "shared/coop.wgsl" as coop %}
{% import "qmatmul/shared/coop_tiles.wgsl" as tiles %}
{# A thread stages chunks of 32 columns, or words of eight, in one of every `units` rows of W. #}
{% set units = tiles.threads // tiles.sharing %}
{% if not double %}
{# A thread stages quads of two neighbouring rows of W, as pairs: one quad, or whole words. #}
{% set pairs = coop.depth // 2 %}
{% set quads_each = pairs * tile_columns // 4 // tiles.threads %}
{% set pair_words = quads_each // 2 %}
{# Scales of chunks of 32, which are staged separately. #}
{% set scales_staged = coop.depth * tile_columns // 32 %}
{% endif %}

{% include "qmatmul/shared/backward.wgsl" %}

@group(0) @binding(4) var<storage, read> row_factor: array<f32>; // of dY, a power of two per row
@group(0) @binding(5) var<storage, read> w4: array<vec4<u32>>;   // W, bound again
@group(0) @binding(6) var<storage, read_write> dx: array<{{ "f32" if ragged else "vec4<f32>" }}>;

{% include "shared/matrix.wgsl" %}

{{ row_quads.load("a") }}

{{ tiles.memory() }}
{% if chunked and not double %}
// Scales for this stage and the next, multiplied by `m.factor`: [n][chunk].
var<workgroup> scale_tile: array<f32, {{ 2 * scales_staged }}>;
{% if mins != "none" %}
var<workgroup> min_tile: array<f32, {{ 2 * scales_staged }}>;
{% endif %}
{% endif %}

{# Loads the values to stage, from eight `begin + ahead` of the rows of W on. Past N the last row is
   repeated, and dY is padded with zeros. #}
{% macro fetch(set, begin, ahead) %}
        {
        let start = {{ begin }} + {{ ahead }}u;
        let oct = min(p.column / 8u + start + dy_oct, dy_octs - 1u);
{% for i in range(tiles.left_each) %}
        left{{ set }}_{{ i }} = dy[dy_row{{ i }} + oct];
{% endfor %}
{% if chunked and double %}
{% for i in range(tiles.chunks_each) %}
        let n{{ i }} = min(8u * start + w_local{{ i }}, p.n - 1u);
{{ tiles.load_chunk(set, i, "n" ~ i, "chunk" ~ i) }}
{% endfor %}
{% elif chunked %}
        let n0 = min(8u * start + pair, p.n - 1u) * p.m.row_words;
        let n1 = min(8u * start + pair + 1u, p.n - 1u) * p.m.row_words;
{% for i in range([pair_words, 1] | max) %}
        first{{ i }} = w[n0 + word{{ i }}];
        second{{ i }} = w[n1 + word{{ i }}];
{% endfor %}
        // Scales go to the half of their memory that is not being read.
        half = {{ scales_staged }}u - half;
        for (var i = thread; i < {{ scales_staged }}u; i = i + {{ tiles.threads }}u) {
            let n = min(8u * start + i / {{ tile_columns // 32 }}u, p.n - 1u);
            let chunk_wanted = column_base / 32u + i % {{ tile_columns // 32 }}u;
            let chunk = min(chunk_wanted, (p.words - 1u) >> 2u);
            let block = block_of(n, 32u * chunk);
            scale_tile[half + i] = scale_of(block) * p.m.factor;
{% if mins != "none" %}
            min_tile[half + i] = min_of(block) * p.m.factor;
{% endif %}
        }
{% endif %}
        }
{% endmacro %}
{# Stages the loaded values. #}
{% macro stage_all(buffer, set, begin, ahead) %}
{{ tiles.stage_left(buffer, set, "dy_local", "dy_oct") }}
{% if double %}
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
            let n = min(8u * ({{ begin }} + {{ ahead }}u) + w_local{{ i }}, p.n - 1u);
            let word = column_base / 8u + 4u * w_chunk{{ i }} + w_part + {{ j }}u;
            let weights = weights8(n, min(word, p.words - 1u));
            let lo = weights.lo * p.m.factor;
            let hi = weights.hi * p.m.factor;
{% endif %}
{% call tiles.stage("right", buffer) %}
                let row = w_local{{ i }};
                let oct = 4u * w_chunk{{ i }} + w_part + {{ j }}u;
{% endcall %}
        }
{% endfor %}
        }
{% endfor %}
{% else %}
{% for i in range([pair_words, 1] | max) %}
        {
            let to = 4u * (w_quad + {{ 2 * i }}u) * {{ tiles.stride }}u + pair;
{% if chunked %}
            let scales = half + pair * {{ tile_columns // 32 }}u + (w_quad + {{ 2 * i }}u) / 8u;
{% for which, name in [(0, "first"), (1, "second")] %}
            let scale{{ which }} = scale_tile[scales + {{ which * tile_columns // 32 }}u];
{% if mins != "none" %}
            let low{{ which }} = min_tile[scales + {{ which * tile_columns // 32 }}u];
{% endif %}
{% set low = " + low" ~ which if mins != "none" %}
{% if pair_words == 0 %}
            let {{ name }} = {{ name }}{{ i }} >> (16u * (w_quad & 1u));
            let {{ name }}_0 = decode_low({{ name }}) * scale{{ which }}{{ low }};
{% else %}
            let {{ name }}_0 = decode_low({{ name }}{{ i }}) * scale{{ which }}{{ low }};
            let {{ name }}_1 = decode_high({{ name }}{{ i }}) * scale{{ which }}{{ low }};
{% endif %}
{% endfor %}
{% else %}
{% for which, name in [(0, "first"), (1, "second")] %}
            let n{{ which }} =
                min(8u * ({{ begin }} + {{ ahead }}u) + pair + {{ which }}u, p.n - 1u);
{% if pair_words == 0 %}
            let quad{{ which }} = min(column_base / 4u + w_quad, 2u * p.words - 1u);
            let {{ name }}_0 = weights4(n{{ which }}, quad{{ which }}) * p.m.factor;
{% else %}
            let {{ name }} = weights8(n{{ which }}, word{{ i }});
            let {{ name }}_0 = {{ name }}.lo * p.m.factor;
            let {{ name }}_1 = {{ name }}.hi * p.m.factor;
{% endif %}
{% endfor %}
{% endif %}
{% for e in range(4 if pair_words == 0 else 8) %}
            right_tile0[to + {{ e * tiles.stride }}u] = f16(first_{{ e // 4 }}.{{ "xyzw"[e % 4] }});
            right_tile0[to + {{ e * tiles.stride + 1 }}u] =
                f16(second_{{ e // 4 }}.{{ "xyzw"[e % 4] }});
{% endfor %}
        }
{% endfor %}
{% endif %}
{% endmacro %}

{% call coop.each_group(tiles.threads, "dx", "f32" if ragged else "vec4<f32>") %}
    fill_codebook(thread);
{{ tiles.begin("p.k", "p.n") }}

    // This thread's share of staging. Rows and columns past the end repeat the last ones.
    let dy_octs = {{ tiles.octs_of("p.dy_stride") }};
    let dy_oct = thread % {{ tiles.octs }}u;
    let dy_local = thread / {{ tiles.octs }}u;
{% for i in range(tiles.left_each) %}
    let dy_local{{ i }} = row_base + dy_local + {{ tiles.left_step * i }}u;
    let dy_row{{ i }} = (p.row + min(dy_local{{ i }}, p.rows - 1u)) * dy_octs;
{% endfor %}
{% if double %}
    let w_part = thread % {{ tiles.sharing }}u * {{ tiles.chunk_words }}u;
{% for i in range(tiles.chunks_each) %}
    // Neighbouring threads have two chunks of a few rows, so their stores use different banks.
    let unit{{ i }} = thread / {{ tiles.sharing }}u + {{ units * i }}u;
    let w_local{{ i }} = unit{{ i }} / 2u % {{ coop.depth }}u;
    let w_chunk{{ i }} = unit{{ i }} % 2u + unit{{ i }} / {{ 2 * coop.depth }}u * 2u;
{% if chunked %}
    let chunk{{ i }} = min(column_base / 32u + w_chunk{{ i }}, (p.words - 1u) >> 2u);
{% endif %}
{% endfor %}
{% else %}
    // Neighbouring threads stage neighbouring pairs, so their stores use different banks.
    let pair = 2u * (thread % {{ pairs }}u);
    let w_quad = thread / {{ pairs }}u * {{ quads_each }}u;
{% for i in range([pair_words, 1] | max) %}
    let word{{ i }} = min((column_base / 4u + w_quad) / 2u + {{ i }}u, p.words - 1u);
{% if chunked %}
    var first{{ i }}: u32;
    var second{{ i }}: u32;
{% endif %}
{% endfor %}
    var half = 0u;
{% endif %}
{{ tiles.loaded(chunked and double) }}
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
    let q = column_first / 4u + quad;
    // Columns past the end are read as the last ones and not stored.
    let near = min(q, (p.k - 1u) >> 2u);
    // The first split adds the adapter.
    let rank = select(0u, p.rank, split == 0u);
{% for i in range(tiles.rows_each) %}
    var down{{ i }} = vec4<f32>(0.0);
{% endfor %}
{% if rank_quads %}
    for (var j = 0u; j < rank; j = j + 4u) {
{% for e in range(4) %}
        let right{{ e }} = a4(j + {{ e }}u, near);
{% endfor %}
{% for i in range(tiles.rows_each) %}
        let left{{ i }} = g[(row{{ i }} * p.rank + j) >> 2u];
{% for e in range(4) %}
        down{{ i }} = down{{ i }} + left{{ i }}.{{ "xyzw"[e] }} * right{{ e }};
{% endfor %}
{% endfor %}
    }
{% else %}
    for (var j = 0u; j < rank; j = j + 1u) {
        let right = a4(j, near);
{% for i in range(tiles.rows_each) %}
        down{{ i }} = down{{ i }} + g[row{{ i }} * p.rank + j] * right;
{% endfor %}
    }
{% endif %}
{% for i in range(tiles.rows_each) %}
    if (local{{ i }} < p.rows && 4u * q < p.k) {
{{ tiles.four(tiles.row_step * i) }}
        let undo = 1.0 / row_factor[row{{ i }}] / p.m.factor;
{% if dropout %}
        let adapter = down{{ i }} * dropout_factor4(row{{ i }}, 4u * q);
{% else %}
        let adapter = down{{ i }};
{% endif %}
        var value = sum * undo + adapter;
        let to = split * p.rows + row{{ i }};
        if (p.accumulate != 0u) { value = value + load4(to, q); }
        store4(to, q, value);
    }
{% endfor %}
}
