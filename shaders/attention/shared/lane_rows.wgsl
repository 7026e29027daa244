{# Attention on software drivers with subgroups of eight: no workgroup memory, no barriers. A
   workgroup is one subgroup and owns `rows` rows (queries or keys) of one head. It goes over the
   other side eight rows at a time. For scores, each lane has one of the eight rows; for the
   results, each lane has one of eight values of a head. If all lanes need the same data, each
   loads an eighth and broadcasts it, because these drivers load lane by lane. #}
{% import "attention/shared/sides.wgsl" as sides %}

{# The block is what a lane does: own row R is query or key `queryR` or `keyR`, its values begin at
   `rowR`, and it sees the other side's rows in the range `seenR`. No row sees any from `end` on. #}
{% macro each_row(side) %}
{% set body = caller %}
{% call sides.each_block(side, 8, ["lane"]) %}
{% for r in range(rows) %}
    let {{ side.row }}{{ r }} = min(block * {{ rows }}u + {{ r }}u, {{ side.count }} - 1u);
    let seen{{ r }} = {{ side.ranges }}[{{ side.row }}{{ r }}];
    let row{{ r }} = ({{ side.row }}{{ r }} * {{ side.heads }} + {{ side.head }}) * {{ head_dim }}u;
{% endfor %}
    let end = seen{{ rows - 1 }}.y;
{{ body() }}
{% endcall %}
{% endmacro %}

{# `visibleR`: whether own row R sees the lane's row of the other side. #}
{% macro visible(side) %}
{% for r in range(rows) %}
        let visible{{ r }} = {{ side.row }} >= seen{{ r }}.x && {{ side.row }} < seen{{ r }}.y;
{% endfor %}
{% endmacro %}

{# For each row r and the lane's own vector: resultR = sum over d of left[rowR + d] *
   right[own + d]. #}
{% macro dots(result, left, right) %}
{% for r in range(rows) %}
        var {{ result }}{{ r }} = 0.0;
{% endfor %}
        for (var d = 0u; d < {{ head_dim }}u; d = d + 8u) {
            let at = own + d;
{% for name, first in [("lo", 0), ("hi", 4)] %}
            let {{ name }} = vec4<f32>(
{% for e in range(first, first + 4) %}
                {{ right }}[at + {{ e }}u],
{% endfor %}
            );
{% endfor %}
{% for r in range(rows) %}
            {
                let mine = {{ left }}[row{{ r }} + d + lane];
{% for name, first in [("lo_row", 0), ("hi_row", 4)] %}
                let {{ name }} = vec4<f32>(
{% for e in range(first, first + 4) %}
                    subgroupBroadcast(mine, {{ e }}u),
{% endfor %}
                );
{% endfor %}
                {{ result }}{{ r }} = {{ result }}{{ r }} + (dot(lo_row, lo) + dot(hi_row, hi));
            }
{% endfor %}
        }
{% endmacro %}

{# Adds the eight vectors at `at0` to `at7`, multiplied by each lane's weight, to the sums of every
   row, one vector after another. #}
{% macro add_up(sum, weight, values) %}
{% for d in range(head_dim // 8) %}
        {
{% for i in range(8) %}
            let value{{ i }} = {{ values }}[at{{ i }} + {{ 8 * d }}u + lane];
{% endfor %}
{% for r in range(rows) %}
            var sum{{ r }} = {{ sum }}{{ r }}_{{ d }};
{% for i in range(8) %}
            sum{{ r }} =
                sum{{ r }} + subgroupBroadcast({{ weight }}{{ r }}, {{ i }}u) * value{{ i }};
{% endfor %}
            {{ sum }}{{ r }}_{{ d }} = sum{{ r }};
{% endfor %}
        }
{% endfor %}
{% endmacro %}

{# For every row, a zero for each eight values of a head. #}
{% macro zeros(sum) %}
{% for r in range(rows) %}
{% for d in range(head_dim // 8) %}
    var {{ sum }}{{ r }}_{{ d }} = 0.0;
{% endfor %}
{% endfor %}
{% endmacro %}

{# Places `at0` to `at7` of the eight rows of a side from `first` on. #}
{% macro eight(side) %}
{% for i in range(8) %}
        let other{{ i }} = min(first + {{ i }}u, {{ side.count }} - 1u);
        let at{{ i }} = (other{{ i }} * {{ side.heads }} + {{ side.head }}) * {{ head_dim }}u;
{% endfor %}
{% endmacro %}
