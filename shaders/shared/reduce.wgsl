// Sums over a team of threads; every thread of the team gets the sum.
//
// With `subgroups` a team is a subgroup, whatever its size. Without, it is `team` consecutive threads (a power of
// two) and the sum is a tree in workgroup memory, so all threads of the workgroup must call together.
{% if subgroups %}
fn team_sum(value: f32, lane: u32) -> f32 {
    return subgroupAdd(value);
}
{% else %}
var<workgroup> team_partial: array<f32, {{ threads }}>;

fn team_sum(value: f32, lane: u32) -> f32 {
    workgroupBarrier();
    team_partial[lane] = value;
{% for step in [64, 32, 16, 8, 4, 2, 1] if step < team %}
    workgroupBarrier();
    if ((lane & {{ team - 1 }}u) < {{ step }}u) {
        team_partial[lane] = team_partial[lane] + team_partial[lane + {{ step }}u];
    }
{% endfor %}
    workgroupBarrier();
    return team_partial[lane & ~{{ team - 1 }}u];
}
{% endif %}
