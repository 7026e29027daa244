// dQ of attention, [M, H * D], for software drivers. Queries go over the keys that they see.
//
// P = exp(scale * Q * K^T - lse), dS = P * (dO * V^T - delta),
// dQ = scale * dS * K.
{% from "attention/shared/lane_rows.wgsl" import begin_queries, dots, add_up, zeros, eight %}
{% include "attention/shared/params.wgsl" %}
@group(0) @binding(0) var<storage, read> q: array<f32>;
@group(0) @binding(1) var<storage, read> k: array<f32>;
@group(0) @binding(2) var<storage, read> v: array<f32>;
@group(0) @binding(3) var<storage, read> d_o: array<f32>;
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>;      // for each query and head: lse, delta
@group(0) @binding(5) var<storage, read> key_ranges: array<vec2<u32>>; // for each query: first key, end
@group(0) @binding(6) var<storage, read_write> dq: array<f32>;

@compute @workgroup_size(8)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(subgroup_invocation_id) lane: u32,
) {
{{ begin_queries() }}
{% for r in range(rows) %}
    let stat{{ r }} = stats[query{{ r }} * p.heads + head];
{% endfor %}
{{ zeros("dq") }}
    for (var first = seen0.x; first < end; first = first + 8u) {
        let key = first + lane;
        let own = (min(key, p.keys - 1u) * p.kv_heads + kv_head) * {{ head_dim }}u;
{{ dots("score", "q", "row", "k", "own") }}
{{ dots("d_weight", "d_o", "row", "v", "own") }}
{% for r in range(rows) %}
        let visible{{ r }} = key >= seen{{ r }}.x && key < seen{{ r }}.y;
        let weight{{ r }} = select(0.0, exp(score{{ r }} * p.scale - stat{{ r }}.x), visible{{ r }});
        let d_score{{ r }} = weight{{ r }} * (d_weight{{ r }} - stat{{ r }}.y);
{% endfor %}
{{ eight("key", "first", "p.keys", "p.kv_heads", "kv_head") }}
{{ add_up("dq", "d_score", "k", "key") }}
    }

{% for r in range(rows) %}
    if (block * {{ rows }}u + {{ r }}u < p.queries) {
{% for d in range(head_dim // 8) %}
        dq[row{{ r }} + {{ 8 * d }}u + lane] = dq{{ r }}_{{ d }} * p.scale;
{% endfor %}
    }
{% endfor %}
}
