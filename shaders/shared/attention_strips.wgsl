{# Products of strips, 16 of a subgroup's own rows by all of the other side's tile or of the head, for the attention kernels of
   cooperative matrices. #}
{% from "coop.wgsl" import depth, enter, accumulators, multiply, store, load_again %}
{# Padding spreads the banks. #}
{% set sum_stride = depth + 4 %}
{% set weight_stride = depth + 8 %}

{# Where this subgroup's rows begin. #}
{% macro begin() %}
    let sums_begin = subgroup * {{ 16 * sum_stride }}u;
    let weights_begin = subgroup * {{ 16 * weight_stride }}u;
{% endmacro %}

{# Where the rows of `head` and `kv_head` begin, and the values of a plane. #}
{% macro packed_rows(wide) %}
    let q_rows = padded(p.queries);
    let k_rows = padded(p.keys);
    let rows = Rows(
        head, head * q_rows, (p.heads + head) * q_rows, kv_head * k_rows, (p.kv_heads + kv_head) * k_rows,
    );
    let q_plane = p.heads * q_rows * {{ wide }}u;
    let k_plane = p.kv_heads * k_rows * {{ wide }}u;
{% endmacro %}

{# The workgroup's 64 queries, their head, the keys that they see, and where all that is packed; ends the workgroups past the
   last. #}
{% macro begin_queries(wide) %}
{{ enter() }}
    let block = group / p.heads;
    let head = group - block * p.heads;
    let kv_head = head / (p.heads / p.kv_heads);
    let row_base = block * 64u;
    // Ranges never go back from a query to the next: these are the keys of all the workgroup's queries.
    let start = key_ranges[row_base].x;
    let end = key_ranges[min(row_base + 63u, p.queries - 1u)].y;
{{ packed_rows(wide) }}
{% endmacro %}

{# sums = the sum of the products of `pairs`: each where the own rows and the other rows begin in `own` and `other`. #}
{% macro scores(edge, wide, own, other, pairs) %}
    {
{{ accumulators(edge, 16, depth, "score") }}
{% for left, right in pairs %}
{{ multiply(edge, 16, depth,
    {"name": own, "begin": left, "stride": wide, "along": true},
    {"name": other, "begin": right, "stride": wide, "along": true}, wide, "score") }}
{% endfor %}
{% for right in range(0, depth, 16) %}
{{ store(edge, 0, right, "sums", "sums_begin + " ~ right ~ "u", sum_stride, "score") }}
{% endfor %}
    }
{% endmacro %}

{# Q * K^T, both of two f16; the product of the smaller parts is below what f32 keeps. #}
{% macro split_scores(edge, wide, own, other, left, right, left_plane, right_plane) %}
{{ scores(edge, wide, own, other, [
    (left ~ " + " ~ left_plane, right),
    (left, right ~ " + " ~ right_plane),
    (left, right)]) }}
{% endmacro %}

{# Adds weights * the other side's rows, which begin at `begin`. #}
{% macro gather(edge, wide, other, begin, sum) %}
{{ multiply(edge, 16, wide,
    {"name": "weights", "begin": "weights_begin", "stride": weight_stride, "along": true},
    {"name": other, "begin": begin, "stride": wide, "along": false}, depth, sum) }}
{% endmacro %}

{# Has `function(right, ...)` look at results in `sums`, 16 of the head's values from `right` on at a time. `again`: it changes
   them. #}
{% macro in_memory(edge, wide, sum, function, arguments, again=false) %}
{% for right in range(0, wide, 16) %}
    workgroupBarrier();
{{ store(edge, 0, right, "sums", "sums_begin", sum_stride, sum) }}
    workgroupBarrier();
    {{ function }}({{ right }}u, {{ arguments }});
{% if again %}
    workgroupBarrier();
{{ load_again(edge, 0, right, "sums", "sums_begin", sum_stride, sum) }}
{% endif %}
{% endfor %}
{% endmacro %}
