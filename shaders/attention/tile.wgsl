// O = softmax(scale * Q * K^T) * V for the keys that each query sees, and the log-sum-exp of its
// scores: Q and O [M, H * D], K and V [keys, Hkv * D], lse [M, H]. Online softmax over tiles of
// keys.
//
// Floor: bytes of Q, O, K and V, 8 * D * (M * H + keys * Hkv), over the memory's bandwidth; 4 * H
// * D FLOP per pair of a query and a key that it sees (M * keys pairs, half of them in causal
// order) over the rate of f32.
{% import "attention/shared/buffers.wgsl" as buffers %}
{% import "attention/shared/sides.wgsl" as sides %}
{% import "attention/shared/thread_tiles.wgsl" as tiles %}

{% include "attention/shared/params.wgsl" %}

{{ buffers.forward("vec4<f32>") }}

// Below every score. Finite, because WGSL guarantees nothing about infinities.
const LOWEST = -3.0e38;

{% call tiles.each_block(sides.queries) %}
{{ tiles.zeros("o") }}
{% for i in range(tall) %}
    var most{{ i }} = LOWEST;
    var sum{{ i }} = 0.0; // sum of this thread's weights
{% endfor %}

    for (var key = start; key < end; key = key + {{ tiles.other_rows }}u) {
{{ tiles.other_begins(sides.keys) }}
{{ tiles.product("score", "q", "k") }}
{{ tiles.visible(sides.queries, sides.keys) }}
        var highest = vec4<f32>(LOWEST);
{% for i in range(tall) %}
        score{{ i }} = select(vec4<f32>(LOWEST), score{{ i }} * p.scale, visible{{ i }});
        highest.{{ "xyzw"[i] }} =
            max(max(score{{ i }}.x, score{{ i }}.y), max(score{{ i }}.z, score{{ i }}.w));
{% endfor %}
        workgroupBarrier();
        staged[{{ tiles.others_begin }}u + thread] = highest;
        workgroupBarrier();
        for (var i = 0u; i < {{ tiles.across }}u; i = i + 1u) {
            highest =
                max(highest, staged[{{ tiles.others_begin }}u + down * {{ tiles.across }}u + i]);
        }
{% for i in range(tall) %}
        {
            let now = max(most{{ i }}, highest.{{ "xyzw"[i] }});
            let shrink = exp(most{{ i }} - now);
            most{{ i }} = now;
            let known{{ i }} = score{{ i }} > vec4<f32>(LOWEST);
            score{{ i }} = select(vec4<f32>(0.0), exp(score{{ i }} - vec4<f32>(now)), known{{ i }});
            sum{{ i }} = sum{{ i }} * shrink + dot(score{{ i }}, vec4<f32>(1.0));
{% for j in range(tiles.quads) %}
            o{{ i }}_{{ j }} = o{{ i }}_{{ j }} * shrink;
{% endfor %}
        }
{% endfor %}
{{ tiles.stage_weights("score") }}
{{ tiles.gather("o", "v", sides.keys) }}
    }

    workgroupBarrier();
    var sums = vec4<f32>(0.0);
{% for i in range(tall) %}
    sums.{{ "xyzw"[i] }} = sum{{ i }};
{% endfor %}
    staged[thread] = sums;
    workgroupBarrier();
    var total = vec4<f32>(0.0);
    for (var i = 0u; i < {{ tiles.across }}u; i = i + 1u) {
        total = total + staged[down * {{ tiles.across }}u + i];
    }
    let none = total == vec4<f32>(0.0);
    let inverse = select(vec4<f32>(1.0) / total, vec4<f32>(0.0), none);
{% for i in range(tall) %}
    let inverse{{ i }} = inverse.{{ "xyzw"[i] }};
    if (across == 0u && base + down * {{ tall }}u + {{ i }}u < p.queries) {
        let at = (base + down * {{ tall }}u + {{ i }}u) * p.heads + head;
        lse[at] = select(most{{ i }} + log(total.{{ "xyzw"[i] }}), p.no_key, none.{{ "xyzw"[i] }});
    }
{% endfor %}
{{ tiles.store("o", "inverse", sides.queries) }}
{% endcall %}
