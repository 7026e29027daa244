enable f16;
enable wgpu_cooperative_matrix;
// OUT [P, Q] = s * the sum over c of L[p, c] * R[c, q] by cooperative matrices, where P or Q is a rank: the products with an
// adapter's matrices and their gradients. A workgroup of four subgroups owns {{ "16 x 64" if wide else "64 x 16" }} of OUT, each of them 16 x 16, and a part of
// the contracted index; column_sum adds up the parts.
{% set left, right = {"along": left_along, "name": "left"}, {"along": right_along, "name": "right"} %}
//
// Operands are staged as f16 times powers of two. L is {{ "[P, C]: a factor a row" if left.along else "[C, P]: the factor that fits all rows of the part" }}; R is {{ "[Q, C]: a factor a row" if right.along else "[C, Q]: the factor that fits all rows of the part" }}.
{% from "coop.wgsl" import depth, enter, accumulators, multiply, store, least %}
{% set rows, columns = (16, 64) if wide else (64, 16) %}
{% set sum_stride = columns + 4 %}

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
@group(0) @binding(0) var<storage, read> left: array<f32>;
@group(0) @binding(1) var<storage, read> right: array<f32>;
@group(0) @binding(2) var<storage, read> left_factor: array<f32>;  // of each of its rows
@group(0) @binding(3) var<storage, read> right_factor: array<f32>; // of each of its rows
@group(0) @binding(4) var<storage, read_write> out: array<f32>;
{% if dropout != "none" %}

{% include "dropout.wgsl" %}
{% endif %}

{# [row of OUT][c] where the contracted index runs along memory, else [c][row of OUT]; padding spreads the banks. #}
{% set left_stride = (depth if left.along else rows) + 8 %}
{% set right_stride = (depth if right.along else columns) + 8 %}
var<workgroup> left_tile: array<f16, {{ (rows if left.along else depth) * left_stride }}>;
var<workgroup> right_tile: array<f16, {{ (columns if right.along else depth) * right_stride }}>;
var<workgroup> sums: array<f32, {{ rows * sum_stride }}>;
{% if not (left.along and right.along) %}
{{ least() }}
{% endif %}

{# Stages `width` rows or columns of OUT, from `base` to the last of `end`, by the contracted index from `start` on. Past the end
   of OUT the last one is repeated, past the part there are zeros. #}
{% macro stage(operand, width, base, end, stride) %}
        for (var i = thread; i < {{ width * depth }}u; i = i + {{ 4 * lanes }}u) {
{% if operand.along %}
            let c = i % {{ depth }}u;
            let own = min({{ base }} + i / {{ depth }}u, {{ end }} - 1u);
            let at = own * p.contracted + start + c;
            let to = i / {{ depth }}u * {{ stride }}u + c;
{% else %}
            let c = i / {{ width }}u;
            let own = min({{ base }} + i % {{ width }}u, {{ end }} - 1u);
            let at = (start + c) * {{ end }} + own;
            let to = c * {{ stride }}u + i % {{ width }}u;
{% endif %}
            var value = 0.0;
            if (start + c < part_end) {
                value = {{ operand.name }}[at] * {{ operand.name ~ "_factor[own]" if operand.along else operand.name ~ "_least" }};
{% if dropout == operand.name %}
                value = value * dropout_factor(at);
{% endif %}
            }
            {{ operand.name }}_tile[to] = f16(value);
        }
{% endmacro %}

@compute @workgroup_size({{ 4 * lanes }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
) {
{{ enter() }}
    let all_rows = group / p.column_groups;
    let part = all_rows / p.row_groups;
    let column_base = (group - all_rows * p.column_groups) * {{ columns }}u;
    let row_base = (all_rows - part * p.row_groups) * {{ rows }}u;
    let first = part * p.each;
    let part_end = min(first + p.each, p.contracted);
{% for operand in [left, right] if not operand.along %}
    var {{ operand.name }}_most = 0x1p126f;
    for (var c = first + thread; c < part_end; c = c + {{ 4 * lanes }}u) {
        {{ operand.name }}_most = min({{ operand.name }}_most, {{ operand.name }}_factor[c]);
    }
    let {{ operand.name }}_least = least_of({{ operand.name }}_most, subgroup);
{% endfor %}
    // Of this subgroup's piece.
    let left_begin = {{ "0u" if wide else "subgroup * " ~ (16 * left_stride if left.along else 16) ~ "u" }};
    let right_begin = {{ "subgroup * " ~ (16 * right_stride if right.along else 16) ~ "u" if wide else "0u" }};
{{ accumulators(edge, 16, 16) }}

    for (var start = first; start < part_end; start = start + {{ depth }}u) {
        workgroupBarrier();
{{ stage(left, rows, "row_base", "p.rows", left_stride) }}
{{ stage(right, columns, "column_base", "p.columns", right_stride) }}
        workgroupBarrier();
{{ multiply(edge, 16, 16,
    {"name": "left_tile", "begin": "left_begin", "stride": left_stride, "along": left.along},
    {"name": "right_tile", "begin": "right_begin", "stride": right_stride, "along": right.along}) }}
    }

    let sums_begin = subgroup * {{ 16 if wide else 16 * sum_stride }}u;
{{ store(edge, 0, 0, "sums", "sums_begin", sum_stride) }}
    workgroupBarrier();
    for (var i = thread; i < {{ rows * columns }}u; i = i + {{ 4 * lanes }}u) {
        let row = row_base + i / {{ columns }}u;
        let column = column_base + i % {{ columns }}u;
        if (row < p.rows && column < p.columns) {
            let undo = 1.0 / {{ "left_factor[row]" if left.along else "left_least" }} / {{ "right_factor[column]" if right.along else "right_least" }};
            let sum = sums[i / {{ columns }}u * {{ sum_stride }}u + i % {{ columns }}u];
            out[(part * p.rows + row) * p.columns + column] = p.scale * (sum * undo);
        }
    }
}
