// dK and dV of attention, [keys, Hkv * D]. Each key goes over the queries that see it, in all
// heads that share the key.
//
// P = exp(scale * Q * K^T - lse), dS = P * (dO * V^T - delta),
// dV = P^T * dO, dK = scale * dS^T * Q.
//
// For software drivers. See attention/backward/dkv_tile.wgsl for the floor.
{% import "attention/shared/buffers.wgsl" as buffers %}
{% import "attention/shared/sides.wgsl" as sides %}
{% import "attention/shared/row_parts.wgsl" as row_parts %}

{% include "attention/shared/params.wgsl" %}

{{ buffers.backward("vec4<f32>", sides.keys) }}
@group(0) @binding(6) var<storage, read_write> dk: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> dv: array<vec4<f32>>;

{% call row_parts.each_row(sides.keys) %}
{% for i in range(quads) %}
    let k{{ i }} = k[own + {{ i }}u] * p.scale;
    let v{{ i }} = v[own + {{ i }}u];
    var dk{{ i }} = vec4<f32>(0.0);
    var dv{{ i }} = vec4<f32>(0.0);
{% endfor %}
    for (var head = kv_head * heads; head < (kv_head + 1u) * heads; head = head + 1u) {
    for (var query = start; query < end; query = query + {{ tile }}u) {
        // First scores, then gradients of the weights.
        var sums = vec4<f32>(0.0);
{% for t in range(tile) %}
{{ row_parts.other(sides.queries, t) }}
{{ row_parts.dot_quads("sums." ~ "xy"[t], "k", "q", "at" ~ t) }}
{{ row_parts.dot_quads("sums." ~ "zw"[t], "v", "d_o", "at" ~ t) }}
{% endfor %}
        sums = over_parts(sums, thread);
{% for t in range(tile) %}
        {
            let stat = stats[other_row{{ t }}];
{{ row_parts.visible(sides.queries, t) }}
            let weight = select(0.0, exp(sums.{{ "xy"[t] }} - stat.x), visible);
            let d_score = weight * (sums.{{ "zw"[t] }} - stat.y);
{% for i in range(quads) %}
            dv{{ i }} = dv{{ i }} + weight * d_o[at{{ t }} + {{ i }}u];
            dk{{ i }} = dk{{ i }} + d_score * q[at{{ t }} + {{ i }}u];
{% endfor %}
        }
{% endfor %}
    }
    }

    if (row < p.keys) {
{% for i in range(quads) %}
        dk[own + {{ i }}u] = dk{{ i }} * p.scale;
        dv[own + {{ i }}u] = dv{{ i }};
{% endfor %}
    }
{% endcall %}
