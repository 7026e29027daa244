{# Kernels with a team of threads per row: a subgroup of any size, with `subgroups`; or `team`
   consecutive threads, a power of two; or one thread on software drivers. #}
{% import "shared/entry.wgsl" as entry %}

{# The block is the body of `one_row`, which all threads of a workgroup call together. It stores
   only if `mine`. `Params` holds `rows`. #}
{% macro each_row() %}
struct Team {
    lane: u32,   // of this thread in its team
    size: u32,   // threads
    thread: u32, // of this thread in the workgroup, for `team_sum` and `team_max`
}

{% if not subgroups and team > 1 %}
var<workgroup> team_partial: array<f32, {{ threads }}>;

{% endif %}
{% call(a, b) reduction("team_sum", "subgroupAdd") %}{{ a }} + {{ b }}{% endcall %}

{% call(a, b) reduction("team_max", "subgroupMax") %}max({{ a }}, {{ b }}){% endcall %}

fn one_row(row: u32, team: Team, mine: bool) {
{{ caller() }}
}

{% set also = ["subgroup", "subgroups", "subgroup_size", "lane"] if subgroups else [] %}
{% call entry.each_group(threads, also) %}
{% if not subgroups %}
    let subgroup = thread / {{ team }}u;
    let subgroups = {{ threads // team }}u;
    let subgroup_size = {{ team }}u;
    let lane = thread % {{ team }}u;
{% endif %}
    // A workgroup handles {{ group_rows }} rows, whatever the size of its subgroups.
    for (var i = 0u; i < {{ group_rows }}u; i = i + subgroups) {
        // Teams past the last row repeat it and do not store.
        let wanted = group * {{ group_rows }}u + i + subgroup;
        let mine = i + subgroup < {{ group_rows }}u && wanted < p.rows;
        one_row(min(wanted, p.rows - 1u), Team(lane, subgroup_size, thread), mine);
    }
{% endcall %}
{% endmacro %}

{# A reduction over a team, whose result every thread of the team gets. Without subgroups it is a
   tree in workgroup memory, so all threads of the workgroup must call it together. The block
   combines two values. #}
{% macro reduction(name, subgroup_name) %}
fn {{ name }}(value: f32, thread: u32) -> f32 {
{% if subgroups %}
    return {{ subgroup_name }}(value);
{% elif team == 1 %}
    return value;
{% else %}
    workgroupBarrier();
    team_partial[thread] = value;
{% for step in [128, 64, 32, 16, 8, 4, 2, 1] if step < team %}
    workgroupBarrier();
    if ((thread & {{ team - 1 }}u) < {{ step }}u) {
        let own = team_partial[thread];
        let other = team_partial[thread + {{ step }}u];
        team_partial[thread] = {{ caller("own", "other") }};
    }
{% endfor %}
    workgroupBarrier();
    return team_partial[thread & ~{{ team - 1 }}u];
{% endif %}
}
{% endmacro %}
