{# Products by cooperative matrices of f16, `edge` x `edge`, summed in f32. A subgroup owns `rows`
   x `columns` results in accumulators `sumI_J` (or with another name). These can only be
   multiplied, added up and stored as a whole; work on single results happens in workgroup memory.

   All of a workgroup must come here together. Loads and stores don't check bounds: whole tiles are
   staged, or padded in their buffers. The arguments of a store are bound to names first, because
   naga's SPIR-V writer requires it. #}
{% import "shared/entry.wgsl" as entry %}

{# Values of the contracted index that are staged at a time. #}
{% set depth = 32 %}

{# The block is what a thread of a workgroup does. If there is no work, the host is asking for the
   size of subgroups: `out` is the last buffer, with elements of `type`. #}
{% macro each_group(threads, out, type="f32") %}
{% set body = caller %}
{% call entry.main(threads, ["subgroup", "subgroup_size", "lane"]) %}
    if (group >= p.groups) {
        if (p.groups == 0u && thread == 0u) {
            {{ out }}[0] = {{ type }}(f32(subgroup_size));
        }
        return;
    }
{{ body() }}
{% endcall %}
{% endmacro %}

{# The type of a matrix: `role` is A, B or C. #}
{% macro matrix(role) -%}
coop_mat{{ edge }}x{{ edge }}<{{ "f32" if role == "C" else "f16" }}, {{ role }}>
{%- endmacro %}

{% macro accumulators(rows, columns, sum="sum") %}
{% for i in range(rows // edge) %}
{% for j in range(columns // edge) %}
    var {{ sum }}{{ i }}_{{ j }} = {{ matrix("C") }}();
{% endfor %}
{% endfor %}
{% endmacro %}

{# Adds the product of `values` contracted values. `left` and `right` are tiles: the array's name,
   the name of the start of the subgroup's piece in it, their stride in values, whether the
   contracted index runs along memory, and the number of values per element of the array. #}
{% macro multiply(rows, columns, left, right, values=depth, sum="sum") %}
    for (var k = 0u; k < {{ values }}u; k = k + {{ edge }}u) {
{% for i in range(rows // edge) %}
        let a{{ i }} = {{ load("A", left, edge * i, left.along) }};
{% endfor %}
{% for j in range(columns // edge) %}
        let b{{ j }} = {{ load("B", right, edge * j, not right.along) }};
{% for i in range(rows // edge) %}
        {{ sum }}{{ i }}_{{ j }} = coopMultiplyAdd(a{{ i }}, b{{ j }}, {{ sum }}{{ i }}_{{ j }});
{% endfor %}
{% endfor %}
    }
{% endmacro %}

{# The matrix of a tile from row `at` and contracted value `k` on. coopLoadT reads rows of a matrix
   along memory, coopLoad columns. #}
{% macro load(role, tile, at, rows_along) -%}
{% set stride = tile.stride // tile.unit %}
coopLoad{{ "T" if rows_along }}<{{ matrix(role) }}>(&{{ tile.name }}[{{ tile.begin }} +
{%- if not tile.along %} {{ at // tile.unit }}u + k * {{ stride }}u
{%- elif tile.unit > 1 %} {{ at * stride }}u + k / {{ tile.unit }}u
{%- else %} {{ at * stride }}u + k
{%- endif %}], {{ stride }}u)
{%- endmacro %}

{# Stores 16 x 16 of a subgroup's results, from row `down` and column `right` on, into an array
   from element `begin + ahead` on. Elements have `unit` f32. #}
{% macro store(down, right, array, begin, stride, sum="sum", unit=1, ahead=0) %}
{% for i in range(16 // edge) %}
{% for j in range(16 // edge) %}
    {
        let at = {{ begin }} + {{ ahead + (edge * i * stride + edge * j) // unit }}u;
        let value = {{ sum }}{{ down // edge + i }}_{{ right // edge + j }};
        coopStoreT(value, &{{ array }}[at], {{ stride // unit }}u);
    }
{% endfor %}
{% endfor %}
{% endmacro %}

{# Loads 16 x 16 of a subgroup's results back from where `store` has put them. #}
{% macro load_again(down, right, array, begin, stride, sum="sum", unit=1) %}
{% for i in range(16 // edge) %}
{% for j in range(16 // edge) %}
    {
        let at = {{ begin }} + {{ (edge * i * stride + edge * j) // unit }}u;
        {{ sum }}{{ down // edge + i }}_{{ right // edge + j }} =
            coopLoadT<{{ matrix("C") }}>(&{{ array }}[at], {{ stride // unit }}u);
    }
{% endfor %}
{% endfor %}
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
