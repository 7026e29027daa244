enable f16;
enable wgpu_cooperative_matrix;
// OUT [P, Q] = s * the sum over c of L[p, c] * R[c, q] by cooperative matrices, where P or Q is a
// rank: the products with an adapter's matrices, and their gradients. A workgroup of four
// subgroups owns {{ "16 x 64" if wide else "64 x 16" }} of OUT, each subgroup 16 x 16, for a part
// of the contracted index. column_sum adds up the parts.
//
// Operands are staged as f16, multiplied by powers of two: one per row for [P, C] or [Q, C], and
// one that fits the whole part for [C, P] or [C, Q]. The larger operand, {{ large | upper }}, has
// row factors that other kernels share. Those of the other are computed here, for the part that is
// read.
//
// Floor: the bytes of the larger operand over the memory's bandwidth, because a rank is small.
{% import "shared/coop.wgsl" as coop %}
{% set depth = coop.depth %}
{% set threads = 4 * lanes %}
{% set rows, columns = (16, 64) if wide else (64, 16) %}
{# The unit that a thread stages of an operand: a quad along c, or quads of two neighbouring c,
   which it stores as pairs that use different banks. `units`: number of units in the workgroup's
   tile. #}
{% set left_units = rows * depth // (4 if left_along else 8) %}
{% set right_units = columns * depth // (4 if right_along else 8) %}
{% set left = {
    "name": "left", "along": left_along, "rows": "p.rows", "width": rows,
    "units": left_units, "each": [left_units // threads, 1] | max,
} %}
{% set right = {
    "name": "right", "along": right_along, "rows": "p.columns", "width": columns,
    "units": right_units, "each": [right_units // threads, 1] | max,
} %}
{% set given, own = (left, right) if large == "left" else (right, left) %}
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
{{ coop.least() }}
{% endif %}

{% set left_tile = {
    "name": "left_tile", "begin": "left_begin", "stride": stride, "along": true, "unit": 1,
} %}
{% set right_tile = {
    "name": "right_tile", "begin": "right_begin", "stride": stride, "along": true, "unit": 1,
} %}

{# Four values of an operand along its own memory, from [own, c] on, with dropout. Past the ends
   the last values are repeated. #}
{% macro load4(operand) %}
{% set name = operand.name %}
{% set dropped = dropout and name == large %}
{% set length = "p.contracted" if operand.along else operand.rows %}
fn {{ name }}4(own: u32, c: u32) -> vec4<f32> {
{% if operand.along %}
    let row = own;
    let place = c;
{% else %}
    let row = min(c, p.contracted - 1u);
    let place = own;
{% endif %}
{% if quads %}
    let at = row * {{ length }} + min(place, {{ length }} - 4u);
    let values = {{ name }}[at >> 2u];
{% if dropped %}
    let i = vec4<u32>(at, at + 1u, at + 2u, at + 3u);
{% endif %}
{% else %}
    let places = min(vec4<u32>(place) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>({{ length }} - 1u));
    let i = vec4<u32>(row * {{ length }}) + places;
    let values = vec4<f32>({{ name }}[i.x], {{ name }}[i.y], {{ name }}[i.z], {{ name }}[i.w]);
{% endif %}
{% if dropped %}
    return values * vec4<f32>(
        dropout_factor(i.x), dropout_factor(i.y), dropout_factor(i.z), dropout_factor(i.w),
    );
{% else %}
    return values;
{% endif %}
}
{% endmacro %}
{{ load4(left) }}
{{ load4(right) }}

{# Places of a thread's units of an operand. #}
{% macro place(operand) %}
{% set name = operand.name %}
{% for i in range(operand.each) %}
    let {{ name }}_unit{{ i }} = thread + {{ threads * i }}u;
{% if operand.along %}
    let {{ name }}_c{{ i }} = {{ name }}_unit{{ i }} % {{ depth // 4 }}u * 4u;
    let {{ name }}_local{{ i }} = {{ name }}_unit{{ i }} / {{ depth // 4 }}u;
    let {{ name }}_own{{ i }} =
        min({{ name }}_base + {{ name }}_local{{ i }}, {{ operand.rows }} - 1u);
{% else %}
    let {{ name }}_c{{ i }} = {{ name }}_unit{{ i }} % {{ depth // 2 }}u * 2u;
    let {{ name }}_local{{ i }} = {{ name }}_unit{{ i }} / {{ depth // 2 }}u * 4u;
    let {{ name }}_own{{ i }} = {{ name }}_base + {{ name }}_local{{ i }};
{% endif %}
{% endfor %}
{% endmacro %}
{# Loads a thread's units, from `start` on. #}
{% macro fetch(operand) %}
{% set name = operand.name %}
{% for i in range(operand.each) %}
        let {{ name }}_first{{ i }} =
            {{ name }}4({{ name }}_own{{ i }}, start + {{ name }}_c{{ i }});
{% if not operand.along %}
        let {{ name }}_second{{ i }} =
            {{ name }}4({{ name }}_own{{ i }}, start + {{ name }}_c{{ i }} + 1u);
{% endif %}
{% endfor %}
{% endmacro %}
{# A guard for threads without work. #}
{% macro within(operand, i) -%}
{% set name = operand.name %}
{% if operand.units < threads %}if ({{ name }}_unit{{ i }} < {{ operand.units }}u) {% endif %}
{%- endmacro %}
{# Stages a thread's units as f16, with zeros past the part. #}
{% macro stage(operand) %}
{% set name = operand.name %}
{% for i in range(operand.each) %}
        {{ within(operand, i) }}{
            let c = start + {{ name }}_c{{ i }};
            let to = {{ name }}_local{{ i }} * {{ stride }}u + {{ name }}_c{{ i }};
{% if operand.along %}
            let scaled = {{ name }}_first{{ i }} * {{ name }}_factor{{ i }};
            let within = vec4<u32>(c) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(part_end);
            let values = select(vec4<f32>(0.0), scaled, within);
{% for e in range(4) %}
            {{ name }}_tile[to + {{ e }}u] = f16(values.{{ "xyzw"[e] }});
{% endfor %}
{% else %}
{% for which, c in [("first", "c"), ("second", "c + 1u")] %}
            let {{ which }}_scaled = {{ name }}_{{ which }}{{ i }} * {{ name }}_least;
            let {{ which }} = select(vec4<f32>(0.0), {{ which }}_scaled, {{ c }} < part_end);
{% endfor %}
{% for e in range(4) %}
            {{ name }}_tile[to + {{ e * stride }}u] = f16(first.{{ "xyzw"[e] }});
            {{ name }}_tile[to + {{ e * stride + 1 }}u] = f16(second.{{ "xyzw"[e] }});
{% endfor %}
{% endif %}
        }
{% endfor %}
{% endmacro %}
{# The factor that a value of OUT has from an operand. #}
{% macro factor_at(operand, row, local) -%}
{% if not operand.along -%}
{{ operand.name }}_least
{%- elif operand.name == large -%}
factor[{{ row }}]
{%- else -%}
found[{{ local }}]
{%- endif %}
{%- endmacro %}

{% call coop.each_group(threads, "out") %}
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
            let first{{ i }} = abs({{ own.name }}_first{{ i }});
{% if own.along %}
            most{{ i }} = max(most{{ i }}, first{{ i }});
{% else %}
            let second{{ i }} = abs({{ own.name }}_second{{ i }});
            most{{ i }} = max(most{{ i }}, max(first{{ i }}, second{{ i }}));
{% endif %}
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
    let {{ own.name }}_factor{{ i }} =
        found[min({{ own.name }}_local{{ i }}, {{ own.width - 1 }}u)];
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
{% if wide %}
    let left_begin = 0u;
    let right_begin = subgroup * {{ 16 * stride }}u;
{% else %}
    let left_begin = subgroup * {{ 16 * stride }}u;
    let right_begin = 0u;
{% endif %}
{{ coop.accumulators(16, 16) }}

    for (var start = first; start < part_end; start = start + {{ depth }}u) {
        // Starts loads before the barrier.
{{ fetch(left) }}
{{ fetch(right) }}
        workgroupBarrier();
{{ stage(left) }}
{{ stage(right) }}
        workgroupBarrier();
{{ coop.multiply(16, 16, left_tile, right_tile) }}
    }

    let sums_begin = subgroup * {{ 16 if wide else 16 * sum_stride }}u;
{{ coop.store(0, 0, "sums", "sums_begin", sum_stride) }}
    workgroupBarrier();
    for (var i = thread; i < {{ rows * columns }}u; i = i + {{ threads }}u) {
        let local_row = i / {{ columns }}u;
        let local_column = i % {{ columns }}u;
        let row = left_base + local_row;
        let column = right_base + local_column;
        if (row < p.rows && column < p.columns) {
            let left_factor = {{ factor_at(left, "row", "local_row") }};
            let right_factor = {{ factor_at(right, "column", "local_column") }};
            let undo = 1.0 / left_factor / right_factor;
            let sum = sums[local_row * {{ sum_stride }}u + local_column];
            out[(part * p.rows + row) * p.columns + column] = p.scale * (sum * undo);
        }
    }
{% endcall %}
