// Sums and maxima over a team of threads; every thread of the team gets the result.
//
// With `subgroups` a team is a subgroup of any size. Without, it is `team` consecutive threads (a
// power of two) and the reduction is a tree in workgroup memory, so all threads of the workgroup
// must call it together. A team of one has nothing to reduce.
{% if not subgroups and team > 1 %}
var<workgroup> team_partial: array<f32, {{ threads }}>;
{% endif %}

{% macro reduction(name, subgroup_name, left, between, right) %}
fn {{ name }}(value: f32, lane: u32) -> f32 {
{% if subgroups %}
    return {{ subgroup_name }}(value);
{% elif team == 1 %}
    return value;
{% else %}
    workgroupBarrier();
    team_partial[lane] = value;
{% for step in [128, 64, 32, 16, 8, 4, 2, 1] if step < team %}
    workgroupBarrier();
    if ((lane & {{ team - 1 }}u) < {{ step }}u) {
        team_partial[lane] = {{ left }}team_partial[lane]{{ between }}team_partial[lane + {{ step }}u]{{ right }};
    }
{% endfor %}
    workgroupBarrier();
    return team_partial[lane & ~{{ team - 1 }}u];
{% endif %}
}
{% endmacro %}
{{ reduction("team_sum", "subgroupAdd", "", " + ", "") }}
{{ reduction("team_max", "subgroupMax", "max(", ", ", ")") }}
