{# Which rows of which head a workgroup of an attention kernel owns. Workgroups past the last end here. #}
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

{# A block of keys, and how many heads of queries share them. #}
{% macro key_block() %}
{{ enter_group() }}
    let block = group / p.kv_heads;
    let kv_head = group - block * p.kv_heads;
    let heads = p.heads / p.kv_heads;
{% endmacro %}
