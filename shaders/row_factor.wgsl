// factor[m] = the power of two that brings the largest |X[m, :]| into [2^13, 2^14).
//
// Floor: the 4 M K bytes of X over the bandwidth.

struct Params {
    first_group: u32,
    groups: u32,
    k: u32,
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> factor: array<f32>;

{% include "groups.wgsl" %}
{% include "factor.wgsl" %}

var<workgroup> partial: array<f32, {{ threads }}>;

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = group_index(workgroup, count);
    if (row >= p.groups) {
        return;
    }
    var largest = 0.0;
    for (var k = thread; k < p.k; k = k + {{ threads }}u) {
        largest = max(largest, abs(x[row * p.k + k]));
    }
    partial[thread] = largest;
    for (var step = {{ threads // 2 }}u; step > 0u; step = step >> 1u) {
        workgroupBarrier();
        if (thread < step) {
            partial[thread] = max(partial[thread], partial[thread + step]);
        }
    }
    if (thread == 0u) {
        factor[row] = factor_of(partial[0]);
    }
}
