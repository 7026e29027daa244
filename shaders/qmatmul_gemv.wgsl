// Y = X * W^T + bias + s * H * B^T for few rows of X ({{ tokens }} at most): a matrix-vector product, bound by reading W once.
//
// A team (a subgroup, or {{ team }} threads) owns a row of W at a time; its lanes stride K by eight weights.
{% if subgroups %}
// A workgroup does {{ rows }} rows of W whatever the size of its subgroups.
{% endif %}

{% include "qmatmul.wgsl" %}
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

{% include "groups.wgsl" %}
{% include "matrix.wgsl" %}
{% set operand = "x" %}
{% include "rows.wgsl" %}
{% include "reduce.wgsl" %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
{% if subgroups %}
    @builtin(subgroup_id) team_id: u32,
    @builtin(num_subgroups) teams: u32,
    @builtin(subgroup_size) team_size: u32,
    @builtin(subgroup_invocation_id) lane: u32,
{% endif %}
) {
{% if not subgroups %}
    let team_id = thread / {{ team }}u;
    let teams = {{ threads // team }}u;
    let team_size = {{ team }}u;
    let lane = thread % {{ team }}u;
{% endif %}
    let group = group_index(workgroup, count);
    if (group >= p.groups) {
        return;
    }
{% for t in range(tokens) %}
    let row{{ t }} = p.row + min({{ t }}u, p.rows - 1u);
{% endfor %}
    let words = (p.k + 7u) >> 3u;
    for (var i = 0u; i < {{ rows }}u; i = i + teams) {
        // Teams past the last row work on it again and do not store.
        let wanted = group * {{ rows }}u + i + team_id;
        let n = min(wanted, p.n - 1u);
{% for t in range(tokens) %}
        var y{{ t }} = 0.0;
{% endfor %}
        for (var g = lane; g < words; g = g + team_size) {
            let weights = weights8(n, g);
{% for t in range(tokens) %}
            y{{ t }} = y{{ t }} + (dot(x4(row{{ t }}, 2u * g), weights.lo) + dot(x4(row{{ t }}, 2u * g + 1u), weights.hi));
{% endfor %}
        }
        for (var j = lane; j < p.rank; j = j + team_size) {
            let scaled = b[(p.column + n) * p.rank + j] * p.lora_scale;
{% for t in range(tokens) %}
            y{{ t }} = y{{ t }} + h[row{{ t }} * p.rank + j] * scaled;
{% endfor %}
        }
        let mine = lane == 0u && i + team_id < {{ rows }}u && wanted < p.n;
        var offset = 0.0;
        if (mine && p.has_bias != 0u) {
            offset = bias[p.column + n];
        }
{% for t in range(tokens) %}
        let sum{{ t }} = team_sum(y{{ t }}, thread);
        if (mine && {{ t }}u < p.rows) {
            y[row{{ t }} * p.y_stride + p.column + n] = sum{{ t }} + offset;
        }
{% endfor %}
    }
}
