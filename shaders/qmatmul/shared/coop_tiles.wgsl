{# Tiles of the two large products by cooperative matrices. A workgroup owns `tile_rows` x
   `tile_columns` results; each of its `subgroups` owns `rows` x `columns` of them, in accumulators
   `sumI_J`.

   L arrives as f16, packed by pack_rows.wgsl. Both operands are staged as f16, 32 values of the
   contracted index at a time. There are two forms.

   Single: one buffer, filled and then multiplied, with two barriers per stage. It takes the least
   memory, so that many workgroups hide each other's waiting. Tiles of R are [column][contracted],
   because matrices are loaded from memory along the contracted index. `double`: two buffers. One
   is multiplied while the other is filled with values loaded a stage before. That takes one
   barrier per stage and leaves a whole stage's time for loads. Compilers mix decoding with
   products, because the buffers are separate arrays. It is for devices with few workgroups of
   large tiles. With `natural`, tiles of R are [contracted][column], as W lies in memory: such
   devices load transposed matrices equally fast.

   Buffers are arrays of vec4, so that drivers see wide loads and stores. There are two exceptions:
   Metal, which loads matrices only from arrays of single values, and values staged as pairs. #}
{% import "shared/coop.wgsl" as coop %}
{% set depth = coop.depth %}
{% set rows = tile_rows // 2 %}
{% set columns = 2 * tile_columns // subgroups %}
{% set threads = subgroups * lanes %}
{# Rows are padded by 8 values, which spreads the banks. #}
{% set stride = depth + 8 %}
{# Values per element of an array. #}
{% set unit = 4 if vectors else 1 %}
{% set right_unit = unit if double or not natural else 1 %}
{% set natural = double and natural %}
{% set right_stride = tile_columns + 8 if natural else stride %}
{% set left_type = "vec4<f16>" if unit == 4 else "f16" %}
{% set right_type = "vec4<f16>" if right_unit == 4 else "f16" %}
{# Results leave through memory in strips of 16 rows, as wide as fits: `Tile::bytes` of
   src/kernels/qmatmul/coop.rs. #}
{% set strip = 128 // subgroups if double else 16 %}
{# The last row has no padding. #}
{% set left_size = tile_rows * stride - 8 %}
{% set right_size = (depth if natural else tile_columns) * right_stride - 8 %}
{# A thread stages one eight of every `left_step` rows of L. #}
{% set octs = depth // 8 %}
{% set left_step = threads // octs %}
{% set left_each = tile_rows // left_step %}
{# Words of W, eight codes each, that a thread stages: whole chunks of four words, or a part of
   one. #}
{% set words_each = tile_columns * octs // threads %}
{% set sharing = [4 // words_each, 1] | max %}
{% set chunks_each = [words_each // 4, 1] | max %}
{% set chunk_words = [words_each, 4] | min %}

{% macro memory() %}
{% for buffer in range(2 if double else 1) %}
var<workgroup> left_tile{{ buffer }}: array<{{ left_type }}, {{ left_size // unit }}>;
var<workgroup> right_tile{{ buffer }}: array<{{ right_type }}, {{ right_size // right_unit }}>;
{% endfor %}
// A strip of results for each subgroup.
{% set type = "vec4<f32>" if vectors else "f32" %}
var<workgroup> sums: array<{{ type }}, {{ subgroups * 16 * strip // unit }}>;
{% endmacro %}

{# Start of the workgroup's tile among `width` columns of results, and start of this subgroup's
   piece in the tile. Of a contracted index of `length`, the workgroup sums its split: eights from
   `first` to `end`. #}
{% macro begin(width, length) %}
    let row_groups = (p.rows + {{ tile_rows - 1 }}u) / {{ tile_rows }}u;
    let column_groups = ({{ width }} + {{ tile_columns - 1 }}u) / {{ tile_columns }}u;
    let all_rows = group / column_groups;
    let column_base = (group - all_rows * column_groups) * {{ tile_columns }}u;
    let split = all_rows / row_groups;
    let row_base = (all_rows - split * row_groups) * {{ tile_rows }}u;
    let pairs = ({{ length }} + {{ 2 * depth - 1 }}u) / {{ 2 * depth }}u;
    let each = (pairs + p.splits - 1u) / p.splits * {{ 2 * octs }}u;
    let first = split * each;
    let end = min(first + each, ({{ length }} + 7u) >> 3u);
    let piece_row = subgroup / {{ subgroups // 2 }}u * {{ rows }}u;
    let piece_column = subgroup % {{ subgroups // 2 }}u * {{ columns }}u;
    let left_begin = piece_row * {{ stride // unit }}u;
{% if natural %}
    let right_begin = piece_column / {{ right_unit }}u;
{% else %}
    let right_begin = piece_column * {{ stride // right_unit }}u;
{% endif %}
{{ coop.accumulators(rows, columns) }}
{% endmacro %}

{# Stages the eight values of `lo` and `hi`. The block says where: a row of the tile, and an eight
   in it. #}
{% macro stage(which, buffer) %}
{% set row_stride, own_unit = (stride, unit) if which == "left" else (right_stride, right_unit) %}
            {
{{ caller() }}
                let at = row * {{ row_stride // own_unit }}u + {{ 8 // own_unit }}u * oct;
{% if own_unit == 4 %}
                {{ which }}_tile{{ buffer }}[at] = vec4<f16>(lo);
                {{ which }}_tile{{ buffer }}[at + 1u] = vec4<f16>(hi);
{% else %}
{% for half, first in [("lo", 0), ("hi", 4)] %}
{% for e in range(4) %}
                {{ which }}_tile{{ buffer }}[at + {{ first + e }}u] =
                    f16({{ half }}.{{ "xyzw"[e] }});
{% endfor %}
{% endfor %}
{% endif %}
            }
{% endmacro %}

{# Values that a thread has loaded and not yet staged: eights of L, and chunks of W with their
   scales. #}
{% macro loaded(chunks) %}
{% for set in range(2 if double else 1) %}
{% for i in range(left_each) %}
    var left{{ set }}_{{ i }}: vec4<u32>;
{% endfor %}
{% if chunks %}
{% for i in range(chunks_each) %}
    var codes{{ set }}_{{ i }}: vec4<u32>;
    var scale{{ set }}_{{ i }}: StoredScale;
{% if mins != "none" %}
    var low{{ set }}_{{ i }}: StoredMin;
{% endif %}
{% endfor %}
{% endif %}
{% endfor %}
{% endmacro %}

{# Number of eights in a row of L of `length` values, which is padded to whole pairs of stages. #}
{% macro octs_of(length) -%}
(({{ length }} + {{ 2 * depth - 1 }}u) / {{ 2 * depth }}u * {{ 2 * octs }}u)
{%- endmacro %}

{# Stages eights of L, which are words of two f16. Compilers move such words whole, without
   unpacking. #}
{% macro stage_left(buffer, set, local, local_oct) %}
{% for i in range(left_each) %}
        {
            let words = left{{ set }}_{{ i }};
            let lo = vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
            let hi = vec4<f32>(unpack2x16float(words.z), unpack2x16float(words.w));
{% call stage("left", buffer) %}
                let row = {{ local }} + {{ left_step * i }}u;
                let oct = {{ local_oct }};
{% endcall %}
        }
{% endfor %}
{% endmacro %}

{# Loads chunk `chunk` of row `n` of W. #}
{% macro load_chunk(set, i, n, chunk) %}
        codes{{ set }}_{{ i }} = codes_of({{ n }}, {{ chunk }});
        let block{{ i }} = block_of({{ n }}, 32u * {{ chunk }});
        scale{{ set }}_{{ i }} = stored_scale(block{{ i }});
{% if mins != "none" %}
        low{{ set }}_{{ i }} = stored_min(block{{ i }});
{% endif %}
{% endmacro %}

{# `scale` and `low` of a loaded chunk. #}
{% macro scale_chunk(set, i) %}
            let scale = scale_from(scale{{ set }}_{{ i }}) * p.m.factor;
{% if mins != "none" %}
            let low = min_from(low{{ set }}_{{ i }}) * p.m.factor;
{% endif %}
{% endmacro %}

{# Decodes the `j`-th word that a thread stages of a chunk, into `lo` and `hi`. #}
{% macro decode_chunk(set, i, j) %}
{% set codes = "codes" ~ set ~ "_" ~ i %}
{% if chunk_words == 4 %}
            let word = {{ codes }}.{{ "xyzw"[j] }};
{% elif chunk_words == 2 %}
            let word = select({{ codes }}.{{ "xy"[j] }}, {{ codes }}.{{ "zw"[j] }}, w_part != 0u);
{% else %}
            let halves = select({{ codes }}.xz, {{ codes }}.yw, (w_part & 1u) != 0u);
            let word = select(halves.x, halves.y, w_part > 1u);
{% endif %}
            let lo = decode_low(word) * scale{{ " + low" if mins != "none" }};
            let hi = decode_high(word) * scale{{ " + low" if mins != "none" }};
{% endmacro %}

{# Adds the product of the staged values. #}
{% macro multiply(buffer) %}
{% set left = {
    "name": "left_tile" ~ buffer, "begin": "left_begin",
    "stride": stride, "along": true, "unit": unit,
} %}
{% set right = {
    "name": "right_tile" ~ buffer, "begin": "right_begin",
    "stride": right_stride, "along": not natural, "unit": right_unit,
} %}
{{ coop.multiply(rows, columns, left, right) }}
{% endmacro %}

{# Has the shader's `finish(split, row, column, sums_begin, lane)` take the results from `sums`, a
   strip of each subgroup at a time. The arguments say where they begin in the result and in
   `sums`. #}
{% macro finish_all() %}
    let sums_begin = subgroup * {{ 16 * strip // unit }}u;
{% for down in range(0, rows, 16) %}
{% for right in range(0, columns, strip) %}
    workgroupBarrier();
{% for piece in range(0, strip, 16) %}
{{ coop.store(down, right + piece, "sums", "sums_begin", strip, unit=unit, ahead=piece // unit) }}
{% endfor %}
    workgroupBarrier();
    finish(
        split, row_base + piece_row + {{ down }}u, column_base + piece_column + {{ right }}u,
        sums_begin, lane,
    );
{% endfor %}
{% endfor %}
{% endmacro %}

{# A thread has a quad of columns in every `row_step`-th row of a strip. #}
{% set quads_wide = strip // 4 %}
{% set row_step = lanes // quads_wide %}
{% set rows_each = 16 // row_step %}

{# Four results `sum`, from row `first_row + ahead` and quad `quad` of a strip on. #}
{% macro four(ahead) %}
        let sums_at = sums_begin
            + (first_row + {{ ahead }}u) * {{ strip // unit }}u + {{ 4 // unit }}u * quad;
{% if vectors %}
        let sum = sums[sums_at];
{% else %}
        let sum = vec4<f32>(
            sums[sums_at], sums[sums_at + 1u], sums[sums_at + 2u], sums[sums_at + 3u],
        );
{% endif %}
{% endmacro %}

{# The stages of a product. Macros of the caller load and stage the values from eight
   `begin + ahead` on. #}
{% macro stages(fetch, stage_all) %}
{{ fetch(0, "first", 0) }}
{% if double %}
{{ fetch(1, "first", octs) }}
    workgroupBarrier();
{{ stage_all(0, 0, "first", 0) }}

    for (var start = first; start < end; start = start + {{ 2 * octs }}u) {
        workgroupBarrier();
{{ fetch(0, "start", 2 * octs) }}
{{ stage_all(1, 1, "start", octs) }}
{{ multiply(0) }}
        workgroupBarrier();
{{ fetch(1, "start", 3 * octs) }}
{{ stage_all(0, 0, "start", 2 * octs) }}
{{ multiply(1) }}
    }
{% else %}

    for (var start = first; start < end; start = start + {{ octs }}u) {
        workgroupBarrier();
{{ stage_all(0, 0, "start", 0) }}
        workgroupBarrier();
{{ fetch(0, "start", octs) }}
{{ multiply(0) }}
    }
{% endif %}
{% endmacro %}
