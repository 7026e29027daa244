// dQ of attention, [M, H * D], for software drivers. Queries go over the keys that they see.
//
// P = exp(scale * Q * K^T - lse), dS = P * (dO * V^T - delta),
// dQ = scale * dS * K.
{% import "attention/shared/buffers.wgsl" as buffers %}
{% import "attention/shared/sides.wgsl" as sides %}
{% import "attention/shared/lane_rows.wgsl" as lane_rows %}

{% include "attention/shared/params.wgsl" %}

{{ buffers.backward("f32", sides.queries) }}
@group(0) @binding(6) var<storage, read_write> dq: array<f32>;

{% call lane_rows.each_row(sides.queries) %}
{% for r in range(rows) %}
    let stat{{ r }} = stats[query{{ r }} * p.heads + head];
{% endfor %}
{{ lane_rows.zeros("dq") }}
    for (var first = seen0.x; first < end; first = first + 8u) {
        let key = first + lane;
        let own = (min(key, p.keys - 1u) * p.kv_heads + kv_head) * {{ head_dim }}u;
{{ lane_rows.dots("score", "q", "k") }}
{{ lane_rows.dots("d_weight", "d_o", "v") }}
{{ lane_rows.visible(sides.keys) }}
{% for r in range(rows) %}
        let weight{{ r }} =
            select(0.0, exp(score{{ r }} * p.scale - stat{{ r }}.x), visible{{ r }});
        let d_score{{ r }} = weight{{ r }} * (d_weight{{ r }} - stat{{ r }}.y);
{% endfor %}
{{ lane_rows.eight(sides.keys) }}
{{ lane_rows.add_up("dq", "d_score", "k") }}
    }

{% for r in range(rows) %}
    if (block * {{ rows }}u + {{ r }}u < p.queries) {
{% for d in range(head_dim // 8) %}
        dq[row{{ r }} + {{ 8 * d }}u + lane] = dq{{ r }}_{{ d }} * p.scale;
{% endfor %}
    }
{% endfor %}
{% endcall %}
