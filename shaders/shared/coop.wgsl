{# Products by cooperative matrices of f16, `edge` x `edge`, summed in f32. A subgroup owns `rows`
   x `columns` results in accumulators `sumI_J` (or with another name). These can only be
   multiplied, added up and stored as a whole; work on single results happens in workgroup memory.

   All of a workgroup must come here together. Loads and stores don't check bounds: whole tiles are
   staged, or padded in their buffers. The arguments of a store are bound to names first, because
   naga's SPIR-V writer requires it. #}
{# Values of the contracted index that are staged at a time. #}
{% set depth = 32 %}

{# `group_index` of groups.wgsl, inlined because naga doesn't treat function results as uniform. If
   there is no work, the host is asking for the size of subgroups: `out` is the last buffer, with
   elements of `type`. #}
{% macro enter(out, type="f32") %}
    let group = p.first_group + workgroup.y * count.x + workgroup.x;
    if (group >= p.groups) {
        if (p.groups == 0u && thread == 0u) {
            {{ out }}[0] = {{ type }}(f32(subgroup_size));
        }
        return;
    }
{% endmacro %}

{% macro accumulators(edge, rows, columns, sum="sum") %}
{% for i in range(rows // edge) %}{% for j in range(columns // edge) %}
    var {{ sum }}{{ i }}_{{ j }} = coop_mat{{ edge }}x{{ edge }}<f32, C>();
{% endfor %}{% endfor %}
{% endmacro %}

{# Adds the product of `values` contracted values. `left` and `right` are tiles: the array's name,
   the start of the subgroup's piece in it, their stride in values, whether the contracted index
   runs along memory, and the number of values per element of the array. #}
{% macro multiply(edge, rows, columns, left, right, values=depth, sum="sum") %}
        for (var k = 0u; k < {{ values }}u; k = k + {{ edge }}u) {
{% for i in range(rows // edge) %}
            let a{{ i }} = {{ load(edge, "A", left, edge * i, left.along) }}
{% endfor %}
{% for j in range(columns // edge) %}
            let b{{ j }} = {{ load(edge, "B", right, edge * j, not right.along) }}
{% for i in range(rows // edge) %}
            {{ sum }}{{ i }}_{{ j }} = coopMultiplyAdd(a{{ i }}, b{{ j }}, {{ sum }}{{ i }}_{{ j }});
{% endfor %}
{% endfor %}
        }
{% endmacro %}

{# coopLoadT reads rows of a matrix along memory, coopLoad columns. #}
{% macro load(edge, role, tile, at, rows_along) %}
{% set unit = tile.unit %}
{% set place = at * tile.stride // unit ~ "u + k" ~ (" / " ~ unit ~ "u" if unit > 1) if tile.along else at // unit ~ "u + k * " ~ tile.stride // unit ~ "u" %}
coopLoad{{ "T" if rows_along }}<coop_mat{{ edge }}x{{ edge }}<f16, {{ role }}>>(&{{ tile.name }}[{{ tile.begin }} + {{ place }}], {{ tile.stride // unit }}u);
{%- endmacro %}

{# Stores 16 x 16 of a subgroup's results, from row `down` and column `right` on, into an array
   whose elements have `unit` f32. #}
{% macro store(edge, down, right, array, begin, stride, sum="sum", unit=1) %}
{% for i in range(16 // edge) %}{% for j in range(16 // edge) %}
        {
            let at = {{ begin }} + {{ (edge * i * stride + edge * j) // unit }}u;
            let value = {{ sum }}{{ down // edge + i }}_{{ right // edge + j }};
            coopStoreT(value, &{{ array }}[at], {{ stride // unit }}u);
        }
{% endfor %}{% endfor %}
{% endmacro %}

{# Loads 16 x 16 of a subgroup's results back from where `store` has put them. #}
{% macro load_again(edge, down, right, array, begin, stride, sum="sum", unit=1) %}
{% for i in range(16 // edge) %}{% for j in range(16 // edge) %}
        {{ sum }}{{ down // edge + i }}_{{ right // edge + j }} = coopLoadT<coop_mat{{ edge }}x{{ edge }}<f32, C>>(&{{ array }}[{{ begin }} + {{ (edge * i * stride + edge * j) // unit }}u], {{ stride // unit }}u);
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
