// OUT [P, Q] = s * the sum over tokens m of L[m, p] * R[m, q], from L [M, P] and R [M, Q]; dropout
// on R.
//
// Floor: the 4 M (P + Q) bytes of L and R over the bandwidth, or 2 M P Q FLOP over the rate of
// f32.
//
// Threads run along the wider of P and Q, `wide`. Each owns {{ columns }} of its columns by
// {{ ranks }} columns of the other, `narrow`, in registers. Sums over many tokens are split into
// parts, one [P, Q] each, which column_sum adds up.
{% if share %}
// On software drivers whose workgroup is one subgroup of eight, each lane loads one of eight
// narrow values and broadcasts it. {{ steps }} tokens at a time, so that sums are fetched and
// stored once for all of them.
{% endif %}
{% import "shared/entry.wgsl" as entry %}

struct Params {
    first_group: u32,
    groups: u32,
    tokens: u32,        // M
    tokens_each: u32,   // tokens per part
    wide: u32,          // columns of the wider operand
    narrow: u32,        // columns of the narrower operand
    wide_groups: u32,   // workgroups along the wider operand
    narrow_groups: u32, // workgroups along the narrower operand
    wide_stride: u32,   // stride in OUT from one column of the wider operand to the next, in values
    narrow_stride: u32, // the same for the narrower operand
    scale: f32,         // s
    seed_low: u32,      // of the dropout
    seed_high: u32,
    drop_below: u32,    // values with a hash below this are dropped
    keep_scale: f32,    // 1 / (1 - probability)
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> wide: array<f32>;
@group(0) @binding(1) var<storage, read> narrow: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;

{% if dropout != "none" %}
{% include "shared/dropout.wgsl" %}
{% endif %}

{# `name`: a value of an operand, with dropout if it is R. #}
{% macro load(operand, name, row, column) %}
        let {{ name }}_at = {{ row }} + {{ column }};
{% if dropout == operand %}
        let {{ name }} = {{ operand }}[{{ name }}_at] * dropout_factor({{ name }}_at);
{% else %}
        let {{ name }} = {{ operand }}[{{ name }}_at];
{% endif %}
{% endmacro %}

{% call entry.each_group(threads, ["lane"] if share else []) %}
    let row_of_groups = group / p.wide_groups;
    let part = row_of_groups / p.narrow_groups;
    let w_base = (group - row_of_groups * p.wide_groups) * {{ threads * columns }}u + thread;
    let n_base = (row_of_groups - part * p.narrow_groups) * {{ ranks }}u;

    // Columns past the end are computed from the last one and not stored.
{% for c in range(columns) %}
    let w{{ c }} = min(w_base + {{ c * threads }}u, p.wide - 1u);
{% endfor %}
{% for j in range(ranks) %}
    let n{{ j }} = min(n_base + {{ j }}u, p.narrow - 1u);
{% endfor %}
{% for j in range(ranks) %}
{% for c in range(columns) %}
    var sum{{ j }}_{{ c }} = 0.0;
{% endfor %}
{% endfor %}

    let first = part * p.tokens_each;
    let end = min(first + p.tokens_each, p.tokens);
{% if share %}
{% for s in range(ranks // 8) %}
    let mine{{ s }} = min(n_base + {{ 8 * s }}u + lane, p.narrow - 1u);
{% endfor %}
    for (var start = first; start < end; start = start + {{ steps }}u) {
{% for t in range(steps) %}
        // Tokens past the end are the last one, multiplied by zero.
        let m{{ t }} = min(start + {{ t }}u, end - 1u);
        let wide_row{{ t }} = m{{ t }} * p.wide;
        let narrow_row{{ t }} = m{{ t }} * p.narrow;
{% for c in range(columns) %}
{{ load("wide", "x" ~ t ~ "_" ~ c, "wide_row" ~ t, "w" ~ c) }}
{% endfor %}
{% for s in range(ranks // 8) %}
{{ load("narrow", "own" ~ t ~ "_" ~ s, "narrow_row" ~ t, "mine" ~ s) }}
        let y{{ t }}_{{ s }} = select(0.0, own{{ t }}_{{ s }}, start + {{ t }}u < end);
{% endfor %}
{% endfor %}
{% for j in range(ranks) %}
        {
{% for t in range(steps) %}
            let y{{ t }} = subgroupBroadcast(y{{ t }}_{{ j // 8 }}, {{ j % 8 }}u);
{% endfor %}
{% for c in range(columns) %}
{% for t in range(steps) %}
            sum{{ j }}_{{ c }} = fma(x{{ t }}_{{ c }}, y{{ t }}, sum{{ j }}_{{ c }});
{% endfor %}
{% endfor %}
        }
{% endfor %}
    }
{% else %}
    for (var m = first; m < end; m = m + 1u) {
        let wide_row = m * p.wide;
        let narrow_row = m * p.narrow;
{% for c in range(columns) %}
{{ load("wide", "x" ~ c, "wide_row", "w" ~ c) }}
{% endfor %}
{% for j in range(ranks) %}
{{ load("narrow", "y" ~ j, "narrow_row", "n" ~ j) }}
{% for c in range(columns) %}
        sum{{ j }}_{{ c }} = sum{{ j }}_{{ c }} + x{{ c }} * y{{ j }};
{% endfor %}
{% endfor %}
    }
{% endif %}

    let part_base = part * p.wide * p.narrow;
{% for j in range(ranks) %}
{% for c in range(columns) %}
    if (w_base + {{ c * threads }}u < p.wide && n_base + {{ j }}u < p.narrow) {
        out[part_base + w{{ c }} * p.wide_stride + n{{ j }} * p.narrow_stride] =
            p.scale * sum{{ j }}_{{ c }};
    }
{% endfor %}
{% endfor %}
{% endcall %}
