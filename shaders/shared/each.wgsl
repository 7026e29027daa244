// One invocation for each i below `{{ count }}`: the including shader's `{{ each }}(i)` handles it.
// Include after `Params`.
{% include "shared/groups.wgsl" %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let group = group_index(workgroup, count);
    let i = group * {{ threads }}u + thread;
    if (group < p.groups && i < {{ count }}) {
        {{ each }}(i);
    }
}
