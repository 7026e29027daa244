{% if f16 %}
enable f16;
{% endif %}
// dX = dY * W + mask * (G * A) by register tiles: 64 rows of dY by 64 columns of W a workgroup of 64 threads, each an
// 8 x 8 piece of dX. Tiles of dY and W are staged in workgroup memory, W decoded on the way.
//
// The adapter comes first: its mask must not touch the rest.
{% if f16 %}
// Staged as f16: rows of dY times a power of two from their own largest value, W times `m.factor`; undone at the end. The
// adapter's part is f32 and waits in dX.
{% endif %}
{% from "tile.wgsl" import stride, multiply, stage %}
{% set type = "vec4<f16>" if f16 else "vec4<f32>" %}
{% set depth = 32 if f16 else 16 %}
{% set lora_depth = 8 if f16 else 16 %}
{{ "" }}
{% include "qmatmul_dx.wgsl" %}
@group(0) @binding(4) var<storage, read> row_factor: array<f32>; // of dY, a power of two a row; f16 staging only
@group(0) @binding(5) var<storage, read_write> dx: array<f32>;

{% include "groups.wgsl" %}
{% include "matrix.wgsl" %}
{% set operand = "a" %}
{% include "rows.wgsl" %}

// dY is staged as [n][row / 4] of four rows each, W as [n][k / 4] of four columns each.
var<workgroup> dy_tile: array<{{ type }}, {{ depth * stride }}>;
var<workgroup> w_tile: array<{{ type }}, {{ depth * stride }}>;
{% if f16 %}
var<workgroup> g_tile: array<vec4<f32>, {{ lora_depth * stride }}>;
var<workgroup> a_tile: array<vec4<f32>, {{ lora_depth * stride }}>;
{% endif %}

// Four values of a row of dY (of this part's columns) or G, zero past the end.
{% for name, at, end in [("dy", "row * p.dy_stride + p.column + i", "p.n"), ("g", "row * p.rank + i", "p.rank")] %}
fn {{ name }}4(row: u32, i: u32) -> vec4<f32> {
    var values = vec4<f32>(0.0);
    let at = {{ at }};
    if (i < {{ end }}) { values.x = {{ name }}[at]; }
    if (i + 1u < {{ end }}) { values.y = {{ name }}[at + 1u]; }
    if (i + 2u < {{ end }}) { values.z = {{ name }}[at + 2u]; }
    if (i + 3u < {{ end }}) { values.w = {{ name }}[at + 3u]; }
    return values;
}
{% endfor %}

{# Does something with each four results of a thread that are in dX: `sumI_H`, at `row` and `q`. #}
{% macro each_four(what) %}
{% for i in range(8) %}
    {
        let row = p.row + row_base + {{ 32 * (i // 4) }}u + 4u * ty + {{ i % 4 }}u;
        if (row < p.row + p.rows) {
{% for half in range(2) %}
            {
                let q = 2u * word_base + {{ 8 * half }}u + tx;
                if (q < quads) { {{ what | replace("SUM", "sum" ~ i ~ "_" ~ half) }} }
            }
{% endfor %}
        }
    }
{% endfor %}
{% endmacro %}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let group = group_index(workgroup, count);
    if (group >= p.groups) {
        return;
    }
    let row_group = group / p.column_groups;
    let word_base = (group - row_group * p.column_groups) * 8u;
    let row_base = row_group * 64u;
    let tx = thread % 8u;
    let ty = thread / 8u;
    let quads = (p.k + 3u) >> 2u;

    // What this thread stages of dY or G: four rows (`quad`) by four columns (`part`). Rows past the end repeat the last one.
    let quad = thread / 4u;
    let part = thread % 4u;
{% for i in range(4) %}
    let row{{ i }} = p.row + min(row_base + 4u * quad + {{ i }}u, p.rows - 1u);
{% if f16 %}
    let factor{{ i }} = row_factor[row{{ i }}];
{% endif %}
{% endfor %}
    // And of W or A: a word of eight columns, of every eighth row. Words past the end repeat the last one.
    let word = min(word_base + tx, p.words - 1u);
{% for i in range(8) %}
    var sum{{ i }}_0 = vec4<f32>(0.0);
    var sum{{ i }}_1 = vec4<f32>(0.0);
{% endfor %}

{% set left, right = ("g_tile", "a_tile") if f16 else ("dy_tile", "w_tile") %}
    for (var start = 0u; start < p.rank; start = start + {{ lora_depth }}u) {
        workgroupBarrier();
        if (part < {{ lora_depth // 4 }}u) {
            let j = 4u * part;
{% for i in range(4) %}
            let g{{ i }} = g4(row{{ i }}, start + j);
{% endfor %}
{{ stage(left, "j", "g", "vec4<f32>") }}
        }
        for (var j = ty; j < {{ lora_depth }}u; j = j + 8u) {
            var lo = vec4<f32>(0.0);
            var hi = vec4<f32>(0.0);
            if (start + j < p.rank) {
                lo = a4(start + j, 2u * word);
                hi = a4(start + j, 2u * word + 1u);
            }
            {{ right }}[j * {{ stride }}u + 2u * tx] = lo;
            {{ right }}[j * {{ stride }}u + 2u * tx + 1u] = hi;
        }
        workgroupBarrier();
{{ multiply(left, right, lora_depth) }}
    }
{% if dropout %}
    if (p.rank > 0u) {
{{ each_four("SUM = SUM * dropout_factor4(row, 4u * q);") }}
    }
{% endif %}
{% if f16 %}
    if (p.rank > 0u) {
{{ each_four("store4(row, q, SUM);") }}
{% for i in range(8) %}
        sum{{ i }}_0 = vec4<f32>(0.0);
        sum{{ i }}_1 = vec4<f32>(0.0);
{% endfor %}
    }
{% else %}
    if (p.accumulate != 0u) {
{{ each_four("SUM = load4(row, q);") }}
    }
{% endif %}

    for (var start = 0u; start < p.n; start = start + {{ depth }}u) {
        workgroupBarrier();
        // Loops of the shader, not of its template: drivers need not compile the decoder many times.
        for (var n = 4u * part; n < {{ depth }}u; n = n + 16u) {
{% for i in range(4) %}
            let dy{{ i }} = dy4(row{{ i }}, start + n){{ " * factor" ~ i if f16 }};
{% endfor %}
{{ stage("dy_tile", "n", "dy", type) }}
        }
        for (var n = ty; n < {{ depth }}u; n = n + 8u) {
            var weights = W8(vec4<f32>(0.0), vec4<f32>(0.0));
            if (start + n < p.n) {
                weights = weights8(start + n, word);
            }
            w_tile[n * {{ stride }}u + 2u * tx] = {{ type }}(weights.lo{{ " * p.m.factor" if f16 }});
            w_tile[n * {{ stride }}u + 2u * tx + 1u] = {{ type }}(weights.hi{{ " * p.m.factor" if f16 }});
        }
        workgroupBarrier();
{{ multiply("dy_tile", "w_tile", depth) }}
    }

{% if f16 %}
    let add = p.accumulate != 0u || p.rank > 0u;
{{ each_four("SUM = SUM * (1.0 / row_factor[row] / p.m.factor); if (add) { SUM = SUM + load4(row, q); } store4(row, q, SUM);") }}
{% else %}
{{ each_four("store4(row, q, SUM);") }}
{% endif %}
}
