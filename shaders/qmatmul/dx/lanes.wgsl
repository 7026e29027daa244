// dX = dY * W + mask * (G * A), for software drivers: no workgroup memory, no barriers.
//
// Lanes run along K. One invocation owns {{ tokens }} rows of dX by {{ words }} words of eight
// columns, {{ threads }} words apart. Eight rows of W are decoded at a time and serve {{ tokens }}
// rows.
{% if share %}
// The workgroup is one subgroup of eight: each lane loads one of eight dY and broadcasts it.
// Drivers that don't detect that an address is the same in all lanes would load it eight times.
{% endif %}
{% import "shared/entry.wgsl" as entry %}
{% import "shared/row_quads.wgsl" as row_quads %}
{% set sets = scale_sets if kind == "quant" else 0 %}
{% if sets > 0 %}
// The same applies to scales: the lanes' words of a row use {{ sets }} scales together.
{% endif %}

{% include "qmatmul/shared/backward.wgsl" %}

@group(0) @binding(4) var<storage, read_write> dx: array<f32>;

{% include "shared/matrix.wgsl" %}

{{ row_quads.load("a") }}

{# `NAME_ofI_C`: the value for this lane's set, from those that lane I has loaded. #}
{% macro of_set(name, i, c) %}
{% for s in range(sets) %}
        let {{ name }}{{ i }}_{{ c }}_{{ s }} =
            subgroupBroadcast({{ name }}{{ c }}_{{ s }}, {{ i }}u);
{% endfor %}
{% if sets == 2 %}
        let {{ name }}_of{{ i }}_{{ c }} =
            vec4<f32>(select({{ name }}{{ i }}_{{ c }}_0, {{ name }}{{ i }}_{{ c }}_1, upper));
{% else %}
        let {{ name }}_of{{ i }}_{{ c }} = vec4<f32>({{ name }}{{ i }}_{{ c }}_0);
{% endif %}
{% endmacro %}

{% call entry.each_group(threads, ["lane"] if share else []) %}
{% if share and kind == "quant" and decoder == "select" %}
    fill_table(lane);
{% endif %}
    let row_groups = p.rows / {{ tokens }}u;
    let column_group = group / row_groups;
    let row_group = group - column_group * row_groups;
    let row_base = p.row + row_group * {{ tokens }}u;
    let word_base = column_group * {{ threads * words }}u;
{% if sets == 2 %}
    let upper = thread >= {{ threads // 2 }}u;
{% endif %}

    // Words past the end are computed from the last one and not stored; rows always come in whole
    // groups.
{% for c in range(words) %}
    let word{{ c }} = min(word_base + {{ c * threads }}u + thread, p.words - 1u);
{% endfor %}
{% for t in range(tokens) %}
    let row{{ t }} = row_base + {{ t }}u;
{% for c in range(words) %}
    var lo_sum{{ t }}_{{ c }} = vec4<f32>(0.0);
    var hi_sum{{ t }}_{{ c }} = vec4<f32>(0.0);
{% endfor %}
{% endfor %}

{% if accumulate %}
{% for t in range(tokens) %}
{% for c in range(words) %}
    lo_sum{{ t }}_{{ c }} = load4(row{{ t }}, 2u * word{{ c }});
    hi_sum{{ t }}_{{ c }} = load4(row{{ t }}, 2u * word{{ c }} + 1u);
{% endfor %}
{% endfor %}
{% else %}
    // The adapter, which only the first part adds, comes first, because its mask must not affect
    // the rest.
    for (var j = 0u; j < p.rank; j = j + 1u) {
{% for c in range(words) %}
        let lo{{ c }} = a4(j, 2u * word{{ c }});
        let hi{{ c }} = a4(j, 2u * word{{ c }} + 1u);
{% endfor %}
{% for t in range(tokens) %}
        {
            let left = g[row{{ t }} * p.rank + j];
{% for c in range(words) %}
            lo_sum{{ t }}_{{ c }} = lo_sum{{ t }}_{{ c }} + left * lo{{ c }};
            hi_sum{{ t }}_{{ c }} = hi_sum{{ t }}_{{ c }} + left * hi{{ c }};
{% endfor %}
        }
{% endfor %}
    }
{% if dropout %}
{% for t in range(tokens) %}
{% for c in range(words) %}
    lo_sum{{ t }}_{{ c }} = lo_sum{{ t }}_{{ c }} * dropout_factor4(row{{ t }}, 8u * word{{ c }});
    hi_sum{{ t }}_{{ c }} =
        hi_sum{{ t }}_{{ c }} * dropout_factor4(row{{ t }}, 8u * word{{ c }} + 4u);
{% endfor %}
{% endfor %}
{% endif %}
{% endif %}

    // Rows of W past the end are the last one, multiplied by zero.
    let last = p.n - 1u;
    for (var n = 0u; n < p.n; n = n + 8u) {
{% for i in range(8) %}
        let n{{ i }} = min(n + {{ i }}u, last);
{% endfor %}
{% if share %}
        let n_mine = min(n + lane, last);
        let is_mine = n + lane <= last;
{% endif %}
{% if sets > 0 %}
{% for c in range(words) %}
{% for s in range(sets) %}
        let word{{ c }}_{{ s }} = word_base + {{ c * threads + s * (threads // sets) }}u;
        let block{{ c }}_{{ s }} = block_of(n_mine, 8u * min(word{{ c }}_{{ s }}, p.words - 1u));
        let scale{{ c }}_{{ s }} = scale_of(block{{ c }}_{{ s }});
{% if mins != "none" %}
        let low{{ c }}_{{ s }} = min_of(block{{ c }}_{{ s }});
{% endif %}
{% endfor %}
{% endfor %}
{% endif %}
{% for i in range(8) %}
{% for c in range(words) %}
{% if sets > 0 %}
        let codes{{ i }}_{{ c }} = w[n{{ i }} * p.m.row_words + word{{ c }}];
{{ of_set("scale", i, c) }}
{% if mins != "none" %}
{{ of_set("low", i, c) }}
{% endif %}
{% for half, name in [("low", "lo"), ("high", "hi")] %}
        let {{ name }}{{ i }}_{{ c }} = decode_{{ half }}(codes{{ i }}_{{ c }})
            * scale_of{{ i }}_{{ c }}{{ " + low_of" ~ i ~ "_" ~ c if mins != "none" }};
{% endfor %}
{% else %}
        let decoded{{ i }}_{{ c }} = weights8(n{{ i }}, word{{ c }});
        let lo{{ i }}_{{ c }} = decoded{{ i }}_{{ c }}.lo;
        let hi{{ i }}_{{ c }} = decoded{{ i }}_{{ c }}.hi;
{% endif %}
{% endfor %}
{% endfor %}
{% for t in range(tokens) %}
        {
            let at = row{{ t }} * p.dy_stride + p.column;
{% if share %}
            let mine = select(0.0, dy[at + n_mine], is_mine);
{% endif %}
{% for i in range(8) %}
{% if share %}
            let d{{ i }} = subgroupBroadcast(mine, {{ i }}u);
{% else %}
            let d{{ i }} = select(0.0, dy[at + n{{ i }}], n + {{ i }}u <= last);
{% endif %}
{% endfor %}
{% for c in range(words) %}
{% for half in ["lo", "hi"] %}
{% set sum = half ~ "_sum" ~ t ~ "_" ~ c %}
{% for i in range(8) %}
            {{ sum }} = fma(vec4<f32>(d{{ i }}), {{ half }}{{ i }}_{{ c }}, {{ sum }});
{% endfor %}
{% endfor %}
{% endfor %}
        }
{% endfor %}
    }

{% for c in range(words) %}
    if (word_base + {{ c * threads }}u + thread < p.words) {
{% for t in range(tokens) %}
        store4(row{{ t }}, 2u * word{{ c }}, lo_sum{{ t }}_{{ c }});
        store4(row{{ t }}, 2u * word{{ c }} + 1u, hi_sum{{ t }}_{{ c }});
{% endfor %}
    }
{% endfor %}
{% endcall %}
