// O = softmax(scale * Q * K^T) * V for the keys that each query sees, and the log-sum-exp of its
// scores, for software drivers: Q and O [M, H * D], K and V [keys, Hkv * D], lse [M, H].
//
// Online softmax in powers of two. The reference exponent of the weights is a whole number, so
// changing it is exact, and a query's result does not depend on where its keys lie among other
// keys.
{% import "attention/shared/buffers.wgsl" as buffers %}
{% import "attention/shared/sides.wgsl" as sides %}
{% import "attention/shared/lane_rows.wgsl" as lane_rows %}

{% include "attention/shared/params.wgsl" %}

{{ buffers.forward("f32") }}

// Below every score. Finite, because WGSL guarantees nothing about infinities.
const LOWEST = -3.0e38;
const LOG2_E = 1.4426950408889634;
const LN_2 = 0.6931471805599453;

// 2^e for a whole number e of at most 127; 0 below -126.
fn power_of_two(e: f32) -> f32 {
    return bitcast<f32>(u32(i32(max(e, -127.0)) + 127) << 23u);
}

{% call lane_rows.each_row(sides.queries) %}
{% for r in range(rows) %}
    var most{{ r }} = LOWEST;
    var sum{{ r }} = 0.0;
{% endfor %}
{{ lane_rows.zeros("o") }}
    for (var first = seen0.x; first < end; first = first + 8u) {
        let key = first + lane;
        let own = (min(key, p.keys - 1u) * p.kv_heads + kv_head) * {{ head_dim }}u;
{{ lane_rows.dots("score", "q", "k") }}
        var grown = false;
{{ lane_rows.visible(sides.keys) }}
{% for r in range(rows) %}
        let power{{ r }} = select(LOWEST, score{{ r }} * (p.scale * LOG2_E), visible{{ r }});
        let whole{{ r }} = floor(power{{ r }});
        var top{{ r }} = most{{ r }};
{% for i in range(8) %}
        top{{ r }} = max(top{{ r }}, subgroupBroadcast(whole{{ r }}, {{ i }}u));
{% endfor %}
        grown = grown || top{{ r }} > most{{ r }};
{% endfor %}
        if (grown) {
{% for r in range(rows) %}
            {
                let shrink = power_of_two(most{{ r }} - top{{ r }});
                sum{{ r }} = sum{{ r }} * shrink;
{% for d in range(head_dim // 8) %}
                o{{ r }}_{{ d }} = o{{ r }}_{{ d }} * shrink;
{% endfor %}
                most{{ r }} = top{{ r }};
            }
{% endfor %}
        }
{% for r in range(rows) %}
        let visible_weight{{ r }} =
            exp2(power{{ r }} - whole{{ r }}) * power_of_two(whole{{ r }} - most{{ r }});
        let weight{{ r }} = select(0.0, visible_weight{{ r }}, visible{{ r }});
{% for i in range(8) %}
        sum{{ r }} = sum{{ r }} + subgroupBroadcast(weight{{ r }}, {{ i }}u);
{% endfor %}
{% endfor %}
{{ lane_rows.eight(sides.keys) }}
{{ lane_rows.add_up("o", "weight", "v") }}
    }

{% for r in range(rows) %}
    if (block * {{ rows }}u + {{ r }}u < p.queries) {
        let none = sum{{ r }} == 0.0;
        let inverse = select(1.0 / sum{{ r }}, 0.0, none);
{% for d in range(head_dim // 8) %}
        o[row{{ r }} + {{ 8 * d }}u + lane] = o{{ r }}_{{ d }} * inverse;
{% endfor %}
        if (lane == 0u) {
            lse[query{{ r }} * p.heads + head] =
                select((most{{ r }} + log2(sum{{ r }})) * LN_2, p.no_key, none);
        }
    }
{% endfor %}
{% endcall %}
