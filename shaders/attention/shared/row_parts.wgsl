{# Attention on software drivers without subgroups of eight. A workgroup owns `rows` rows (queries
   or keys) of one head. `parts` threads share a row, with `quads` vec4 of the head each, so that
   registers hold them. It goes over the other side `tile` rows at a time. #}
{% import "attention/shared/sides.wgsl" as sides %}

{# The block is what a thread does: its row, the range `seen` of the other side that the row sees,
   and from `start` to `end` what any row of the workgroup sees. The thread's part of the row begins
   at `own`. #}
{% macro each_row(side) %}
// {{ rows }} rows per workgroup, {{ parts }} threads per row, {{ 4 * quads }} values per thread.
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
    return of_part[row]
{%- for part in range(1, parts) %} + of_part[row + {{ part * rows }}u]{% endfor %};
{% else %}
    return value;
{% endif %}
}

{% set body = caller %}
{% call sides.each_block(side, rows * parts) %}
    let part = thread / {{ rows }}u;
    let row = block * {{ rows }}u + thread % {{ rows }}u;
    let {{ side.row }} = min(row, {{ side.count }} - 1u);
    let seen = {{ side.ranges }}[{{ side.row }}];
    let start = {{ side.ranges }}[block * {{ rows }}u].x;
    let last = min(block * {{ rows }}u + {{ rows - 1 }}u, {{ side.count }} - 1u);
    let end = {{ side.ranges }}[last].y;
    let own_row = {{ side.row }} * {{ side.heads }} + {{ side.head }};
    let own = own_row * {{ quads * parts }}u + part * {{ quads }}u;
{{ body() }}
{% endcall %}
{% endmacro %}

{# Row T of the other side's tile: its row `other_rowT` of a head, and the place `atT` of the
   thread's part of it. #}
{% macro other(side, t) %}
        let {{ side.row }}{{ t }} = min({{ side.row }} + {{ t }}u, {{ side.count }} - 1u);
        let other_row{{ t }} = {{ side.row }}{{ t }} * {{ side.heads }} + {{ side.head }};
        let at{{ t }} = other_row{{ t }} * {{ quads * parts }}u + part * {{ quads }}u;
{% endmacro %}

{# Whether the own row sees row T of the other side's tile. #}
{% macro visible(side, t) %}
            let other = {{ side.row }} + {{ t }}u;
            let visible = other >= seen.x && other < seen.y;
{% endmacro %}

{# result = the sum over i of left_i * right[at + i], over the thread's vec4. Two independent chains
   avoid waiting. #}
{% macro dot_quads(result, left, right, at) %}
        {
            var even = {{ left }}0 * {{ right }}[{{ at }}];
{% if quads > 1 %}
            var odd = {{ left }}1 * {{ right }}[{{ at }} + 1u];
{% endif %}
{% for i in range(2, quads) %}
{% set chain = "odd" if i % 2 else "even" %}
            {{ chain }} = {{ chain }} + {{ left }}{{ i }} * {{ right }}[{{ at }} + {{ i }}u];
{% endfor %}
            {{ result }} = dot({{ "even + odd" if quads > 1 else "even" }}, vec4<f32>(1.0));
        }
{% endmacro %}
