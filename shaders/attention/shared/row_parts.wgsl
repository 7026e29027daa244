// Division of work: a workgroup owns {{ rows }} rows (queries or keys) of one head. {{ parts }}
// threads share a row, with {{ 4 * quads }} of the head's {{ 4 * quads * parts }} values each, so
// that registers hold them.
{% include "attention/shared/params.wgsl" %}

{% if parts > 1 %}
var<workgroup> of_part: array<vec4<f32>, {{ rows * parts }}>;
{% endif %}

// Sums `value` over the threads that share this thread's row. All threads of the workgroup must
// call it together.
fn over_parts(value: vec4<f32>, thread: u32) -> vec4<f32> {
{% if parts > 1 %}
    workgroupBarrier();
    of_part[thread] = value;
    workgroupBarrier();
    let row = thread % {{ rows }}u;
    return {% for part in range(parts) %}of_part[row + {{ part * rows }}u]{{ " + " if not loop.last }}{% endfor %};
{% else %}
    return value;
{% endif %}
}
