// A product with few columns, RESULT [M, r] = {{ scale }}LEFT [M, K] * RIGHT [K, r], with
// {{ parts }} RIGHT at a time. It uses functions of the kernel:
{% if share %}
//   left1(row, k)    LEFT[row, k]
{% else %}
//   left4(row, q)    LEFT[row, 4q .. 4q + 4]; zero past K
{% endif %}
//   right4_I(j, q)   RIGHT I[4q .. 4q + 4, j]; finite past K
//   mask_I(row, k)   with dropout: what LEFT[row, k] is multiplied by before it meets RIGHT I
{% if software %}
// For software drivers: lanes along r, {{ tokens }} rows of LEFT per invocation, no workgroup
// memory. Loads dominate the
// time{{ ": each of eight lanes loads one value of eight, and broadcasts hand them round" if share }}.
{% else %}
// A workgroup owns {{ tokens }} rows by {{ ranks }} columns of the result. Its threads stride K,
// then the partial sums are added up.
{% endif %}

{% if not software %}
// One partial sum per team (a subgroup of at least four threads, or a thread) for each of the
// {{ tokens * ranks }} results.
{% set teams_max = threads // 4 if subgroups else threads %}
var<workgroup> partial: array<f32, {{ tokens * ranks * teams_max }}>;
{% endif %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
{% if share %}
    @builtin(subgroup_invocation_id) sharer: u32,
{% endif %}
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
{% if not share %}
    let quads = (p.k + 3u) >> 2u;
{% endif %}
{% for t in range(tokens) %}
    let row{{ t }} = min(row_base + {{ t }}u, p.rows - 1u);
{% endfor %}

{% macro masked(values, part, t) %}
{{ values }}{% if dropout %} * vec4<f32>({% for e in range(4) %}mask_{{ part }}(row{{ t }}, 4u * q + {{ e }}u){{ ", " if not loop.last }}{% endfor %}){% endif %}
{%- endmacro %}
{% if software %}
    let j = (group - row_group * p.rank_groups) * {{ threads }}u + thread;
    let j0 = min(j, p.rank - 1u);
{% for t in range(tokens) %}{% for i in range(parts) %}
    var sum{{ t }}_{{ i }} = 0.0;
{% endfor %}{% endfor %}
{% if share %}
    for (var k = 0u; k < p.k; k = k + 8u) {
{% for i in range(parts) %}
        let lo{{ i }} = right4_{{ i }}(j0, k >> 2u);
        let hi{{ i }} = right4_{{ i }}(j0, (k >> 2u) + 1u);
{% endfor %}
{% for t in range(tokens) %}
        {
            let mine = left1(row{{ t }}, k + sharer);
{% for i in range(parts) %}
            let value{{ i }} = mine{{ " * mask_" ~ i ~ "(row" ~ t ~ ", k + sharer)" if dropout }};
            sum{{ t }}_{{ i }} = {% for half in ["hi", "lo"] %}{% for e in "wzyx" %}fma(subgroupBroadcast(value{{ i }}, {{ (4 if half == "hi" else 0) + 3 - loop.index0 }}u), {{ half }}{{ i }}.{{ e }}, {% endfor %}{% endfor %}sum{{ t }}_{{ i }}{% for e in range(8) %}){% endfor %};
{% endfor %}
        }
{% endfor %}
    }
{% else %}
    for (var q = 0u; q < quads; q = q + 1u) {
{% for i in range(parts) %}
        let right{{ i }} = right4_{{ i }}(j0, q);
{% endfor %}
{% for t in range(tokens) %}
        {
            let values = left4(row{{ t }}, q);
{% for i in range(parts) %}
            sum{{ t }}_{{ i }} = sum{{ t }}_{{ i }} + dot({{ masked("values", i, t) }}, right{{ i }});
{% endfor %}
        }
{% endfor %}
    }
{% endif %}
    if (j < p.rank) {
{% for t in range(tokens) %}
        if (row_base + {{ t }}u < p.rows) {
{% for i in range(parts) %}
            {{ results[i] }}[row{{ t }} * p.rank + j] = {{ scale }}sum{{ t }}_{{ i }};
{% endfor %}
        }
{% endfor %}
    }
{% else %}
    let j0 = (group - row_group * p.rank_groups) * {{ ranks }}u;
{% for j in range(ranks) %}
    let rank{{ j }} = min(j0 + {{ j }}u, p.rank - 1u);
{% endfor %}
{% for t in range(tokens) %}{% for j in range(ranks) %}{% for i in range(parts) %}
    var sum{{ t }}_{{ j }}_{{ i }} = 0.0;
{% endfor %}{% endfor %}{% endfor %}
    for (var q = thread; q < quads; q = q + {{ threads }}u) {
{% for j in range(ranks) %}{% for i in range(parts) %}
        let right{{ j }}_{{ i }} = right4_{{ i }}(rank{{ j }}, q);
{% endfor %}{% endfor %}
{% for t in range(tokens) %}
        {
            let values = left4(row{{ t }}, q);
{% for i in range(parts) %}
            let values{{ i }} = {{ masked("values", i, t) }};
{% for j in range(ranks) %}
            sum{{ t }}_{{ j }}_{{ i }} = sum{{ t }}_{{ j }}_{{ i }} + dot(values{{ i }}, right{{ j }}_{{ i }});
{% endfor %}
{% endfor %}
        }
{% endfor %}
    }
    let row = row_base + thread / {{ ranks }}u;
    let j = j0 + thread % {{ ranks }}u;
    let mine = thread < {{ tokens * ranks }}u && row < p.rows && j < p.rank;
{% for i in range(parts) %}
{% if i > 0 %}
    workgroupBarrier();
{% endif %}
{% for t in range(tokens) %}{% for j in range(ranks) %}
{% set at = (t * ranks + j) * teams_max %}
{% if subgroups %}
    let team{{ t }}_{{ j }}_{{ i }} = subgroupAdd(sum{{ t }}_{{ j }}_{{ i }});
    if (lane == 0u) { partial[{{ at }}u + team_id] = team{{ t }}_{{ j }}_{{ i }}; }
{% else %}
    partial[{{ at }}u + thread] = sum{{ t }}_{{ j }}_{{ i }};
{% endif %}
{% endfor %}{% endfor %}
    workgroupBarrier();
    if (mine) {
        var sum = 0.0;
        for (var team = 0u; team < {{ "teams" if subgroups else threads ~ "u" }}; team = team + 1u) {
            sum = sum + partial[thread * {{ teams_max }}u + team];
        }
        {{ results[i] }}[row * p.rank + j] = {{ scale }}sum;
    }
{% endfor %}
{% endif %}
}
