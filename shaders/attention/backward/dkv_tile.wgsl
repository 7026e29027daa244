// dK and dV of attention, [keys, Hkv * D]. Keys go over tiles of the queries that see them, in all
// heads that share the keys.
//
// P = exp(scale * Q * K^T - lse), dS = P * (dO * V^T - delta),
// dV = P^T * dO, dK = scale * dS^T * Q.
//
// Floor: bytes of Q, dO, K, V, dK and dV, 8 * D * (M * H + 2 * keys * Hkv), over the memory's
// bandwidth; 8 * H * D FLOP per pair of a query and a key that it sees (M * keys pairs, half of
// them in causal order) over the rate of f32.
{{ "" }}
{% from "attention/shared/heads.wgsl" import key_block %}
{% from "attention/shared/thread_tiles.wgsl" import across, quads, own_rows, other_rows, threads, staged_quads, begin, begins, product, stage_weights, gather, store, zeros, ranges, visible %}
{# Values of this thread's four queries. #}
{% macro of_others(array, part) -%}
vec4<f32>({% for t in range(4) %}{{ array }}[min(query + 4u * across + {{ t }}u, p.queries - 1u) * p.heads + head].{{ part }}{{ ", " if not loop.last }}{% endfor %})
{%- endmacro %}
{% include "attention/shared/params.wgsl" %}
@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> d_o: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>;        // for each query and head: lse, delta
@group(0) @binding(5) var<storage, read> query_ranges: array<vec2<u32>>; // for each key: first query, end
@group(0) @binding(6) var<storage, read_write> dk: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> dv: array<vec4<f32>>;

// Tiles of both sides, later weights and dO, or gradients of scores and Q.
var<workgroup> staged: array<vec4<f32>, {{ staged_quads }}>;

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
{{ key_block() }}
    let base = block * {{ own_rows }}u;
{{ begin() }}
{{ ranges("query_ranges", "base", "p.keys") }}
{{ begins("k_begin", own_rows, "base", "p.keys", "p.kv_heads", "kv_head") }}
{{ zeros("dk") }}
{{ zeros("dv") }}

    for (var head = kv_head * heads; head < (kv_head + 1u) * heads; head = head + 1u) {
    for (var query = start; query < end; query = query + {{ other_rows }}u) {
{{ begins("q_begin", other_rows, "query", "p.queries", "p.heads", "head") }}
{{ product("weight", "k", "k_begin", "q", "q_begin") }}
        workgroupBarrier();
        {
            let lse = {{ of_others("stats", "x") }};
{{ visible("query_ranges", "base", "p.keys", "query") }}
{% for i in range(tall) %}
        weight{{ i }} = select(vec4<f32>(0.0), exp(weight{{ i }} * p.scale - lse), visible{{ i }});
{% endfor %}
        }
{{ stage_weights("weight") }}
{{ gather("dv", "d_o", "query", "end", "p.queries", "p.heads", "head") }}
{{ product("d_weight", "v", "k_begin", "d_o", "q_begin") }}
        workgroupBarrier();
        let delta = {{ of_others("stats", "y") }};
{% for i in range(tall) %}
        weight{{ i }} = weight{{ i }} * (d_weight{{ i }} - delta);
{% endfor %}
{{ stage_weights("weight") }}
{{ gather("dk", "q", "query", "end", "p.queries", "p.heads", "head") }}
    }
    }

{% for i in range(tall) %}
    let scale{{ i }} = p.scale;
    let one{{ i }} = 1.0;
{% endfor %}
{{ store("dk", "dk", "scale", "base", "p.keys", "p.kv_heads", "kv_head") }}
{{ store("dv", "dv", "one", "base", "p.keys", "p.kv_heads", "kv_head") }}
}
