// dQ of attention, [M, H * D]. Queries go over tiles of the keys that they see.
//
// P = exp(scale * Q * K^T - lse), dS = P * (dO * V^T - delta),
// dQ = scale * dS * K.
//
// Floor: bytes of Q, dO, dQ, K and V, 4 * D * (3 * M * H + 2 * keys * Hkv), over the memory's
// bandwidth; 6 * H * D FLOP per pair of a query and a key that it sees (M * keys pairs, half of
// them in causal order) over the rate of f32.
{% import "attention/shared/buffers.wgsl" as buffers %}
{% import "attention/shared/sides.wgsl" as sides %}
{% import "attention/shared/thread_tiles.wgsl" as tiles %}

{% include "attention/shared/params.wgsl" %}

{{ buffers.backward("vec4<f32>", sides.queries) }}
@group(0) @binding(6) var<storage, read_write> dq: array<vec4<f32>>;

{% call tiles.each_block(sides.queries) %}
{{ tiles.zeros("dq") }}
{% for i in range(tall) %}
    let query{{ i }} = min(base + down * {{ tall }}u + {{ i }}u, p.queries - 1u);
    let stat{{ i }} = stats[query{{ i }} * p.heads + head];
{% endfor %}

    for (var key = start; key < end; key = key + {{ tiles.other_rows }}u) {
{{ tiles.other_begins(sides.keys) }}
{{ tiles.product("weight", "q", "k") }}
        {
{{ tiles.visible(sides.queries, sides.keys) }}
{% for i in range(tall) %}
        let visible_weight{{ i }} = exp(weight{{ i }} * p.scale - vec4<f32>(stat{{ i }}.x));
        weight{{ i }} = select(vec4<f32>(0.0), visible_weight{{ i }}, visible{{ i }});
{% endfor %}
        }
{{ tiles.product("d_weight", "d_o", "v") }}
        workgroupBarrier();
{% for i in range(tall) %}
        weight{{ i }} = weight{{ i }} * (d_weight{{ i }} - vec4<f32>(stat{{ i }}.y));
{% endfor %}
{{ tiles.stage_weights("weight") }}
{{ tiles.gather("dq", "k", sides.keys) }}
    }

{% for i in range(tall) %}
    let scale{{ i }} = p.scale;
{% endfor %}
{{ tiles.store("dq", "scale", sides.queries) }}
{% endcall %}
