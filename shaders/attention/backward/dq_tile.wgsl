// dQ of attention, [M, H * D]. Queries go over tiles of the keys that they see.
//
// P = exp(scale * Q * K^T - lse), dS = P * (dO * V^T - delta),
// dQ = scale * dS * K.
//
// Floor: bytes of Q, dO, dQ, K and V, 4 * D * (3 * M * H + 2 * keys * Hkv), over the memory's
// bandwidth; 6 * H * D FLOP per pair of a query and a key that it sees (M * keys pairs, half of
// them in causal order) over the rate of f32.
{{ "" }}
{% from "attention/shared/heads.wgsl" import query_block %}
{% from "attention/shared/thread_tiles.wgsl" import across, quads, own_rows, other_rows, threads, staged_quads, begin, begins, product, stage_weights, gather, store, zeros, ranges, visible %}
{% include "attention/shared/params.wgsl" %}
@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> d_o: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>;      // for each query and head: lse, delta
@group(0) @binding(5) var<storage, read> key_ranges: array<vec2<u32>>; // for each query: first key, end
@group(0) @binding(6) var<storage, read_write> dq: array<vec4<f32>>;

// Tiles of both sides, later gradients of scores and K.
var<workgroup> staged: array<vec4<f32>, {{ staged_quads }}>;

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
{{ zeros("dq") }}
{% for i in range(tall) %}
    let stat{{ i }} = stats[min(base + down * {{ tall }}u + {{ i }}u, p.queries - 1u) * p.heads + head];
{% endfor %}

    for (var key = start; key < end; key = key + {{ other_rows }}u) {
{{ begins("k_begin", other_rows, "key", "p.keys", "p.kv_heads", "kv_head") }}
{{ product("weight", "q", "q_begin", "k", "k_begin") }}
        {
{{ visible("key_ranges", "base", "p.queries", "key") }}
{% for i in range(tall) %}
        weight{{ i }} = select(vec4<f32>(0.0), exp(weight{{ i }} * p.scale - vec4<f32>(stat{{ i }}.x)), visible{{ i }});
{% endfor %}
        }
{{ product("d_weight", "d_o", "q_begin", "v", "k_begin") }}
        workgroupBarrier();
{% for i in range(tall) %}
        weight{{ i }} = weight{{ i }} * (d_weight{{ i }} - vec4<f32>(stat{{ i }}.y));
{% endfor %}
{{ stage_weights("weight") }}
{{ gather("dq", "k", "key", "end", "p.keys", "p.kv_heads", "kv_head") }}
    }

{% for i in range(tall) %}
    let scale{{ i }} = p.scale;
{% endfor %}
{{ store("dq", "dq", "scale", "base", "p.queries", "p.heads", "head") }}
}
