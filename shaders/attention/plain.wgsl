// O = softmax(scale * Q * K^T) * V for the keys that each query sees, and the log-sum-exp of its
// scores: Q and O [M, H * D], K and V [keys, Hkv * D], lse [M, H]. Online softmax goes key after
// key, so a query's result does not depend on where its keys lie among other keys. For software
// drivers. See attention_tile for the floor.
{% from "attention/shared/heads.wgsl" import query_block %}
{% from "attention/shared/dot_quads.wgsl" import dot_quads %}
{% include "attention/shared/row_parts.wgsl" %}
@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> key_ranges: array<vec2<u32>>; // for each query: first key, end
@group(0) @binding(4) var<storage, read_write> o: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> lse: array<f32>;

// Below every score. Finite, because WGSL guarantees nothing about infinities.
const LOWEST = -3.0e38;

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

    let own = (query * p.heads + head) * {{ quads * parts }}u + part * {{ quads }}u;
{% for i in range(quads) %}
    let q{{ i }} = q[own + {{ i }}u] * p.scale;
    var o{{ i }} = vec4<f32>(0.0);
{% endfor %}
    var most = LOWEST;
    var sum = 0.0;
    for (var key = start; key < end; key = key + {{ tile }}u) {
        var scores = vec4<f32>(0.0);
{% for t in range(tile) %}
        let at{{ t }} = (min(key + {{ t }}u, p.keys - 1u) * p.kv_heads + kv_head) * {{ quads * parts }}u + part * {{ quads }}u;
{{ dot_quads("scores." ~ "xyzw"[t], "q", "k", "at" ~ t, quads) }}
{% endfor %}
        scores = over_parts(scores, thread);
{% for t in range(tile) %}
        {
            let visible = key + {{ t }}u >= seen.x && key + {{ t }}u < seen.y;
            let score = select(LOWEST, scores.{{ "xyzw"[t] }}, visible);
            if (score > most) {
                let shrink = exp(most - score);
                most = score;
                sum = sum * shrink;
{% for i in range(quads) %}
                o{{ i }} = o{{ i }} * shrink;
{% endfor %}
            }
            let weight = select(0.0, exp(score - most), visible);
            sum = sum + weight;
{% for i in range(quads) %}
            o{{ i }} = o{{ i }} + weight * v[at{{ t }} + {{ i }}u];
{% endfor %}
        }
{% endfor %}
    }

    if (row < p.queries) {
        let none = sum == 0.0;
        let inverse = select(1.0 / sum, 0.0, none);
{% for i in range(quads) %}
        o[own + {{ i }}u] = o{{ i }} * inverse;
{% endfor %}
        if (part == 0u) {
            lse[query * p.heads + head] = select(most + log(sum), p.no_key, none);
        }
    }
}
