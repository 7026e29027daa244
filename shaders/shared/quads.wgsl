// One invocation for every four values: the including shader's `quad(i)` handles values 4i to 4i +
// 3. Buffers end at whole quads, so the last one is always read and written whole. Include after
// `Params`, which holds `quads`.
{% include "groups.wgsl" %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let group = group_index(workgroup, count);
    let i = group * {{ threads }}u + thread;
    if (group < p.groups && i < p.quads) {
        quad(i);
    }
}
