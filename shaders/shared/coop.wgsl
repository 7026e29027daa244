{# Products by cooperative matrices of f16, `edge` x `edge`, that add up in f32. A subgroup owns `rows` x `columns` results in
   accumulators `sumI_J` (or of another name), which can be multiplied, added up and stored whole, and nothing else: what is to
   be done to single results is done in workgroup memory.

   All of a workgroup must come here together, and loads and stores do not look at bounds: whole tiles are staged, or padded
   in their buffers.
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

{% macro accumulators(edge, rows, columns, sum="sum") %}
{% for i in range(rows // edge) %}{% for j in range(columns // edge) %}
    var {{ sum }}{{ i }}_{{ j }} = coop_mat{{ edge }}x{{ edge }}<f32, C>();
{% endfor %}{% endfor %}
{% endmacro %}

{# Adds the product of `values` of the contracted index. `left` and `right` are tiles: the array's name, where the subgroup's
   piece begins, their stride, and whether the contracted index runs along memory. #}
{% macro multiply(edge, rows, columns, left, right, values=depth, sum="sum") %}
        for (var k = 0u; k < {{ values }}u; k = k + {{ edge }}u) {
{% for i in range(rows // edge) %}
            let a{{ i }} = {{ load(edge, "A", left, edge * i, left.along) }}
{% endfor %}
{% for j in range(columns // edge) %}
            let b{{ j }} = {{ load(edge, "B", right, edge * j, not right.along) }}
{% endfor %}
{% for i in range(rows // edge) %}{% for j in range(columns // edge) %}
            {{ sum }}{{ i }}_{{ j }} = coopMultiplyAdd(a{{ i }}, b{{ j }}, {{ sum }}{{ i }}_{{ j }});
{% endfor %}{% endfor %}
        }
{% endmacro %}

{# coopLoadT reads rows of a matrix along memory, coopLoad columns. #}
{% macro load(edge, role, tile, at, rows_along) %}
coopLoad{{ "T" if rows_along }}<coop_mat{{ edge }}x{{ edge }}<f16, {{ role }}>>(&{{ tile.name }}[{{ tile.begin }} + {{ at ~ "u * " ~ tile.stride ~ "u + k" if tile.along else at ~ "u + k * " ~ tile.stride ~ "u" }}], {{ tile.stride }}u);
{%- endmacro %}

{# Tiles of 64 x 64 results by four subgroups of 32 x 32. Where the workgroup's tile begins, and which piece of it is this
   subgroup's. #}
{% macro begin_tile() %}
    let row_group = group / p.column_groups;
    let column_base = (group - row_group * p.column_groups) * 64u;
    let row_base = row_group * 64u;
    let half_row = subgroup / 2u;
    let half_column = subgroup % 2u;
{% endmacro %}

{# Stages `weights`, eight of W, at `at` of `w_tile`. #}
{% macro stage_weights() %}
{% for e in range(8) %}
            w_tile[at + {{ e }}u] = f16(weights.{{ "lo" if e < 4 else "hi" }}.{{ "xyzw"[e % 4] }} * p.m.factor);
{% endfor %}
{% endmacro %}

{# Of `sums`, an array of f32 with a quarter of the tile, 16 x 16 of each subgroup's: with the operands' tiles under the 16 KiB that
   every device has. Padding spreads the banks. #}
{% set sum_stride = 32 + 4 %}

{# After `begin_tile`: has `finish(row_first, column_first, thread)` take the results from `sums`, in both directions 16 from the first on and 16 that are
   32 further on. #}
{% macro finish_tile(edge) %}
{% for down in [0, 16] %}{% for right in [0, 16] %}
    workgroupBarrier();
    {
        let begin = half_row * {{ 16 * sum_stride }}u + half_column * 16u;
{{ store(edge, down, right, "sums", "begin", sum_stride) }}
    }
    workgroupBarrier();
    finish(row_base + {{ down }}u, column_base + {{ right }}u, thread);
{% endfor %}{% endfor %}
{% endmacro %}

{# Stores 16 x 16 of a subgroup's results, from row `down` and column `right` on, into an array of f32. #}
{% macro store(edge, down, right, array, begin, stride, sum="sum") %}
{% for i in range(16 // edge) %}{% for j in range(16 // edge) %}
        {
            let at = {{ begin }} + {{ edge * i * stride + edge * j }}u;
            let value = {{ sum }}{{ down // edge + i }}_{{ right // edge + j }};
            coopStoreT(value, &{{ array }}[at], {{ stride }}u);
        }
{% endfor %}{% endfor %}
{% endmacro %}

{# Loads 16 x 16 of a subgroup's results again, from where `store` has put them. #}
{% macro load_again(edge, down, right, array, begin, stride, sum="sum") %}
{% for i in range(16 // edge) %}{% for j in range(16 // edge) %}
        {{ sum }}{{ down // edge + i }}_{{ right // edge + j }} = coopLoadT<coop_mat{{ edge }}x{{ edge }}<f32, C>>(&{{ array }}[{{ begin }} + {{ edge * i * stride + edge * j }}u], {{ stride }}u);
{% endfor %}{% endfor %}
{% endmacro %}

{# `least_of(value, subgroup)`: the smallest of the workgroup's values. #}
{% macro least() %}
var<workgroup> least: array<f32, 4>; // of each subgroup

fn least_of(value: f32, subgroup: u32) -> f32 {
    workgroupBarrier();
    least[subgroup] = subgroupMin(value);
    workgroupBarrier();
    return min(min(least[0], least[1]), min(least[2], least[3]));
}
{% endmacro %}
