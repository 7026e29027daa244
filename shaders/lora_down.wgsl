// H = X * A^T with dropout on X: [M, r] from X [M, K] and A [r, K]; both row-major f32.
{% if software %}
// For software drivers: lanes along the rank, {{ tokens }} rows of X an invocation, no workgroup memory. Their time is that
// of the loads.
{% else %}
// A workgroup owns {{ tokens }} rows of X by {{ ranks }} rows of A; its threads stride K, then the partial sums meet.
{% endif %}

struct Params {
    first_group: u32,
    groups: u32,
    k: u32,
    rows: u32,        // M
    rank: u32,
    rank_groups: u32, // workgroups along the rank
    seed_low: u32,    // of the dropout
    seed_high: u32,
    drop_below: u32,  // a value whose hash is under this is dropped
    keep_scale: f32,  // 1 / (1 - probability)
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> x: array<{{ "f32" if ragged else "vec4<f32>" }}>;
@group(0) @binding(1) var<storage, read> a: array<{{ "f32" if ragged else "vec4<f32>" }}>;
@group(0) @binding(2) var<storage, read_write> h: array<f32>;

{% include "groups.wgsl" %}
{% set operand = "x" %}
{% include "rows.wgsl" %}
{% if dropout %}
{% include "dropout.wgsl" %}
{% endif %}

{% set operand = "a" %}
{% include "rows.wgsl" %}

fn dropped_x4(row: u32, q: u32) -> vec4<f32> {
{% if dropout %}
    let i = row * p.k + 4u * q;
    return x4(row, q) * vec4<f32>(dropout_factor(i), dropout_factor(i + 1u), dropout_factor(i + 2u), dropout_factor(i + 3u));
{% else %}
    return x4(row, q);
{% endif %}
}

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
    var h{{ t }} = 0.0;
{% endfor %}
    for (var q = 0u; q < quads; q = q + 1u) {
        let a0 = a4(j0, q);
{% for t in range(tokens) %}
        h{{ t }} = h{{ t }} + dot(dropped_x4(row{{ t }}, q), a0);
{% endfor %}
    }
    if (j < p.rank) {
{% for t in range(tokens) %}
        if (row_base + {{ t }}u < p.rows) { h[row{{ t }} * p.rank + j] = h{{ t }}; }
{% endfor %}
    }
{% else %}
    let j0 = (group - row_group * p.rank_groups) * {{ ranks }}u;
{% for j in range(ranks) %}
    let rank{{ j }} = min(j0 + {{ j }}u, p.rank - 1u);
{% endfor %}
{% for t in range(tokens) %}{% for j in range(ranks) %}
    var h{{ t }}_{{ j }} = 0.0;
{% endfor %}{% endfor %}
    for (var q = thread; q < quads; q = q + {{ threads }}u) {
{% for j in range(ranks) %}
        let a{{ j }} = a4(rank{{ j }}, q);
{% endfor %}
{% for t in range(tokens) %}
        {
            let values = dropped_x4(row{{ t }}, q);
{% for j in range(ranks) %}
            h{{ t }}_{{ j }} = h{{ t }}_{{ j }} + dot(values, a{{ j }});
{% endfor %}
        }
{% endfor %}
    }
{% for t in range(tokens) %}{% for j in range(ranks) %}
{% set at = (t * ranks + j) * teams_max %}
{% if subgroups %}
    let sum{{ t }}_{{ j }} = subgroupAdd(h{{ t }}_{{ j }});
    if (lane == 0u) { partial[{{ at }}u + team_id] = sum{{ t }}_{{ j }}; }
{% else %}
    partial[{{ at }}u + thread] = h{{ t }}_{{ j }};
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
        h[row * p.rank + j] = sum;
    }
{% endif %}
}
