// A product with few columns, {{ result }} [M, r] = {{ scale }}LEFT [M, K] * RIGHT [K, r], of functions that the kernel has:
//   left4(row, q)  LEFT[row, 4q .. 4q + 4]; zero past K
//   right4(j, q)   RIGHT[4q .. 4q + 4, j]; finite past K
{% if software %}
// For software drivers: lanes along r, {{ tokens }} rows of LEFT an invocation, no workgroup memory. Their time is that of
// the loads.
{% else %}
// A workgroup owns {{ tokens }} rows by {{ ranks }} columns of the result; its threads stride K, then the partial sums meet.
{% endif %}

{% if not software %}
// One partial sum a team (a subgroup of four threads at least, or a thread) for each of the {{ tokens * ranks }} results.
{% set teams_max = threads // 4 if subgroups else threads %}
var<workgroup> partial: array<f32, {{ tokens * ranks * teams_max }}>;
{% endif %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
{% if subgroups %}
    @builtin(subgroup_id) team_id: u32,
    @builtin(num_subgroups) teams: u32,
    @builtin(subgroup_invocation_id) lane: u32,
{% endif %}
) {
    let group = group_index(workgroup, count);
    if (group >= p.groups) {
        return;
    }
    let row_group = group / p.rank_groups;
    let row_base = row_group * {{ tokens }}u;
    let quads = (p.k + 3u) >> 2u;
{% for t in range(tokens) %}
    let row{{ t }} = min(row_base + {{ t }}u, p.rows - 1u);
{% endfor %}

{% if software %}
    let j = (group - row_group * p.rank_groups) * {{ threads }}u + thread;
    let j0 = min(j, p.rank - 1u);
{% for t in range(tokens) %}
    var sum{{ t }} = 0.0;
{% endfor %}
    for (var q = 0u; q < quads; q = q + 1u) {
        let right = right4(j0, q);
{% for t in range(tokens) %}
        sum{{ t }} = sum{{ t }} + dot(left4(row{{ t }}, q), right);
{% endfor %}
    }
    if (j < p.rank) {
{% for t in range(tokens) %}
        if (row_base + {{ t }}u < p.rows) { {{ result }}[row{{ t }} * p.rank + j] = {{ scale }}sum{{ t }}; }
{% endfor %}
    }
{% else %}
    let j0 = (group - row_group * p.rank_groups) * {{ ranks }}u;
{% for j in range(ranks) %}
    let rank{{ j }} = min(j0 + {{ j }}u, p.rank - 1u);
{% endfor %}
{% for t in range(tokens) %}{% for j in range(ranks) %}
    var sum{{ t }}_{{ j }} = 0.0;
{% endfor %}{% endfor %}
    for (var q = thread; q < quads; q = q + {{ threads }}u) {
{% for j in range(ranks) %}
        let right{{ j }} = right4(rank{{ j }}, q);
{% endfor %}
{% for t in range(tokens) %}
        {
            let values = left4(row{{ t }}, q);
{% for j in range(ranks) %}
            sum{{ t }}_{{ j }} = sum{{ t }}_{{ j }} + dot(values, right{{ j }});
{% endfor %}
        }
{% endfor %}
    }
{% for t in range(tokens) %}{% for j in range(ranks) %}
{% set at = (t * ranks + j) * teams_max %}
{% if subgroups %}
    let team{{ t }}_{{ j }} = subgroupAdd(sum{{ t }}_{{ j }});
    if (lane == 0u) { partial[{{ at }}u + team_id] = team{{ t }}_{{ j }}; }
{% else %}
    partial[{{ at }}u + thread] = sum{{ t }}_{{ j }};
{% endif %}
{% endfor %}{% endfor %}
    workgroupBarrier();
    let row = row_base + thread / {{ ranks }}u;
    let j = j0 + thread % {{ ranks }}u;
    if (thread < {{ tokens * ranks }}u && row < p.rows && j < p.rank) {
        var sum = 0.0;
        for (var team = 0u; team < {{ "teams" if subgroups else threads ~ "u" }}; team = team + 1u) {
            sum = sum + partial[thread * {{ teams_max }}u + team];
        }
        {{ result }}[row * p.rank + j] = {{ scale }}sum;
    }
{% endif %}
}
