// A product with few columns, RESULT [M, r] = LEFT [M, K] * RIGHT [K, r], with {{ parts }} RIGHT at
// a time. It uses functions of the kernel:
{% if share %}
//   left1(row, k)    LEFT[row, k]
{% else %}
//   left4(row, q)    LEFT[row, 4q .. 4q + 4]; zero past K
{% endif %}
//   right4_I(j, q)   RIGHT I[4q .. 4q + 4, j]; finite past K
//   mask_I(row, k)   with dropout: what LEFT[row, k] is multiplied by before it meets RIGHT I
//   store_I(at, sum) stores a value of RESULT I
{% if software %}
// For software drivers: lanes along r, {{ tokens }} rows of LEFT per invocation, no workgroup
// memory. Loads dominate the time.
{% if share %}
// Each of eight lanes loads one value of eight, and broadcasts hand them round.
{% endif %}
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

{# Four values of LEFT, with the dropout of RIGHT `part`. #}
{% macro masked(name, part, t) %}
{% if dropout %}
            let {{ name }}{{ part }} = values * vec4<f32>(
{% for e in range(4) %}
                mask_{{ part }}(row{{ t }}, 4u * q + {{ e }}u),
{% endfor %}
            );
{% else %}
            let {{ name }}{{ part }} = values;
{% endif %}
{% endmacro %}

{% set also = ["lane"] if share else ["subgroup", "subgroups", "lane"] if subgroups else [] %}
{% call entry.each_group(threads, also) %}
    let row_group = group / p.rank_groups;
    let row_base = row_group * {{ tokens }}u;
{% if not share %}
    let quads = (p.k + 3u) >> 2u;
{% endif %}
{% for t in range(tokens) %}
    let row{{ t }} = min(row_base + {{ t }}u, p.rows - 1u);
{% endfor %}

{% if software %}
    let j = (group - row_group * p.rank_groups) * {{ threads }}u + thread;
    let j0 = min(j, p.rank - 1u);
{% for t in range(tokens) %}
{% for i in range(parts) %}
    var sum{{ t }}_{{ i }} = 0.0;
{% endfor %}
{% endfor %}
{% if share %}
    for (var k = 0u; k < p.k; k = k + 8u) {
{% for i in range(parts) %}
        let lo{{ i }} = right4_{{ i }}(j0, k >> 2u);
        let hi{{ i }} = right4_{{ i }}(j0, (k >> 2u) + 1u);
{% endfor %}
{% for t in range(tokens) %}
        {
            let mine = left1(row{{ t }}, k + lane);
{% for i in range(parts) %}
{% if dropout %}
            let value{{ i }} = mine * mask_{{ i }}(row{{ t }}, k + lane);
{% else %}
            let value{{ i }} = mine;
{% endif %}
{% set sum = "sum" ~ t ~ "_" ~ i %}
{% for e in range(8) %}
{% set right = ("lo" if e < 4 else "hi") ~ i ~ "." ~ "xyzw"[e % 4] %}
            {{ sum }} = fma(subgroupBroadcast(value{{ i }}, {{ e }}u), {{ right }}, {{ sum }});
{% endfor %}
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
{{ masked("values", i, t) }}
            sum{{ t }}_{{ i }} = sum{{ t }}_{{ i }} + dot(values{{ i }}, right{{ i }});
{% endfor %}
        }
{% endfor %}
    }
{% endif %}
    if (j < p.rank) {
{% for t in range(tokens) %}
        if (row_base + {{ t }}u < p.rows) {
{% for i in range(parts) %}
            store_{{ i }}(row{{ t }} * p.rank + j, sum{{ t }}_{{ i }});
{% endfor %}
        }
{% endfor %}
    }
{% else %}
    let j0 = (group - row_group * p.rank_groups) * {{ ranks }}u;
{% for j in range(ranks) %}
    let rank{{ j }} = min(j0 + {{ j }}u, p.rank - 1u);
{% endfor %}
{% for t in range(tokens) %}{% for j in range(ranks) %}
{% for i in range(parts) %}
    var sum{{ t }}_{{ j }}_{{ i }} = 0.0;
{% endfor %}
{% endfor %}
{% endfor %}
    for (var q = thread; q < quads; q = q + {{ threads }}u) {
{% for j in range(ranks) %}
{% for i in range(parts) %}
        let right{{ j }}_{{ i }} = right4_{{ i }}(rank{{ j }}, q);
{% endfor %}
{% endfor %}
{% for t in range(tokens) %}
        {
            let values = left4(row{{ t }}, q);
{% for i in range(parts) %}
{{ masked("values", i, t) }}
{% for j in range(ranks) %}
            sum{{ t }}_{{ j }}_{{ i }} =
                sum{{ t }}_{{ j }}_{{ i }} + dot(values{{ i }}, right{{ j }}_{{ i }});
{% endfor %}
{% endfor %}
        }
{% endfor %}
    }
    let row = row_base + thread / {{ ranks }}u;
    let j = j0 + thread % {{ ranks }}u;
    let mine = thread < {{ tokens * ranks }}u && row < p.rows && j < p.rank;
    let teams = {{ "subgroups" if subgroups else threads ~ "u" }};
{% for i in range(parts) %}
{% if i > 0 %}
    workgroupBarrier();
{% endif %}
{% for t in range(tokens) %}
{% for j in range(ranks) %}
{% set at = (t * ranks + j) * teams_max %}
{% if subgroups %}
    let team{{ t }}_{{ j }}_{{ i }} = subgroupAdd(sum{{ t }}_{{ j }}_{{ i }});
    if (lane == 0u) { partial[{{ at }}u + subgroup] = team{{ t }}_{{ j }}_{{ i }}; }
{% else %}
    partial[{{ at }}u + thread] = sum{{ t }}_{{ j }}_{{ i }};
{% endif %}
{% endfor %}
{% endfor %}
    workgroupBarrier();
    if (mine) {
        var sum = 0.0;
        for (var team = 0u; team < teams; team = team + 1u) {
            sum = sum + partial[thread * {{ teams_max }}u + team];
        }
        store_{{ i }}(row * p.rank + j, sum);
    }
{% endfor %}
{% endif %}
{% endcall %}
