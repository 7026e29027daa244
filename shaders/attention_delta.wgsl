// What the backward of attention wants of each query and head: stats[m, h] = (lse[m, h], sum over d of dO * O).
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

{% include "groups.wgsl" %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let group = group_index(workgroup, count);
    let row = group * {{ threads }}u + thread;
    if (group >= p.groups || row >= p.rows) {
        return;
    }
    var sum = 0.0;
    for (var quad = 0u; quad < p.quads; quad = quad + 1u) {
        sum = sum + dot(d_o[row * p.quads + quad], o[row * p.quads + quad]);
    }
    stats[row] = vec2<f32>(lse[row], sum);
}
