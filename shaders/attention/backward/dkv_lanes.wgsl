// dK and dV of attention, [keys, Hkv * D], for software drivers. Keys go over the queries that see
// them, in all heads that share the keys.
//
// P = exp(scale * Q * K^T - lse), dS = P * (dO * V^T - delta),
// dV = P^T * dO, dK = scale * dS^T * Q.
{% from "attention/shared/heads.wgsl" import key_block %}
{% from "attention/shared/lane_rows.wgsl" import dots, add_up, zeros, eight %}
{% include "attention/shared/params.wgsl" %}
@group(0) @binding(0) var<storage, read> q: array<f32>;
@group(0) @binding(1) var<storage, read> k: array<f32>;
@group(0) @binding(2) var<storage, read> v: array<f32>;
@group(0) @binding(3) var<storage, read> d_o: array<f32>;
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>;        // for each query and head: lse, delta
@group(0) @binding(5) var<storage, read> query_ranges: array<vec2<u32>>; // for each key: first query, end
@group(0) @binding(6) var<storage, read_write> dk: array<f32>;
@group(0) @binding(7) var<storage, read_write> dv: array<f32>;

@compute @workgroup_size(8)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(subgroup_invocation_id) lane: u32,
) {
{{ key_block() }}
{% for r in range(rows) %}
    let key{{ r }} = min(block * {{ rows }}u + {{ r }}u, p.keys - 1u);
    let seen_by{{ r }} = query_ranges[key{{ r }}];
    let row{{ r }} = (key{{ r }} * p.kv_heads + kv_head) * {{ head_dim }}u;
{% endfor %}
{{ zeros("dk") }}
{{ zeros("dv") }}
    // Ranges don't move back from one key to the next, so these are the queries of all keys here.
    let end = seen_by{{ rows - 1 }}.y;
    for (var head = kv_head * heads; head < (kv_head + 1u) * heads; head = head + 1u) {
    for (var first = seen_by0.x; first < end; first = first + 8u) {
        let query = first + lane;
        let at = min(query, p.queries - 1u) * p.heads + head;
        let stat = stats[at];
        let own = at * {{ head_dim }}u;
{{ dots("score", "k", "row", "q", "own") }}
{{ dots("d_weight", "v", "row", "d_o", "own") }}
{% for r in range(rows) %}
        let visible{{ r }} = query >= seen_by{{ r }}.x && query < seen_by{{ r }}.y;
        let weight{{ r }} = select(0.0, exp(score{{ r }} * p.scale - stat.x), visible{{ r }});
        let d_score{{ r }} = weight{{ r }} * (d_weight{{ r }} - stat.y);
{% endfor %}
{{ eight("query", "first", "p.queries", "p.heads", "head") }}
{{ add_up("dv", "weight", "d_o", "query") }}
{{ add_up("dk", "d_score", "q", "query") }}
    }
    }

{% for r in range(rows) %}
    if (block * {{ rows }}u + {{ r }}u < p.keys) {
{% for d in range(head_dim // 8) %}
        dk[row{{ r }} + {{ 8 * d }}u + lane] = dk{{ r }}_{{ d }} * p.scale;
        dv[row{{ r }} + {{ 8 * d }}u + lane] = dv{{ r }}_{{ d }};
{% endfor %}
    }
{% endfor %}
}
