enable f16;
enable wgpu_cooperative_matrix;
// OUT [P, Q] = s * the sum over c of L[p, c] * R[c, q] by cooperative matrices, where P or Q is a rank: the products with an
// adapter's matrices and their gradients. A workgroup of four subgroups owns {{ "16 x 64" if wide else "64 x 16" }} of OUT, each of them 16 x 16, and a part of
// the contracted index; column_sum adds up the parts.
{% set left, right = {"along": left_along, "name": "left"}, {"along": right_along, "name": "right"} %}
//
// Operands are staged as f16 times powers of two. L is {{ "[P, C]: a factor a row" if left.along else "[C, P]: the factor that fits all rows of the part" }}; R is {{ "[Q, C]: a factor a row" if right.along else "[C, Q]: the factor that fits all rows of the part" }}.
//
// Floor: the bytes of the larger operand over the memory's bandwidth, since a rank is small.
{% from "coop.wgsl" import depth, enter, accumulators, multiply, store, least %}
{% set rows, columns = (16, 64) if wide else (64, 16) %}
{% set threads = 4 * lanes %}
{% set sum_stride = columns + 4 %}
{# Rows of a tile are padded by 8 values, which spreads the banks. #}
{% set stride = depth + 8 %}

struct Params {
    first_group: u32,
    groups: u32,
    rows: u32,          // P
    columns: u32,       // Q
    contracted: u32,    // C
    each: u32,          // of them in a part
    row_groups: u32,    // workgroups along P
    column_groups: u32, // workgroups along Q
    scale: f32,         // s
    seed_low: u32,      // of the dropout
    seed_high: u32,
    drop_below: u32,    // a value whose hash is under this is dropped
    keep_scale: f32,    // 1: `scale` has it
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> left: array<{{ "vec4<f32>" if quads else "f32" }}>;
@group(0) @binding(1) var<storage, read> right: array<{{ "vec4<f32>" if quads else "f32" }}>;
@group(0) @binding(2) var<storage, read> left_factor: array<f32>;  // of each of its rows
@group(0) @binding(3) var<storage, read> right_factor: array<f32>; // of each of its rows
@group(0) @binding(4) var<storage, read_write> out: array<f32>;
{% if dropout != "none" %}

{% include "dropout.wgsl" %}
{% endif %}

// [row of OUT][c] and [column of OUT][c]
var<workgroup> left_tile: array<f16, {{ rows * stride }}>;
var<workgroup> right_tile: array<f16, {{ columns * stride }}>;
var<workgroup> sums: array<f32, {{ rows * sum_stride }}>;
{% if not (left.along and right.along) %}
{{ least() }}
{% endif %}

{# Four values of an operand, with dropout: along its own memory, from [own, c] on. Past its ends the last ones come again. #}
{% macro load4(operand, end) %}
fn {{ operand.name }}4(own: u32, c: u32) -> vec4<f32> {
{% set row, place, length = ("own", "c", "p.contracted") if operand.along else ("min(c, p.contracted - 1u)", "own", end) %}
{% if quads %}
    let at = {{ row }} * {{ length }} + min({{ place }}, {{ length }} - 4u);
    let values = {{ operand.name }}[at >> 2u];
{% if dropout == operand.name %}
    return values * vec4<f32>(dropout_factor(at), dropout_factor(at + 1u), dropout_factor(at + 2u), dropout_factor(at + 3u));
{% else %}
    return values;
{% endif %}
{% else %}
    let at = vec4<u32>({{ row }} * {{ length }}) + min(vec4<u32>({{ place }}) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>({{ length }} - 1u));
    let values = vec4<f32>({{ operand.name }}[at.x], {{ operand.name }}[at.y], {{ operand.name }}[at.z], {{ operand.name }}[at.w]);
{% if dropout == operand.name %}
    return values * vec4<f32>(dropout_factor(at.x), dropout_factor(at.y), dropout_factor(at.z), dropout_factor(at.w));
{% else %}
    return values;
{% endif %}
{% endif %}
}
{% endmacro %}
{{ load4(left, "p.rows") }}
{{ load4(right, "p.columns") }}

{# What a thread stages of an operand of `width` rows or columns of OUT: a quad along c, or quads of two neighbouring c, whose stores
   are pairs and fall into different banks. `when` guards those that have nothing to do. #}
{% macro place(operand, width, base, end) %}
{% set units = width * depth // (4 if operand.along else 8) %}
{% for i in range([units // threads, 1] | max) %}
        let {{ operand.name }}_unit{{ i }} = thread + {{ threads * i }}u;
{% if operand.along %}
        let {{ operand.name }}_c{{ i }} = {{ operand.name }}_unit{{ i }} % {{ depth // 4 }}u * 4u;
        let {{ operand.name }}_local{{ i }} = {{ operand.name }}_unit{{ i }} / {{ depth // 4 }}u;
        let {{ operand.name }}_own{{ i }} = min({{ base }} + {{ operand.name }}_local{{ i }}, {{ end }} - 1u);
        let {{ operand.name }}_first{{ i }} = {{ operand.name }}4({{ operand.name }}_own{{ i }}, start + {{ operand.name }}_c{{ i }});
{% else %}
        let {{ operand.name }}_c{{ i }} = {{ operand.name }}_unit{{ i }} % {{ depth // 2 }}u * 2u;
        let {{ operand.name }}_local{{ i }} = {{ operand.name }}_unit{{ i }} / {{ depth // 2 }}u * 4u;
        let {{ operand.name }}_first{{ i }} = {{ operand.name }}4({{ base }} + {{ operand.name }}_local{{ i }}, start + {{ operand.name }}_c{{ i }});
        let {{ operand.name }}_second{{ i }} = {{ operand.name }}4({{ base }} + {{ operand.name }}_local{{ i }}, start + {{ operand.name }}_c{{ i }} + 1u);
{% endif %}
{% endfor %}
{% endmacro %}
{# Stores that as f16. Past the part there are zeros. #}
{% macro stage(operand, width) %}
{% set units = width * depth // (4 if operand.along else 8) %}
{% for i in range([units // threads, 1] | max) %}
        {{ "if (" ~ operand.name ~ "_unit" ~ i ~ " < " ~ units ~ "u) " if units < threads }}{
            let c = start + {{ operand.name }}_c{{ i }};
{% if operand.along %}
            let values = select(vec4<f32>(0.0), {{ operand.name }}_first{{ i }} * {{ operand.name }}_factor[{{ operand.name }}_own{{ i }}], vec4<u32>(c) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(part_end));
            let to = {{ operand.name }}_local{{ i }} * {{ stride }}u + {{ operand.name }}_c{{ i }};
{% for e in range(4) %}
            {{ operand.name }}_tile[to + {{ e }}u] = f16(values.{{ "xyzw"[e] }});
{% endfor %}
{% else %}
            let first = select(vec4<f32>(0.0), {{ operand.name }}_first{{ i }} * {{ operand.name }}_least, c < part_end);
            let second = select(vec4<f32>(0.0), {{ operand.name }}_second{{ i }} * {{ operand.name }}_least, c + 1u < part_end);
            let to = {{ operand.name }}_local{{ i }} * {{ stride }}u + {{ operand.name }}_c{{ i }};
{% for e in range(4) %}
            {{ operand.name }}_tile[to + {{ e * stride }}u] = f16(first.{{ "xyzw"[e] }});
            {{ operand.name }}_tile[to + {{ e * stride + 1 }}u] = f16(second.{{ "xyzw"[e] }});
{% endfor %}
{% endif %}
        }
{% endfor %}
{% endmacro %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) subgroup_size: u32,
) {
{{ enter("out") }}
    let all_rows = group / p.column_groups;
    let part = all_rows / p.row_groups;
    let column_base = (group - all_rows * p.column_groups) * {{ columns }}u;
    let row_base = (all_rows - part * p.row_groups) * {{ rows }}u;
    let first = part * p.each;
    let part_end = min(first + p.each, p.contracted);
{% for operand in [left, right] if not operand.along %}
    var {{ operand.name }}_most = 0x1p126f;
    for (var c = first + thread; c < part_end; c = c + {{ threads }}u) {
        {{ operand.name }}_most = min({{ operand.name }}_most, {{ operand.name }}_factor[c]);
    }
    let {{ operand.name }}_least = least_of({{ operand.name }}_most, subgroup);
{% endfor %}
    // Of this subgroup's piece.
    let left_begin = {{ "0u" if wide else "subgroup * " ~ 16 * stride ~ "u" }};
    let right_begin = {{ "subgroup * " ~ 16 * stride ~ "u" if wide else "0u" }};
{{ accumulators(edge, 16, 16) }}

    for (var start = first; start < part_end; start = start + {{ depth }}u) {
        // Loads are under way before the barrier.
{{ place(left, rows, "row_base", "p.rows") }}
{{ place(right, columns, "column_base", "p.columns") }}
        workgroupBarrier();
{{ stage(left, rows) }}
{{ stage(right, columns) }}
        workgroupBarrier();
{{ multiply(edge, 16, 16,
    {"name": "left_tile", "begin": "left_begin", "stride": stride, "along": true, "unit": 1},
    {"name": "right_tile", "begin": "right_begin", "stride": stride, "along": true, "unit": 1}) }}
    }

    let sums_begin = subgroup * {{ 16 if wide else 16 * sum_stride }}u;
{{ store(edge, 0, 0, "sums", "sums_begin", sum_stride) }}
    workgroupBarrier();
    for (var i = thread; i < {{ rows * columns }}u; i = i + {{ threads }}u) {
        let row = row_base + i / {{ columns }}u;
        let column = column_base + i % {{ columns }}u;
        if (row < p.rows && column < p.columns) {
            let undo = 1.0 / {{ "left_factor[row]" if left.along else "left_least" }} / {{ "right_factor[column]" if right.along else "right_least" }};
            let sum = sums[i / {{ columns }}u * {{ sum_stride }}u + i % {{ columns }}u];
            out[(part * p.rows + row) * p.columns + column] = p.scale * (sum * undo);
        }
    }
}
