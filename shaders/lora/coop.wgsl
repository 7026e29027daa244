enable f16;
enable wgpu_cooperative_matrix;
// OUT [P, Q] = s * the sum over c of L[p, c] * R[c, q] by cooperative matrices, where P or Q is a
// rank: the products with an adapter's matrices, and their gradients. A workgroup of four
// subgroups owns {{ "16 x 64" if wide else "64 x 16" }} of OUT, each subgroup 16 x 16, for a part
// of the contracted index. column_sum adds up the parts.
{% from "shared/coop.wgsl" import depth, enter, accumulators, multiply, store, least %}
{% set threads = 4 * lanes %}
{% set rows, columns = (16, 64) if wide else (64, 16) %}
{# The unit that a thread stages of an operand: a quad along c, or quads of two neighbouring c,
   which it stores as pairs that use different banks. `units`: number of units in the workgroup's
   tile. #}
{% set left_units, right_units = rows * depth // (4 if left_along else 8), columns * depth // (4 if right_along else 8) %}
{% set left = {"name": "left", "along": left_along, "rows": "p.rows", "width": rows, "units": left_units, "each": [left_units // threads, 1] | max} %}
{% set right = {"name": "right", "along": right_along, "rows": "p.columns", "width": columns, "units": right_units, "each": [right_units // threads, 1] | max} %}
{% set given, own = (left, right) if large == "left" else (right, left) %}
//
// Operands are staged as f16, multiplied by powers of two: one per row for [P, C] or [Q, C], and
// one that fits the whole part for [C, P] or [C, Q]. The larger operand,
// {{ given.name | upper }}, has row factors that other kernels share. The factors of
// {{ own.name | upper }} are computed here, for the part that is read.
//
// Floor: the bytes of the larger operand over the memory's bandwidth, because a rank is small.
{% set sum_stride = columns + 4 %}
{# Rows of a tile are padded by 8 values, which spreads the banks. #}
{% set stride = depth + 8 %}

struct Params {
    first_group: u32,
    groups: u32,
    rows: u32,          // P
    columns: u32,       // Q
    contracted: u32,    // C
    each: u32,          // contracted values per part
    row_groups: u32,    // workgroups along P
    column_groups: u32, // workgroups along Q
    scale: f32,         // s
    seed_low: u32,      // of the dropout
    seed_high: u32,
    drop_below: u32,    // values with a hash below this are dropped
    keep_scale: f32,    // 1: `scale` includes it
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> left: array<{{ "vec4<f32>" if quads else "f32" }}>;
@group(0) @binding(1) var<storage, read> right: array<{{ "vec4<f32>" if quads else "f32" }}>;
@group(0) @binding(2) var<storage, read> factor: array<f32>; // for each row of {{ given.name }}
@group(0) @binding(3) var<storage, read_write> out: array<f32>;
{% include "shared/factor.wgsl" %}
{% if dropout %}

{% include "shared/dropout.wgsl" %}
{% endif %}

// [row of OUT][c] and [column of OUT][c]
var<workgroup> left_tile: array<f16, {{ rows * stride }}>;
var<workgroup> right_tile: array<f16, {{ columns * stride }}>;
var<workgroup> sums: array<f32, {{ rows * sum_stride }}>;
{% if own.along %}
var<workgroup> found: array<f32, {{ own.width }}>; // factors of the rows of {{ own.name }}
{% endif %}
{% if not (left.along and right.along) %}
{{ least() }}
{% endif %}

{# Four values of an operand along its own memory, from [own, c] on, with dropout. Past the ends
   the last values are repeated. #}
{% macro load4(operand) %}
fn {{ operand.name }}4(own: u32, c: u32) -> vec4<f32> {
{% set row, place, length = ("own", "c", "p.contracted") if operand.along else ("min(c, p.contracted - 1u)", "own", operand.rows) %}
{% if quads %}
    let at = {{ row }} * {{ length }} + min({{ place }}, {{ length }} - 4u);
    let values = {{ operand.name }}[at >> 2u];
{% if dropout and operand.name == large %}
    return values * vec4<f32>(dropout_factor(at), dropout_factor(at + 1u), dropout_factor(at + 2u), dropout_factor(at + 3u));
{% else %}
    return values;
{% endif %}
{% else %}
    let at = vec4<u32>({{ row }} * {{ length }}) + min(vec4<u32>({{ place }}) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>({{ length }} - 1u));
    let values = vec4<f32>({{ operand.name }}[at.x], {{ operand.name }}[at.y], {{ operand.name }}[at.z], {{ operand.name }}[at.w]);
{% if dropout and operand.name == large %}
    return values * vec4<f32>(dropout_factor(at.x), dropout_factor(at.y), dropout_factor(at.z), dropout_factor(at.w));
{% else %}
    return values;
{% endif %}
{% endif %}
}
{% endmacro %}
{{ load4(left) }}
{{ load4(right) }}

{# Places of a thread's units of an operand. #}
{% macro place(operand) %}
{% for i in range(operand.each) %}
    let {{ operand.name }}_unit{{ i }} = thread + {{ threads * i }}u;
{% if operand.along %}
    let {{ operand.name }}_c{{ i }} = {{ operand.name }}_unit{{ i }} % {{ depth // 4 }}u * 4u;
    let {{ operand.name }}_local{{ i }} = {{ operand.name }}_unit{{ i }} / {{ depth // 4 }}u;
    let {{ operand.name }}_own{{ i }} = min({{ operand.name }}_base + {{ operand.name }}_local{{ i }}, {{ operand.rows }} - 1u);
{% else %}
    let {{ operand.name }}_c{{ i }} = {{ operand.name }}_unit{{ i }} % {{ depth // 2 }}u * 2u;
    let {{ operand.name }}_local{{ i }} = {{ operand.name }}_unit{{ i }} / {{ depth // 2 }}u * 4u;
    let {{ operand.name }}_own{{ i }} = {{ operand.name }}_base + {{ operand.name }}_local{{ i }};
{% endif %}
{% endfor %}
{% endmacro %}
{# Loads a thread's units, from `start` on. #}
{% macro fetch(operand) %}
{% for i in range(operand.each) %}
        let {{ operand.name }}_first{{ i }} = {{ operand.name }}4({{ operand.name }}_own{{ i }}, start + {{ operand.name }}_c{{ i }});
{% if not operand.along %}
        let {{ operand.name }}_second{{ i }} = {{ operand.name }}4({{ operand.name }}_own{{ i }}, start + {{ operand.name }}_c{{ i }} + 1u);
{% endif %}
{% endfor %}
{% endmacro %}
{# A guard for threads without work. #}
{% macro within(operand, i) -%}
{% if operand.units < threads %}if ({{ operand.name }}_unit{{ i }} < {{ operand.units }}u) {% endif %}
{%- endmacro %}
{# Stores a thread's units as f16, with zeros past the part. #}
{% macro stage(operand) %}
{% for i in range(operand.each) %}
        {{ within(operand, i) }}{
            let c = start + {{ operand.name }}_c{{ i }};
            let to = {{ operand.name }}_local{{ i }} * {{ stride }}u + {{ operand.name }}_c{{ i }};
{% if operand.along %}
            let values = select(vec4<f32>(0.0), {{ operand.name }}_first{{ i }} * {{ operand.name }}_factor{{ i }}, vec4<u32>(c) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(part_end));
{% for e in range(4) %}
            {{ operand.name }}_tile[to + {{ e }}u] = f16(values.{{ "xyzw"[e] }});
{% endfor %}
{% else %}
            let first = select(vec4<f32>(0.0), {{ operand.name }}_first{{ i }} * {{ operand.name }}_least, c < part_end);
            let second = select(vec4<f32>(0.0), {{ operand.name }}_second{{ i }} * {{ operand.name }}_least, c + 1u < part_end);
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
    let right_base = (group - all_rows * p.column_groups) * {{ columns }}u;
    let left_base = (all_rows - part * p.row_groups) * {{ rows }}u;
    let first = part * p.each;
    let part_end = min(first + p.each, p.contracted);
{{ place(left) }}
{{ place(right) }}

    // Factors of {{ given.name }}.
{% if given.along %}
{% for i in range(given.each) %}
    let {{ given.name }}_factor{{ i }} = factor[{{ given.name }}_own{{ i }}];
{% endfor %}
{% else %}
    var smallest = 0x1p126f;
    for (var c = first + thread; c < part_end; c = c + {{ threads }}u) {
        smallest = min(smallest, factor[c]);
    }
    let {{ given.name }}_least = least_of(smallest, subgroup);
{% endif %}

    // Factors of {{ own.name }}, from the values that this thread will stage. A part consists of
    // whole stages; past its end the last value is repeated.
{% for i in range(own.each) %}
    var most{{ i }} = vec4<f32>(0.0);
{% endfor %}
{# A few loads run at a time. #}
{% set ahead = [4 // own.each, 1] | max %}
    let last_start = first + (part_end - 1u - first) / {{ depth }}u * {{ depth }}u;
    for (var begin = first; begin < part_end; begin = begin + {{ ahead * depth }}u) {
{% for j in range(ahead) %}
        {
            let start = min(begin + {{ j * depth }}u, last_start);
{{ fetch(own) }}
{% for i in range(own.each) %}
            most{{ i }} = max(most{{ i }}, {{ "abs(" ~ own.name ~ "_first" ~ i ~ ")" if own.along else "max(abs(" ~ own.name ~ "_first" ~ i ~ "), abs(" ~ own.name ~ "_second" ~ i ~ "))" }});
{% endfor %}
        }
{% endfor %}
    }
{% for i in range(own.each) %}
    let largest{{ i }} = max(max(most{{ i }}.x, most{{ i }}.y), max(most{{ i }}.z, most{{ i }}.w));
{% endfor %}
{% if own.along %}
{% for i in range(own.each) %}
    {{ within(own, i) }}{
        sums[{{ own.name }}_unit{{ i }}] = largest{{ i }};
    }
{% endfor %}
    workgroupBarrier();
    for (var row = thread; row < {{ own.width }}u; row = row + {{ threads }}u) {
        var largest = 0.0;
        for (var i = 0u; i < {{ depth // 4 }}u; i = i + 1u) {
            largest = max(largest, sums[row * {{ depth // 4 }}u + i]);
        }
        found[row] = factor_of(largest);
    }
    workgroupBarrier();
{% for i in range(own.each) %}
    let {{ own.name }}_factor{{ i }} = found[min({{ own.name }}_local{{ i }}, {{ own.width - 1 }}u)];
{% endfor %}
{% else %}
    var largest = 0.0;
{% for i in range(own.each) %}
    {{ within(own, i) }}{
        largest = max(largest, largest{{ i }});
    }
{% endfor %}
    let {{ own.name }}_least = least_of(factor_of(largest), subgroup);
{% endif %}

    // Start of this subgroup's piece.
    let left_begin = {{ "0u" if wide else "subgroup * " ~ 16 * stride ~ "u" }};
    let right_begin = {{ "subgroup * " ~ 16 * stride ~ "u" if wide else "0u" }};
{{ accumulators(edge, 16, 16) }}

    for (var start = first; start < part_end; start = start + {{ depth }}u) {
        // Starts loads before the barrier.
{{ fetch(left) }}
{{ fetch(right) }}
        workgroupBarrier();
{{ stage(left) }}
{{ stage(right) }}
        workgroupBarrier();
{{ multiply(edge, 16, 16,
    {"name": "left_tile", "begin": "left_begin", "stride": stride, "along": true, "unit": 1},
    {"name": "right_tile", "begin": "right_begin", "stride": stride, "along": true, "unit": 1}) }}
    }

    let sums_begin = subgroup * {{ 16 if wide else 16 * sum_stride }}u;
{{ store(edge, 0, 0, "sums", "sums_begin", sum_stride) }}
    workgroupBarrier();
    for (var i = thread; i < {{ rows * columns }}u; i = i + {{ threads }}u) {
        let local_row = i / {{ columns }}u;
        let local_column = i % {{ columns }}u;
        let row = left_base + local_row;
        let column = right_base + local_column;
        if (row < p.rows && column < p.columns) {
{% macro factor_at(operand, row, local) -%}
{{ operand.name ~ "_least" if not operand.along else "factor[" ~ row ~ "]" if operand.name == large else "found[" ~ local ~ "]" }}
{%- endmacro %}
            let undo = 1.0 / {{ factor_at(left, "row", "local_row") }} / {{ factor_at(right, "column", "local_column") }};
            let sum = sums[local_row * {{ sum_stride }}u + local_column];
            out[(part * p.rows + row) * p.columns + column] = p.scale * (sum * undo);
        }
    }
}
