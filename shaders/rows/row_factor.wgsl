// factor[m] = the power of two that brings the largest |X[m, :]| into [2^13, 2^14). {{ team }}
// threads own a row.
//
// Floor: the 4 M K bytes of X over the bandwidth.

{% include "rows/shared/row_largest.wgsl" %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let group = group_index(workgroup, count);
    if (group >= p.groups) {
        return;
    }
    let own = group * {{ threads // team }}u + thread / {{ team }}u;
    let lane = thread % {{ team }}u;
    let largest = largest_of(min(own, p.rows - 1u), lane, thread);
    if (lane == 0u && own < p.rows) {
        factor[own] = factor_of(largest);
    }
}
