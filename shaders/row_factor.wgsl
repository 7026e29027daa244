// factor[m] = the power of two that brings the largest |X[m, :]| into [2^13, 2^14), where f16 is most exact and a
// product with W (near 2^8) stays far from overflow in f32. 2^126 for a row of zeros and subnormals, which a driver may flush.

struct Params {
    first_group: u32,
    groups: u32,
    k: u32,
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> factor: array<f32>;

{% include "groups.wgsl" %}

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
        // Biased exponents: that of the largest value, and that of the factor, kept within the normal numbers.
        let exponent = i32(bitcast<u32>(partial[0]) >> 23u) & 255;
        let wanted = clamp(127 + 13 + 127 - exponent, 1, 253);
        factor[row] = bitcast<f32>(u32(wanted) << 23u);
    }
}
