{# Products by cooperative matrices of f16, `edge` x `edge`, that add up in f32. A subgroup owns `rows` x `columns` results in
   accumulators `sumI_J`, which can be multiplied, added up and stored whole, and nothing else: what is to be done to single
   results is done in workgroup memory.

   All of a workgroup must come here together, and loads and stores do not look at bounds: whole tiles are staged.
   Arguments of a store are bound to names first, which naga's SPIR-V writer wants. #}
{# Values of the contracted index that are staged at a time. #}
{% set depth = 32 %}

{# `group_index` of groups.wgsl, spelled out: naga takes no result of a function for uniform. #}
{% macro enter() %}
    let group = p.first_group + workgroup.y * count.x + workgroup.x;
    if (group >= p.groups) {
        return;
    }
{% endmacro %}

{% macro accumulators(edge, rows, columns) %}
{% for i in range(rows // edge) %}{% for j in range(columns // edge) %}
    var sum{{ i }}_{{ j }} = coop_mat{{ edge }}x{{ edge }}<f32, C>();
{% endfor %}{% endfor %}
{% endmacro %}

{# Adds the product of what is staged. `left` and `right` are tiles: their name, where the subgroup's piece begins, their
   stride, and whether the contracted index runs along memory. #}
{% macro multiply(edge, rows, columns, left, right) %}
        for (var k = 0u; k < {{ depth }}u; k = k + {{ edge }}u) {
{% for i in range(rows // edge) %}
            let a{{ i }} = {{ load(edge, "A", left, edge * i, left.along) }}
{% endfor %}
{% for j in range(columns // edge) %}
            let b{{ j }} = {{ load(edge, "B", right, edge * j, not right.along) }}
{% endfor %}
{% for i in range(rows // edge) %}{% for j in range(columns // edge) %}
            sum{{ i }}_{{ j }} = coopMultiplyAdd(a{{ i }}, b{{ j }}, sum{{ i }}_{{ j }});
{% endfor %}{% endfor %}
        }
{% endmacro %}

{# coopLoadT reads rows of a matrix along memory, coopLoad columns. #}
{% macro load(edge, role, tile, at, rows_along) %}
coopLoad{{ "T" if rows_along }}<coop_mat{{ edge }}x{{ edge }}<f16, {{ role }}>>(&{{ tile.name }}[{{ tile.begin }} + {{ at ~ "u * " ~ tile.stride ~ "u + k" if tile.along else at ~ "u + k * " ~ tile.stride ~ "u" }}], {{ tile.stride }}u);
{%- endmacro %}

{# Tiles of 64 x 64 results by four subgroups of 32 x 32. #}
{# Of `sums`, an array of f32 with half of the tile's rows: 16 of each subgroup's. Padding spreads the banks. #}
{% set sum_stride = 64 + 4 %}

{# Has `finish(first, column_base, thread)` take the results from `sums`: rows `first` to `first + 15` of the whole result, then 16
   that are 32 further on. #}
{% macro finish_tile(edge) %}
{% for half in range(2) %}
    workgroupBarrier();
    {
        let begin = half_row * {{ 16 * sum_stride }}u + half_column * 32u;
{{ store(edge, 32, 16 * half, 16 * half + 16, "sums", "begin", sum_stride) }}
    }
    workgroupBarrier();
    finish(row_base + {{ 16 * half }}u, column_base, thread);
{% endfor %}
{% endmacro %}

{# Stores the rows of accumulators from `first` to `end` into an array of f32, from `begin` on. #}
{% macro store(edge, columns, first, end, array, begin, stride) %}
{% for i in range(first // edge, end // edge) %}{% for j in range(columns // edge) %}
        {
            let at = {{ begin }} + {{ (edge * i - first) * stride + edge * j }}u;
            let value = sum{{ i }}_{{ j }};
            coopStoreT(value, &{{ array }}[at], {{ stride }}u);
        }
{% endfor %}{% endfor %}
{% endmacro %}
