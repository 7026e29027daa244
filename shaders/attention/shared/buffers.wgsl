{# Buffers of the attention kernels, which have them in this order. `type` is f32 or vec4<f32>. #}
{% import "attention/shared/sides.wgsl" as sides %}

{% macro forward(type) %}
@group(0) @binding(0) var<storage, read> q: array<{{ type }}>;
@group(0) @binding(1) var<storage, read> k: array<{{ type }}>;
@group(0) @binding(2) var<storage, read> v: array<{{ type }}>;
{{ ranges(3, sides.queries) }}
@group(0) @binding(4) var<storage, read_write> o: array<{{ type }}>;
@group(0) @binding(5) var<storage, read_write> lse: array<f32>;
{% endmacro %}

{# What the gradients of a side's rows are computed from. #}
{% macro backward(type, side) %}
@group(0) @binding(0) var<storage, read> q: array<{{ type }}>;
@group(0) @binding(1) var<storage, read> k: array<{{ type }}>;
@group(0) @binding(2) var<storage, read> v: array<{{ type }}>;
@group(0) @binding(3) var<storage, read> d_o: array<{{ type }}>;
{{ stats(4) }}
{{ ranges(5, side) }}
{% endmacro %}

{% macro stats(binding) %}
// For each query and head: lse, delta.
@group(0) @binding({{ binding }}) var<storage, read> stats: array<vec2<f32>>;
{% endmacro %}

{# The range of the other side's rows that a row sees. #}
{% macro ranges(binding, side) %}
// For each {{ side.row }}: the first row of the other side that it sees, and the end.
@group(0) @binding({{ binding }}) var<storage, read> {{ side.ranges }}: array<vec2<u32>>;
{% endmacro %}
