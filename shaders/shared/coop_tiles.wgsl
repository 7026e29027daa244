{# Tiles of the two large products by cooperative matrices. A workgroup owns `side` x `side` results; each of its `subgroups` owns
   `rows` x `columns` of them, in accumulators `sumI_J`.

   Both operands are staged as f16, 32 values of the contracted index at a time, eight of a row at once. `vectors`: they lie in
   arrays of vec4, so that drivers know of wide loads and stores. Metal loads matrices from arrays of single values only.

   Tiles of L are [row][contracted]. Tiles of R are [column][contracted], or with `natural` [contracted][column]. #}
{% from "coop.wgsl" import depth %}
{% set rows = side // 2 %}
{% set columns = 2 * side // subgroups %}
{% set threads = subgroups * lanes %}
{# Rows are padded by 8 values, which spreads the banks. #}
{% set stride = depth + 8 %}
{% set right_stride = side + 8 if natural else stride %}
{# Results leave through memory in strips of 16 rows, as wide as there is room for. #}
{% set strip = 128 // subgroups %}
{% set sum_stride = strip + 4 %}
{% set left_size = side * stride %}
{% set right_size = (depth if natural else side) * right_stride %}
{# Values in an element of what they lie in. #}
{% set unit = 4 if vectors else 1 %}
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
{% set type = "vec4<f16>" if vectors else "f16" %}
var<workgroup> left_tile: array<{{ type }}, {{ left_size // unit }}>;
var<workgroup> right_tile: array<{{ type }}, {{ right_size // unit }}>;
// A strip of each subgroup's results.
var<workgroup> sums: array<{{ "vec4<f32>" if vectors else "f32" }}, {{ subgroups * 16 * sum_stride // unit }}>;
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
{% for i in range(rows // edge) %}{% for j in range(columns // edge) %}
    var sum{{ i }}_{{ j }} = coop_mat{{ edge }}x{{ edge }}<f32, C>();
{% endfor %}{% endfor %}
{% endmacro %}

{# Stages eight values, two vec4, from row `row` and eight `oct` of a tile on. #}
{% macro stage(which, row, oct, lo, hi) %}
{% set row_stride = stride if which == "left" else right_stride %}
            {
                let at = ({{ row }}) * {{ row_stride // unit }}u + {{ 8 // unit }}u * ({{ oct }});
{% if vectors %}
                {{ which }}_tile[at] = vec4<f16>({{ lo }});
                {{ which }}_tile[at + 1u] = vec4<f16>({{ hi }});
{% else %}
{% for e in range(8) %}
                {{ which }}_tile[at + {{ e }}u] = f16({{ lo if e < 4 else hi }}.{{ "xyzw"[e % 4] }});
{% endfor %}
{% endif %}
            }
{% endmacro %}

{# Adds the product of what is staged. coopLoadT reads rows of a matrix along memory, coopLoad columns. #}
{% macro multiply() %}
{% for k in range(0, depth, edge) %}
        {
{% for i in range(rows // edge) %}
            let a{{ i }} = coopLoadT<coop_mat{{ edge }}x{{ edge }}<f16, A>>(&left_tile[left_begin + {{ (edge * i * stride + k) // unit }}u], {{ stride // unit }}u);
{% endfor %}
{% for j in range(columns // edge) %}
            let b{{ j }} = coopLoad{{ "T" if natural }}<coop_mat{{ edge }}x{{ edge }}<f16, B>>(&right_tile[right_begin + {{ (k * right_stride + edge * j if natural else edge * j * stride + k) // unit }}u], {{ right_stride // unit }}u);
{% for i in range(rows // edge) %}
            sum{{ i }}_{{ j }} = coopMultiplyAdd(a{{ i }}, b{{ j }}, sum{{ i }}_{{ j }});
{% endfor %}
{% endfor %}
        }
{% endfor %}
{% endmacro %}

{# Has `finish(row, column, sums_begin, lane)` take the results from `sums`, a strip of each subgroup at a time: where they begin in the
   result, and in `sums`. #}
{% macro finish_all() %}
    let sums_begin = subgroup * {{ 16 * sum_stride // unit }}u;
{% for down in range(0, rows, 16) %}{% for right in range(0, columns, strip) %}
    workgroupBarrier();
{% for i in range(16 // edge) %}{% for j in range(strip // edge) %}
    {
        let value = sum{{ down // edge + i }}_{{ right // edge + j }};
        coopStoreT(value, &sums[sums_begin + {{ (edge * i * sum_stride + edge * j) // unit }}u], {{ sum_stride // unit }}u);
    }
{% endfor %}{% endfor %}
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
{% set at = "sums_begin + (" ~ row ~ ") * " ~ sum_stride // unit ~ "u + " ~ 4 // unit ~ "u * " ~ quad %}
{%- if vectors %}sums[{{ at }}]{% else %}vec4<f32>(sums[{{ at }}], sums[{{ at }} + 1u], sums[{{ at }} + 2u], sums[{{ at }} + 3u]){% endif %}
{%- endmacro %}
