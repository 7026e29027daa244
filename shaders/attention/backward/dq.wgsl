// dQ of attention, [M, H * D]. Each query goes over the keys that it sees.
//
// P = exp(scale * Q * K^T - lse), dS = P * (dO * V^T - delta),
// dQ = scale * dS * K.
//
// For software drivers. See attention_dq_tile for the floor.
{% from "attention/shared/heads.wgsl" import query_block %}
{% from "attention/shared/dot_quads.wgsl" import dot_quads %}
{% include "attention/shared/row_parts.wgsl" %}
@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> d_o: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>;      // for each query and head: lse, delta
@group(0) @binding(5) var<storage, read> key_ranges: array<vec2<u32>>; // for each query: first key, end
@group(0) @binding(6) var<storage, read_write> dq: array<vec4<f32>>;

@compute @workgroup_size({{ rows * parts }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
{{ query_block() }}
    let part = thread / {{ rows }}u;
    let row = block * {{ rows }}u + thread % {{ rows }}u;
    let query = min(row, p.queries - 1u);
    let seen = key_ranges[query];
    // Ranges don't move back from one query to the next, so these are the keys of all queries
    // here.
    let start = key_ranges[block * {{ rows }}u].x;
    let end = key_ranges[min(block * {{ rows }}u + {{ rows - 1 }}u, p.queries - 1u)].y;

    let stat = stats[query * p.heads + head];
    let own = (query * p.heads + head) * {{ quads * parts }}u + part * {{ quads }}u;
{% for i in range(quads) %}
    let q{{ i }} = q[own + {{ i }}u] * p.scale;
    let do{{ i }} = d_o[own + {{ i }}u];
    var dq{{ i }} = vec4<f32>(0.0);
{% endfor %}
    for (var key = start; key < end; key = key + {{ tile }}u) {
        // First scores, then gradients of the weights.
        var sums = vec4<f32>(0.0);
{% for t in range(tile) %}
        let at{{ t }} = (min(key + {{ t }}u, p.keys - 1u) * p.kv_heads + kv_head) * {{ quads * parts }}u + part * {{ quads }}u;
{{ dot_quads("sums." ~ "xy"[t], "q", "k", "at" ~ t, quads) }}
{{ dot_quads("sums." ~ "zw"[t], "do", "v", "at" ~ t, quads) }}
{% endfor %}
        sums = over_parts(sums, thread);
{% for t in range(tile) %}
        {
            let visible = key + {{ t }}u >= seen.x && key + {{ t }}u < seen.y;
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
}
