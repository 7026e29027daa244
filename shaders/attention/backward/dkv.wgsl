// dK and dV of attention, [keys, Hkv * D]. Each key goes over the queries that see it, in all
// heads that share the key.
//
// P = exp(scale * Q * K^T - lse), dS = P * (dO * V^T - delta),
// dV = P^T * dO, dK = scale * dS^T * Q.
//
// For software drivers. See attention_dkv_tile for the floor.
{% from "attention/shared/heads.wgsl" import key_block %}
{% from "attention/shared/dot_quads.wgsl" import dot_quads %}
{% include "attention/shared/row_parts.wgsl" %}
@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> d_o: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>;        // for each query and head: lse, delta
@group(0) @binding(5) var<storage, read> query_ranges: array<vec2<u32>>; // for each key: first query, end
@group(0) @binding(6) var<storage, read_write> dk: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> dv: array<vec4<f32>>;

@compute @workgroup_size({{ rows * parts }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
{{ key_block() }}
    let part = thread / {{ rows }}u;
    let row = block * {{ rows }}u + thread % {{ rows }}u;
    let key = min(row, p.keys - 1u);
    let seen_by = query_ranges[key];
    // Ranges don't move back from one key to the next, so these are the queries of all keys here.
    let start = query_ranges[block * {{ rows }}u].x;
    let end = query_ranges[min(block * {{ rows }}u + {{ rows - 1 }}u, p.keys - 1u)].y;

    let own = (key * p.kv_heads + kv_head) * {{ quads * parts }}u + part * {{ quads }}u;
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
        let row{{ t }} = min(query + {{ t }}u, p.queries - 1u) * p.heads + head;
        let at{{ t }} = row{{ t }} * {{ quads * parts }}u + part * {{ quads }}u;
{{ dot_quads("sums." ~ "xy"[t], "k", "q", "at" ~ t, quads) }}
{{ dot_quads("sums." ~ "zw"[t], "v", "d_o", "at" ~ t, quads) }}
{% endfor %}
        sums = over_parts(sums, thread);
{% for t in range(tile) %}
        {
            let stat = stats[row{{ t }}];
            let visible = query + {{ t }}u >= seen_by.x && query + {{ t }}u < seen_by.y;
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
}
