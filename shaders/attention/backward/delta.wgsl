// The backward of attention reads this for each query and head: stats[m, h] = (lse[m, h], sum over
// d of dO * O). `team` threads share a row.
//
// Floor: bytes of dO and O, 8 * M * H * D, over the memory's bandwidth; 2 * M * H * D FLOP.
{% import "shared/entry.wgsl" as entry %}

struct Params {
    first_group: u32,
    groups: u32,
    rows: u32,  // M * H
    quads: u32, // D / 4
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> d_o: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> o: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> lse: array<f32>;
@group(0) @binding(3) var<storage, read_write> stats: array<vec2<f32>>;

{% if team > 1 %}
var<workgroup> sums: array<f32, {{ threads }}>;
{% endif %}

{% call entry.each_group(threads) %}
    let row = group * {{ threads // team }}u + thread / {{ team }}u;
    let begin = min(row, p.rows - 1u) * p.quads;
    var sum = 0.0;
    for (var quad = thread % {{ team }}u; quad < p.quads; quad = quad + {{ team }}u) {
        sum = sum + dot(d_o[begin + quad], o[begin + quad]);
    }
{% if team > 1 %}
    sums[thread] = sum;
    workgroupBarrier();
    if (thread % {{ team }}u > 0u) {
        return;
    }
{% for i in range(1, team) %}
    sum = sum + sums[thread + {{ i }}u];
{% endfor %}
{% endif %}
    if (row < p.rows) { stats[row] = vec2<f32>(lse[row], sum); }
{% endcall %}
