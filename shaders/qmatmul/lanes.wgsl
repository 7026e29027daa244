// Y = X * W^T + bias + s * H * B^T, for software drivers: no workgroup memory, no barriers.
//
// Lanes run along N. One invocation owns {{ tokens }} rows of X by {{ columns }} columns of Y: a
// word of codes is decoded once and serves {{ tokens }} rows.
{% if share %}
// The workgroup is one subgroup of eight: each lane loads one of eight x and broadcasts it.
// Drivers that don't detect that an address is the same in all lanes would load it eight times.
{% endif %}
{% import "shared/entry.wgsl" as entry %}
{% import "shared/row_quads.wgsl" as row_quads %}

{% include "qmatmul/shared/forward.wgsl" %}

@group(0) @binding(5) var<storage, read_write> y: array<f32>;

{% include "shared/matrix.wgsl" %}
{% if not share %}
{{ row_quads.load("x") }}
{% endif %}

{# Eight values of a row of X, in two vec4. #}
{% macro load_x(t) %}
{% if share %}
            let x{{ t }} = x[row{{ t }} * p.k + 8u * g + lane];
{% for half, first in [("lo", 0), ("hi", 4)] %}
            let {{ half }}_x{{ t }} = vec4<f32>(
{% for e in range(first, first + 4) %}
                subgroupBroadcast(x{{ t }}, {{ e }}u),
{% endfor %}
            );
{% endfor %}
{% else %}
            let lo_x{{ t }} = x4(row{{ t }}, 2u * g);
            let hi_x{{ t }} = x4(row{{ t }}, 2u * g + 1u);
{% endif %}
{% endmacro %}
{# Eight values of a row of W. #}
{% macro load_w(c) %}
{% if kind == "quant" and not ragged %}
            let word{{ c }} = w[n{{ c }} * p.m.row_words + g];
{% set low = " + low" ~ c if mins != "none" %}
            let lo_w{{ c }} = decode_low(word{{ c }}) * scale{{ c }}{{ low }};
            let hi_w{{ c }} = decode_high(word{{ c }}) * scale{{ c }}{{ low }};
{% else %}
            let decoded{{ c }} = weights8(n{{ c }}, g);
            let lo_w{{ c }} = decoded{{ c }}.lo;
            let hi_w{{ c }} = decoded{{ c }}.hi;
{% endif %}
{% endmacro %}
{# Adds their products. #}
{% macro multiply(t, c) %}
{% for half in ["lo", "hi"] %}
{% for e in "xyzw" %}
            y{{ t }}_{{ c }} =
                fma({{ half }}_x{{ t }}.{{ e }}, {{ half }}_w{{ c }}.{{ e }}, y{{ t }}_{{ c }});
{% endfor %}
{% endfor %}
{% endmacro %}

{% call entry.each_group(threads, ["lane"] if share else []) %}
{% if share and kind == "quant" and decoder == "select" %}
    fill_table(lane);
{% endif %}
    let row_groups = p.rows / {{ tokens }}u;
    let column_group = group / row_groups;
    let row_group = group - column_group * row_groups;
    let n_base = column_group * {{ threads * columns }}u + thread;
    let row_base = p.row + row_group * {{ tokens }}u;

    // Columns past the end are computed from the last one and not stored; rows always come in
    // whole groups.
{% for c in range(columns) %}
    let n{{ c }} = min(n_base + {{ c * threads }}u, p.n - 1u);
{% endfor %}
{% for t in range(tokens) %}
    let row{{ t }} = row_base + {{ t }}u;
{% endfor %}
{% for t in range(tokens) %}
{% for c in range(columns) %}
    var y{{ t }}_{{ c }} = 0.0;
{% endfor %}
{% endfor %}

    let words = (p.k + 7u) >> 3u;
{% if kind == "quant" and not ragged %}
    // {{ words_per_scale }} words in a row share a scale, which is fetched once.
    for (var start = 0u; start < words; start = start + {{ words_per_scale }}u) {
{% for c in range(columns) %}
        let block{{ c }} = block_of(n{{ c }}, 8u * start);
        let scale{{ c }} = vec4<f32>(scale_of(block{{ c }}));
{% if mins != "none" %}
        let low{{ c }} = vec4<f32>(min_of(block{{ c }}));
{% endif %}
{% endfor %}
        for (var g = start; g < start + {{ words_per_scale }}u; g = g + 1u) {
{% else %}
    {
        for (var g = 0u; g < words; g = g + 1u) {
{% endif %}
{% if tokens <= 2 %}
            // All x fit in registers. One column at a time, so that its weights need not stay
            // there.
{% for t in range(tokens) %}
{{ load_x(t) }}
{% endfor %}
{% for c in range(columns) %}
{{ load_w(c) }}
{% for t in range(tokens) %}
{{ multiply(t, c) }}
{% endfor %}
{% endfor %}
{% else %}
{% for c in range(columns) %}
{{ load_w(c) }}
{% endfor %}
{% for t in range(tokens) %}
{{ load_x(t) }}
{% for c in range(columns) %}
{{ multiply(t, c) }}
{% endfor %}
{% endfor %}
{% endif %}
        }
    }

    for (var j = 0u; j < p.rank; j = j + 1u) {
{% for c in range(columns) %}
        let b{{ c }} = b[(p.column + n{{ c }}) * p.rank + j] * p.lora_scale;
{% endfor %}
{% for t in range(tokens) %}
        {
            let a = h[row{{ t }} * p.rank + j];
{% for c in range(columns) %}
            y{{ t }}_{{ c }} = y{{ t }}_{{ c }} + a * b{{ c }};
{% endfor %}
        }
{% endfor %}
    }

{% for c in range(columns) %}
    if (n_base + {{ c * threads }}u < p.n) {
        if (p.bias_rows > 0u) {
{% for t in range(tokens) %}
            y{{ t }}_{{ c }} = y{{ t }}_{{ c }} + bias[bias_at(row{{ t }}, p.column + n{{ c }})];
{% endfor %}
        }
{% for t in range(tokens) %}
        y[row{{ t }} * p.y_stride + p.column + n{{ c }}] = y{{ t }}_{{ c }};
{% endfor %}
    }
{% endfor %}
{% endcall %}
