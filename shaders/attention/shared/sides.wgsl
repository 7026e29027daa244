{# The two sides of attention, queries and keys: the name of a row, the number of rows, their heads,
   the head, and the array with the range of the other side's rows that a row sees. A range's ends
   don't move back from one row to the next. #}
{% import "shared/entry.wgsl" as entry %}
{% set queries = {
    "row": "query", "count": "p.queries", "heads": "p.heads", "head": "head",
    "ranges": "key_ranges",
} %}
{% set keys = {
    "row": "key", "count": "p.keys", "heads": "p.kv_heads", "head": "kv_head",
    "ranges": "query_ranges",
} %}

{# What a workgroup owns: block `block` of a side's rows, of one head. Keys come with the number of
   query heads that share them. #}
{% macro own_block(side) %}
{% if side == queries %}
    let block = group / p.heads;
    let head = group - block * p.heads;
    let kv_head = head / (p.heads / p.kv_heads);
{% else %}
    let block = group / p.kv_heads;
    let kv_head = group - block * p.kv_heads;
    let heads = p.heads / p.kv_heads;
{% endif %}
{% endmacro %}

{# The block is what a thread of a workgroup does. #}
{% macro each_block(side, threads, also=[]) %}
{% set body = caller %}
{% call entry.each_group(threads, also) %}
{{ own_block(side) }}
{{ body() }}
{% endcall %}
{% endmacro %}
