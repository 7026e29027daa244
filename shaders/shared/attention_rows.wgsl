// Parameters of the attention kernels, `AttentionParams` in src/kernels/attention.rs, and how their threads share work:
// a workgroup owns {{ rows }} rows (queries, or keys) of one head; {{ parts }} threads share a row, {{ 4 * quads }} of the
// head's {{ 4 * quads * parts }} values each, so that registers hold them.
struct Params {
    first_group: u32,
    groups: u32,
    queries: u32,   // M, rows of Q and O
    keys: u32,      // rows of K and V
    heads: u32,     // H
    kv_heads: u32,  // of K and V; as many query heads in a row share one as H has of them
    scale: f32,     // of the scores
    no_key: f32,    // log-sum-exp of a query that sees no key: minus infinity, which WGSL cannot spell
}

{{ param_space }} p: Params;

{% include "groups.wgsl" %}

{% if parts > 1 %}
var<workgroup> of_part: array<vec4<f32>, {{ rows * parts }}>;
{% endif %}

// The sum of `value` over the threads that share this thread's row; all threads of the workgroup call together.
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
