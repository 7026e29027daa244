// O = softmax(scale * Q * K^T) * V for the keys that each query sees, and the log-sum-exp of its
// scores: Q and O [M, H * D], K and V [keys, Hkv * D], lse [M, H]. Online softmax goes key after
// key, so a query's result does not depend on where its keys lie among other keys. For software
// drivers. See attention/tile.wgsl for the floor.
{% import "attention/shared/buffers.wgsl" as buffers %}
{% import "attention/shared/sides.wgsl" as sides %}
{% import "attention/shared/row_parts.wgsl" as row_parts %}

{% include "attention/shared/params.wgsl" %}

{{ buffers.forward("vec4<f32>") }}

// Below every score. Finite, because WGSL guarantees nothing about infinities.
const LOWEST = -3.0e38;

{% call row_parts.each_row(sides.queries) %}
{% for i in range(quads) %}
    let q{{ i }} = q[own + {{ i }}u] * p.scale;
    var o{{ i }} = vec4<f32>(0.0);
{% endfor %}
    var most = LOWEST;
    var sum = 0.0;
    for (var key = start; key < end; key = key + {{ tile }}u) {
        var scores = vec4<f32>(0.0);
{% for t in range(tile) %}
{{ row_parts.other(sides.keys, t) }}
{{ row_parts.dot_quads("scores." ~ "xyzw"[t], "q", "k", "at" ~ t) }}
{% endfor %}
        scores = over_parts(scores, thread);
{% for t in range(tile) %}
        {
{{ row_parts.visible(sides.keys, t) }}
            let score = select(LOWEST, scores.{{ "xyzw"[t] }}, visible);
            if (score > most) {
                let shrink = exp(most - score);
                most = score;
                sum = sum * shrink;
{% for i in range(quads) %}
                o{{ i }} = o{{ i }} * shrink;
{% endfor %}
            }
            let weight = select(0.0, exp(score - most), visible);
            sum = sum + weight;
{% for i in range(quads) %}
            o{{ i }} = o{{ i }} + weight * v[at{{ t }} + {{ i }}u];
{% endfor %}
        }
{% endfor %}
    }

    if (row < p.queries) {
        let none = sum == 0.0;
        let inverse = select(1.0 / sum, 0.0, none);
{% for i in range(quads) %}
        o[own + {{ i }}u] = o{{ i }} * inverse;
{% endfor %}
        if (part == 0u) {
            lse[own_row] = select(most + log(sum), p.no_key, none);
        }
    }
{% endcall %}
