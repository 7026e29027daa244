// dQ of attention, [M, H * D]. Each query goes over the keys that it sees.
//
// P = exp(scale * Q * K^T - lse), dS = P * (dO * V^T - delta),
// dQ = scale * dS * K.
//
// For software drivers. See attention/backward/dq_tile.wgsl for the floor.
{% import "attention/shared/buffers.wgsl" as buffers %}
{% import "attention/shared/sides.wgsl" as sides %}
{% import "attention/shared/row_parts.wgsl" as row_parts %}

{% include "attention/shared/params.wgsl" %}

{{ buffers.backward("vec4<f32>", sides.queries) }}
@group(0) @binding(6) var<storage, read_write> dq: array<vec4<f32>>;

{% call row_parts.each_row(sides.queries) %}
    let stat = stats[own_row];
{% for i in range(quads) %}
    let q{{ i }} = q[own + {{ i }}u] * p.scale;
    let do{{ i }} = d_o[own + {{ i }}u];
    var dq{{ i }} = vec4<f32>(0.0);
{% endfor %}
    for (var key = start; key < end; key = key + {{ tile }}u) {
        // First scores, then gradients of the weights.
        var sums = vec4<f32>(0.0);
{% for t in range(tile) %}
{{ row_parts.other(sides.keys, t) }}
{{ row_parts.dot_quads("sums." ~ "xy"[t], "q", "k", "at" ~ t) }}
{{ row_parts.dot_quads("sums." ~ "zw"[t], "do", "v", "at" ~ t) }}
{% endfor %}
        sums = over_parts(sums, thread);
{% for t in range(tile) %}
        {
{{ row_parts.visible(sides.keys, t) }}
            let weight = select(0.0, exp(sums.{{ "xy"[t] }} - stat.x), visible);
            let d_score = weight * (sums.{{ "zw"[t] }} - stat.y);
{% for i in range(quads) %}
            dq{{ i }} = dq{{ i }} + d_score * k[at{{ t }} + {{ i }}u];
{% endfor %}
        }
{% endfor %}
    }

    if (row < p.queries) {
{% for i in range(quads) %}
        dq[own + {{ i }}u] = dq{{ i }} * p.scale;
{% endfor %}
    }
{% endcall %}
