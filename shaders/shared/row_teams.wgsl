// A team of threads per row: a subgroup, `team` threads, or one thread on software drivers. All
// threads of a workgroup call the including shader's `one_row(row, team, mine)` together; it
// stores only if `mine`. Include after `Params`.
{% include "shared/groups.wgsl" %}
{% include "shared/reduce.wgsl" %}

struct Team {
    lane: u32,   // of this thread in its team
    size: u32,   // threads
    thread: u32, // of this thread in the workgroup, for `team_sum` and `team_max`
}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
{% if subgroups %}
    @builtin(subgroup_id) team_id: u32,
    @builtin(num_subgroups) teams: u32,
    @builtin(subgroup_size) team_size: u32,
    @builtin(subgroup_invocation_id) lane: u32,
{% endif %}
) {
{% if not subgroups %}
    let team_id = thread / {{ team }}u;
    let teams = {{ threads // team }}u;
    let team_size = {{ team }}u;
    let lane = thread % {{ team }}u;
{% endif %}
    let group = group_index(workgroup, count);
    if (group >= p.groups) {
        return;
    }
    // A workgroup handles {{ group_rows }} rows, whatever the size of its subgroups.
    for (var i = 0u; i < {{ group_rows }}u; i = i + teams) {
        // Teams past the last row repeat it and do not store.
        let wanted = group * {{ group_rows }}u + i + team_id;
        let mine = i + team_id < {{ group_rows }}u && wanted < p.rows;
        one_row(min(wanted, p.rows - 1u), Team(lane, team_size, thread), mine);
    }
}
