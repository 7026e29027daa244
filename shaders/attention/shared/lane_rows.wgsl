{# Attention on software drivers: no workgroup memory, no barriers. A workgroup is one subgroup of
   eight and owns `rows` rows of one head. It goes over the other side eight rows at a time. For
   scores, each lane has one of the eight rows; for the results, each lane has one of eight values
   of a head. If all lanes need the same data, each loads an eighth and broadcasts it, because
   these drivers load lane by lane. #}
{% from "attention/shared/heads.wgsl" import query_block %}

{# Finds the workgroup's queries, their head, and the keys that they see; returns from workgroups
   past the last one. #}
{% macro begin_queries() %}
{{ query_block() }}
{% for r in range(rows) %}
    let query{{ r }} = min(block * {{ rows }}u + {{ r }}u, p.queries - 1u);
    let seen{{ r }} = key_ranges[query{{ r }}];
    let row{{ r }} = (query{{ r }} * p.heads + head) * {{ head_dim }}u;
{% endfor %}
    // Ranges don't move back from one query to the next, so these are the keys of all queries
    // here.
    let end = seen{{ rows - 1 }}.y;
{% endmacro %}

{# For each row r and the lane's own vector: resultR = sum over d of left[left_atR + d] *
   right[right_at + d]. #}
{% macro dots(result, left, left_at, right, right_at) %}
{% for r in range(rows) %}
        var {{ result }}{{ r }} = 0.0;
{% endfor %}
        for (var d = 0u; d < {{ head_dim }}u; d = d + 8u) {
            let lo = vec4<f32>({% for e in range(4) %}{{ right }}[{{ right_at }} + d + {{ e }}u]{{ ", " if not loop.last }}{% endfor %});
            let hi = vec4<f32>({% for e in range(4, 8) %}{{ right }}[{{ right_at }} + d + {{ e }}u]{{ ", " if not loop.last }}{% endfor %});
{% for r in range(rows) %}
            {
                let mine = {{ left }}[{{ left_at }}{{ r }} + d + lane];
                let lo_row = vec4<f32>({% for e in range(4) %}subgroupBroadcast(mine, {{ e }}u){{ ", " if not loop.last }}{% endfor %});
                let hi_row = vec4<f32>({% for e in range(4, 8) %}subgroupBroadcast(mine, {{ e }}u){{ ", " if not loop.last }}{% endfor %});
                {{ result }}{{ r }} = {{ result }}{{ r }} + (dot(lo_row, lo) + dot(hi_row, hi));
            }
{% endfor %}
        }
{% endmacro %}

{# Adds the eight vectors at `at0` to `at7`, multiplied by each lane's weight, to the sums of every
   row, one vector after another. #}
{% macro add_up(sum, weight, values, at) %}
{% for d in range(head_dim // 8) %}
        {
{% for i in range(8) %}
            let value{{ i }} = {{ values }}[{{ at }}{{ i }} + {{ 8 * d }}u + lane];
{% endfor %}
{% for r in range(rows) %}
            {{ sum }}{{ r }}_{{ d }} = {% for i in range(8) %}({% endfor %}{{ sum }}{{ r }}_{{ d }}{% for i in range(8) %} + subgroupBroadcast({{ weight }}{{ r }}, {{ i }}u) * value{{ i }}){% endfor %};
{% endfor %}
        }
{% endfor %}
{% endmacro %}

{# For every row, a zero for each eight values of a head. #}
{% macro zeros(sum) %}
{% for r in range(rows) %}{% for d in range(head_dim // 8) %}
    var {{ sum }}{{ r }}_{{ d }} = 0.0;
{% endfor %}{% endfor %}
{% endmacro %}

{# Places of the eight rows of the other side from `first` on. There are `count` rows of `heads`
   heads. #}
{% macro eight(at, first, count, heads, head) %}
{% for i in range(8) %}
        let {{ at }}{{ i }} = (min({{ first }} + {{ i }}u, {{ count }} - 1u) * {{ heads }} + {{ head }}) * {{ head_dim }}u;
{% endfor %}
{% endmacro %}
