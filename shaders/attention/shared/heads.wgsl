{# Finds the rows and the head that a workgroup of an attention kernel owns. Workgroups past the
   last one return here. #}
{% macro enter_group() %}
    let group = group_index(workgroup, count);
    if (group >= p.groups) {
        return;
    }
{% endmacro %}

{# A block of queries of one head. #}
{% macro query_block() %}
{{ enter_group() }}
    let block = group / p.heads;
    let head = group - block * p.heads;
    let kv_head = head / (p.heads / p.kv_heads);
{% endmacro %}

{# A block of keys, and the number of query heads that share them. #}
{% macro key_block() %}
{{ enter_group() }}
    let block = group / p.kv_heads;
    let kv_head = group - block * p.kv_heads;
    let heads = p.heads / p.kv_heads;
{% endmacro %}
