{# Tiles of the two large products by cooperative matrices. A workgroup owns `side` x `side` results; each of its `subgroups` owns
   `rows` x `columns` of them, in accumulators `sumI_J`.

   Both operands are staged as f16, 32 values of the contracted index at a time. There are two forms.

   Single: one buffer, filled and then multiplied, with two barriers a stage. It takes the least memory, so that many workgroups hide
   each other's waiting. Tiles of R are [column][contracted], as matrices are loaded from memory along the contracted index.
   `double`: two buffers, of which one is multiplied while the other is filled with what was loaded a stage before: one barrier a
   stage, a whole stage's time for loads, and decoding that compilers mix with products, as the buffers are arrays of their own. It
   is for devices with few workgroups of large tiles. Buffers are arrays of vec4, so that drivers know of wide loads and stores
   (Metal loads matrices from arrays of single values only). With `natural`, tiles of R are [contracted][column], as W lies in
   memory: such devices load transposed matrices as fast. #}
{% from "coop.wgsl" import depth, accumulators, multiply as multiply_tiles, store %}
{% set rows = side // 2 %}
{% set columns = 2 * side // subgroups %}
{% set threads = subgroups * lanes %}
{# Rows are padded by 8 values, which spreads the banks. #}
{% set stride = depth + 8 %}
{% set natural = double and natural %}
{% set right_stride = side + 8 if natural else stride %}
{# Results leave through memory in strips of 16 rows, as wide as there is room for: `Tile::bytes` of src/kernels/qmatmul_coop.rs. #}
{% set strip = 128 // subgroups if double else 16 %}
{# The last row has no padding. #}
{% set left_size = side * stride - 8 %}
{% set right_size = (depth if natural else side) * right_stride - 8 %}
{# Values in an element of what they lie in. #}
{% set unit = 4 if double else 1 %}
{# Eights of L that a thread stages: of one row in so many. #}
{% set octs = depth // 8 %}
{% set left_step = threads // octs %}
{% set left_each = side // left_step %}
{# Words of W, eight codes each, that a thread stages: whole chunks of four, or a part of one. #}
{% set words_each = side * octs // threads %}
{% set sharing = [4 // words_each, 1] | max %}
{% set chunks_each = [words_each // 4, 1] | max %}
{% set chunk_words = [words_each, 4] | min %}

{% macro memory() %}
{% set type = "vec4<f16>" if double else "f16" %}
{% for buffer in range(2 if double else 1) %}
var<workgroup> left_tile{{ buffer }}: array<{{ type }}, {{ left_size // unit }}>;
var<workgroup> right_tile{{ buffer }}: array<{{ type }}, {{ right_size // unit }}>;
{% endfor %}
// A strip of each subgroup's results.
var<workgroup> sums: array<{{ "vec4<f32>" if double else "f32" }}, {{ subgroups * 16 * strip // unit }}>;
{% endmacro %}

{# Where the workgroup's tile begins, and where in it this subgroup's piece does. #}
{% macro begin() %}
    let row_group = group / p.column_groups;
    let column_base = (group - row_group * p.column_groups) * {{ side }}u;
    let row_base = row_group * {{ side }}u;
    let piece_row = subgroup / {{ subgroups // 2 }}u * {{ rows }}u;
    let piece_column = subgroup % {{ subgroups // 2 }}u * {{ columns }}u;
    let left_begin = piece_row * {{ stride // unit }}u;
    let right_begin = piece_column{{ " / " ~ unit ~ "u" if natural else " * " ~ stride // unit ~ "u" }};
{{ accumulators(edge, rows, columns) }}
{% endmacro %}

{# Stages eight values, two vec4, from row `row` and eight `oct` of a tile on. #}
{% macro stage(which, buffer, row, oct, lo, hi) %}
{% set row_stride = stride if which == "left" else right_stride %}
            {
                let at = ({{ row }}) * {{ row_stride // unit }}u + {{ 8 // unit }}u * ({{ oct }});
{% if double %}
                {{ which }}_tile{{ buffer }}[at] = vec4<f16>({{ lo }});
                {{ which }}_tile{{ buffer }}[at + 1u] = vec4<f16>({{ hi }});
{% else %}
{% for e in range(8) %}
                {{ which }}_tile{{ buffer }}[at + {{ e }}u] = f16({{ lo if e < 4 else hi }}.{{ "xyzw"[e % 4] }});
{% endfor %}
{% endif %}
            }
{% endmacro %}

{# What a thread has loaded and not yet staged: eights of L, and chunks of W with their scales. #}
{% macro loaded(chunks) %}
{% for set in range(2 if double else 1) %}
{% for i in range(left_each) %}
    var lo{{ set }}_{{ i }}: vec4<f32>;
    var hi{{ set }}_{{ i }}: vec4<f32>;
{% endfor %}
{% if chunks %}
{% for i in range(chunks_each) %}
    var codes{{ set }}_{{ i }}: vec4<u32>;
    var scale{{ set }}_{{ i }}: f32;
    var low{{ set }}_{{ i }}: f32;
{% endfor %}
{% endif %}
{% endfor %}
{% endmacro %}

{# Loads chunk `chunk` of row `n` of W. #}
{% macro load_chunk(set, i, n, chunk) %}
        codes{{ set }}_{{ i }} = codes_of({{ n }}, {{ chunk }});
        let block{{ i }} = block_of({{ n }}, 32u * {{ chunk }});
        scale{{ set }}_{{ i }} = scale_of(block{{ i }}) * p.m.factor;
{% if mins != "none" %}
        low{{ set }}_{{ i }} = min_of(block{{ i }}) * p.m.factor;
{% endif %}
{% endmacro %}

{# Decodes the word of a chunk that a thread stages as its `j`-th: `lo` and `hi`. #}
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
            let lo = decode_low(word) * scale{{ set }}_{{ i }}{{ " + low" ~ set ~ "_" ~ i if mins != "none" }};
            let hi = decode_high(word) * scale{{ set }}_{{ i }}{{ " + low" ~ set ~ "_" ~ i if mins != "none" }};
{% endmacro %}

{# Adds the product of what is staged. #}
{% macro multiply(buffer) %}
{{ multiply_tiles(edge, rows, columns,
    {"name": "left_tile" ~ buffer, "begin": "left_begin", "stride": stride, "along": true},
    {"name": "right_tile" ~ buffer, "begin": "right_begin", "stride": right_stride, "along": not natural}, unit=unit) }}
{% endmacro %}

{# Has `finish(row, column, sums_begin, lane)` take the results from `sums`, a strip of each subgroup at a time: where they begin in the
   result, and in `sums`. #}
{% macro finish_all() %}
    let sums_begin = subgroup * {{ 16 * strip // unit }}u;
{% for down in range(0, rows, 16) %}{% for right in range(0, columns, strip) %}
    workgroupBarrier();
{% for piece in range(0, strip, 16) %}
{{ store(edge, down, right + piece, "sums", "sums_begin + " ~ piece // unit ~ "u", strip, unit=unit) }}
{% endfor %}
    workgroupBarrier();
    finish(row_base + piece_row + {{ down }}u, column_base + piece_column + {{ right }}u, sums_begin, lane);
{% endfor %}{% endfor %}
{% endmacro %}

{# A thread has a quad of columns in every `row_step`-th row of a strip. #}
{% set quads_wide = strip // 4 %}
{% set row_step = lanes // quads_wide %}
{% set rows_each = 16 // row_step %}

{# Four results, from row `row` and quad `quad` of a strip on. #}
{% macro four(row, quad) -%}
{% set at = "sums_begin + (" ~ row ~ ") * " ~ strip // unit ~ "u + " ~ 4 // unit ~ "u * " ~ quad %}
{%- if double %}sums[{{ at }}]{% else %}vec4<f32>(sums[{{ at }}], sums[{{ at }} + 1u], sums[{{ at }} + 2u], sums[{{ at }} + 3u]){% endif %}
{%- endmacro %}

{# The stages of a product, where macros of the caller load and stage. `step`: what `start` is raised by for a stage. #}
{% macro stages(fetch, stage_all, end, step) %}
{{ fetch(0, "0u") }}
{% if double %}
{{ fetch(1, step ~ "u") }}
    workgroupBarrier();
{{ stage_all(0, 0, "0u") }}

    for (var start = 0u; start < {{ end }}; start = start + {{ 2 * step }}u) {
        workgroupBarrier();
{{ fetch(0, "start + " ~ 2 * step ~ "u") }}
{{ stage_all(1, 1, "start + " ~ step ~ "u") }}
{{ multiply(0) }}
        workgroupBarrier();
{{ fetch(1, "start + " ~ 3 * step ~ "u") }}
{{ stage_all(0, 0, "start + " ~ 2 * step ~ "u") }}
{{ multiply(1) }}
    }
{% else %}

    for (var start = 0u; start < {{ end }}; start = start + {{ step }}u) {
        workgroupBarrier();
{{ stage_all(0, 0, "start") }}
        workgroupBarrier();
{{ fetch(0, "start + " ~ step ~ "u") }}
{{ multiply(0) }}
    }
{% endif %}
{% endmacro %}
