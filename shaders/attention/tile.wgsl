// O = softmax(scale * Q * K^T) * V for the keys that each query sees, and the log-sum-exp of its
// scores: Q and O [M, H * D], K and V [keys, Hkv * D], lse [M, H]. Online softmax over tiles of
// keys.
//
// Floor: bytes of Q, O, K and V, 8 * D * (M * H + keys * Hkv), over the memory's bandwidth; 4 * H
// * D FLOP per pair of a query and a key that it sees (M * keys pairs, half of them in causal
// order) over the rate of f32.
{{ "" }}
{% from "attention/shared/heads.wgsl" import query_block %}
{% from "attention/shared/thread_tiles.wgsl" import across, quads, own_rows, other_rows, threads, others_begin, staged_quads, begin, begins, product, stage_weights, gather, store, zeros, ranges, visible %}
{% include "attention/shared/params.wgsl" %}
@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> key_ranges: array<vec2<u32>>; // for each query: first key, end
@group(0) @binding(4) var<storage, read_write> o: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> lse: array<f32>;

// Tiles of both sides, later weights and V.
var<workgroup> staged: array<vec4<f32>, {{ staged_quads }}>;

// Below every score. Finite, because WGSL guarantees nothing about infinities.
const LOWEST = -3.0e38;

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
{{ query_block() }}
    let base = block * {{ own_rows }}u;
{{ begin() }}
{{ ranges("key_ranges", "base", "p.queries") }}
{{ begins("q_begin", own_rows, "base", "p.queries", "p.heads", "head") }}
{{ zeros("o") }}
{% for i in range(tall) %}
    var most{{ i }} = LOWEST;
    var sum{{ i }} = 0.0; // sum of this thread's weights
{% endfor %}

    for (var key = start; key < end; key = key + {{ other_rows }}u) {
{{ begins("k_begin", other_rows, "key", "p.keys", "p.kv_heads", "kv_head") }}
{{ product("score", "q", "q_begin", "k", "k_begin") }}
{{ visible("key_ranges", "base", "p.queries", "key") }}
        var highest = vec4<f32>(LOWEST);
{% for i in range(tall) %}
        score{{ i }} = select(vec4<f32>(LOWEST), score{{ i }} * p.scale, visible{{ i }});
        highest.{{ "xyzw"[i] }} = max(max(score{{ i }}.x, score{{ i }}.y), max(score{{ i }}.z, score{{ i }}.w));
{% endfor %}
        workgroupBarrier();
        staged[{{ others_begin }}u + thread] = highest;
        workgroupBarrier();
        for (var i = 0u; i < {{ across }}u; i = i + 1u) {
            highest = max(highest, staged[{{ others_begin }}u + down * {{ across }}u + i]);
        }
{% for i in range(tall) %}
        {
            let now = max(most{{ i }}, highest.{{ "xyzw"[i] }});
            let shrink = exp(most{{ i }} - now);
            most{{ i }} = now;
            score{{ i }} = select(vec4<f32>(0.0), exp(score{{ i }} - vec4<f32>(now)), score{{ i }} > vec4<f32>(LOWEST));
            sum{{ i }} = sum{{ i }} * shrink + dot(score{{ i }}, vec4<f32>(1.0));
{% for j in range(quads) %}
            o{{ i }}_{{ j }} = o{{ i }}_{{ j }} * shrink;
{% endfor %}
        }
{% endfor %}
{{ stage_weights("score") }}
{{ gather("o", "v", "key", "end", "p.keys", "p.kv_heads", "kv_head") }}
    }

    workgroupBarrier();
    staged[thread] = vec4<f32>({% for i in range(4) %}{{ "sum" ~ i if i < tall else "0.0" }}{{ ", " if not loop.last }}{% endfor %});
    workgroupBarrier();
    var total = vec4<f32>(0.0);
    for (var i = 0u; i < {{ across }}u; i = i + 1u) {
        total = total + staged[down * {{ across }}u + i];
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
{{ store("o", "o", "inverse", "base", "p.queries", "p.heads", "head") }}
}
