// dK and dV of attention, [keys, Hkv * D]. Keys go over tiles of the queries that see them, in all
// heads that share the keys.
//
// P = exp(scale * Q * K^T - lse), dS = P * (dO * V^T - delta),
// dV = P^T * dO, dK = scale * dS^T * Q.
//
// Floor: bytes of Q, dO, K, V, dK and dV, 8 * D * (M * H + 2 * keys * Hkv), over the memory's
// bandwidth; 8 * H * D FLOP per pair of a query and a key that it sees (M * keys pairs, half of
// them in causal order) over the rate of f32.
{% import "attention/shared/buffers.wgsl" as buffers %}
{% import "attention/shared/sides.wgsl" as sides %}
{% import "attention/shared/thread_tiles.wgsl" as tiles %}

{% include "attention/shared/params.wgsl" %}

{{ buffers.backward("vec4<f32>", sides.keys) }}
@group(0) @binding(6) var<storage, read_write> dk: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> dv: array<vec4<f32>>;

{# A statistic of this thread's four queries. #}
{% macro of_others(name, part) %}
        let {{ name }} = vec4<f32>(
{% for t in range(4) %}
            stats[min(query + 4u * across + {{ t }}u, p.queries - 1u) * p.heads + head].{{ part }},
{% endfor %}
        );
{% endmacro %}

{% call tiles.each_block(sides.keys) %}
{{ tiles.zeros("dk") }}
{{ tiles.zeros("dv") }}

    for (var head = kv_head * heads; head < (kv_head + 1u) * heads; head = head + 1u) {
    for (var query = start; query < end; query = query + {{ tiles.other_rows }}u) {
{{ tiles.other_begins(sides.queries) }}
{{ tiles.product("weight", "k", "q") }}
        workgroupBarrier();
        {
{{ of_others("lse", "x") }}
{{ tiles.visible(sides.keys, sides.queries) }}
{% for i in range(tall) %}
        weight{{ i }} = select(vec4<f32>(0.0), exp(weight{{ i }} * p.scale - lse), visible{{ i }});
{% endfor %}
        }
{{ tiles.stage_weights("weight") }}
{{ tiles.gather("dv", "d_o", sides.queries) }}
{{ tiles.product("d_weight", "v", "d_o") }}
        workgroupBarrier();
{{ of_others("delta", "y") }}
{% for i in range(tall) %}
        weight{{ i }} = weight{{ i }} * (d_weight{{ i }} - delta);
{% endfor %}
{{ tiles.stage_weights("weight") }}
{{ tiles.gather("dk", "q", sides.queries) }}
    }
    }

{% for i in range(tall) %}
    let scale{{ i }} = p.scale;
    let one{{ i }} = 1.0;
{% endfor %}
{{ tiles.store("dk", "scale", sides.keys) }}
{{ tiles.store("dv", "one", sides.keys) }}
{% endcall %}
