// dK and dV of attention, [keys, Hkv * D], for software drivers. Keys go over the queries that see
// them, in all heads that share the keys.
//
// P = exp(scale * Q * K^T - lse), dS = P * (dO * V^T - delta),
// dV = P^T * dO, dK = scale * dS^T * Q.
{% import "attention/shared/buffers.wgsl" as buffers %}
{% import "attention/shared/sides.wgsl" as sides %}
{% import "attention/shared/lane_rows.wgsl" as lane_rows %}

{% include "attention/shared/params.wgsl" %}

{{ buffers.backward("f32", sides.keys) }}
@group(0) @binding(6) var<storage, read_write> dk: array<f32>;
@group(0) @binding(7) var<storage, read_write> dv: array<f32>;

{% call lane_rows.each_row(sides.keys) %}
{{ lane_rows.zeros("dk") }}
{{ lane_rows.zeros("dv") }}
    for (var head = kv_head * heads; head < (kv_head + 1u) * heads; head = head + 1u) {
    for (var first = seen0.x; first < end; first = first + 8u) {
        let query = first + lane;
        let at = min(query, p.queries - 1u) * p.heads + head;
        let stat = stats[at];
        let own = at * {{ head_dim }}u;
{{ lane_rows.dots("score", "k", "q") }}
{{ lane_rows.dots("d_weight", "v", "d_o") }}
{{ lane_rows.visible(sides.queries) }}
{% for r in range(rows) %}
        let weight{{ r }} = select(0.0, exp(score{{ r }} * p.scale - stat.x), visible{{ r }});
        let d_score{{ r }} = weight{{ r }} * (d_weight{{ r }} - stat.y);
{% endfor %}
{{ lane_rows.eight(sides.queries) }}
{{ lane_rows.add_up("dv", "weight", "d_o") }}
{{ lane_rows.add_up("dk", "d_score", "q") }}
    }
    }

{% for r in range(rows) %}
    if (block * {{ rows }}u + {{ r }}u < p.keys) {
{% for d in range(head_dim // 8) %}
        dk[row{{ r }} + {{ 8 * d }}u + lane] = dk{{ r }}_{{ d }} * p.scale;
        dv[row{{ r }} + {{ 8 * d }}u + lane] = dv{{ r }}_{{ d }};
{% endfor %}
    }
{% endfor %}
{% endcall %}
