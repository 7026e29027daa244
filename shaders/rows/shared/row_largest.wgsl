// Operands of the kernels that scale rows of X [M, K], and the largest value of a row, which
// {{ team }} threads own.
struct Params {
    first_group: u32,
    groups: u32,
    k: u32,
    rows: u32,
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> x: array<{{ "vec4<f32>" if quads else "f32" }}>;
@group(0) @binding(1) var<storage, read_write> factor: array<f32>;

{% include "shared/factor.wgsl" %}

var<workgroup> partial: array<f32, {{ threads }}>;

// Largest absolute value of a row. All threads of a workgroup must call it.
fn largest_of(row: u32, lane: u32, thread: u32) -> f32 {
{% if quads %}
    let quads = p.k >> 2u;
    let base = row * quads;
    var most = vec4<f32>(0.0);
    for (var q = lane; q < quads; q = q + {{ 4 * team }}u) {
        // Four loads run at a time. Past the end the last quad is repeated, which changes no
        // maximum.
{% for i in range(4) %}
        let quad{{ i }} = abs(x[base + min(q + {{ i * team }}u, quads - 1u)]);
{% endfor %}
        most = max(most, max(max(quad0, quad1), max(quad2, quad3)));
    }
    let largest = max(max(most.x, most.y), max(most.z, most.w));
{% else %}
    var largest = 0.0;
    for (var k = lane; k < p.k; k = k + {{ team }}u) {
        largest = max(largest, abs(x[row * p.k + k]));
    }
{% endif %}
    partial[thread] = largest;
    for (var step = {{ team // 2 }}u; step > 0u; step = step >> 1u) {
        workgroupBarrier();
        if (lane < step) {
            partial[thread] = max(partial[thread], partial[thread + step]);
        }
    }
    workgroupBarrier();
    return partial[thread - lane];
}
