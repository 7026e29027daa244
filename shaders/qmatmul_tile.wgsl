{% if f16 %}
enable f16;
{% endif %}
// Y = X * W^T + bias + s * H * B^T by register tiles: 64 rows of X by 64 rows of W a workgroup of 64 threads, each an
// 8 x 8 piece of Y. Tiles of X and W are staged in workgroup memory, W decoded on the way; the adapter's rank is
// {% if f16 %}one more stretch of the same loop, in f32.{% else %}one more stretch of the same loop.{% endif %}
{{ "" }}
{% if f16 %}
// Staged as f16: rows of X times a power of two from their own largest value, W times `m.factor`; undone at the end.
{% endif %}
{% set depth = 32 if f16 else 16 %}
{% set lora_depth = 8 if f16 else 16 %}
{% from "tile.wgsl" import stride, multiply, stage %}

{% include "qmatmul.wgsl" %}
@group(0) @binding(5) var<storage, read> row_factor: array<f32>; // of X, a power of two a row; f16 staging only
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

{% include "groups.wgsl" %}
{% include "matrix.wgsl" %}
{% set operand = "x" %}
{% include "rows.wgsl" %}

// [k][row / 4] of four rows each; the stride of 17 spreads the banks.
{% if f16 %}
var<workgroup> x_tile: array<vec4<f16>, {{ depth * stride }}>;
var<workgroup> w_tile: array<vec4<f16>, {{ depth * stride }}>;
var<workgroup> h_tile: array<vec4<f32>, {{ lora_depth * stride }}>;
var<workgroup> b_tile: array<vec4<f32>, {{ lora_depth * stride }}>;
{% else %}
var<workgroup> x_tile: array<vec4<f32>, {{ depth * stride }}>;
var<workgroup> w_tile: array<vec4<f32>, {{ depth * stride }}>;
{% endif %}

// Four values of a row of H or B from rank j on, zero past the rank.
{% for name in ["h", "b"] %}
fn {{ name }}4(row: u32, j: u32) -> vec4<f32> {
    var values = vec4<f32>(0.0);
    let at = row * p.rank + j;
    if (j < p.rank) { values.x = {{ name }}[at]; }
    if (j + 1u < p.rank) { values.y = {{ name }}[at + 1u]; }
    if (j + 2u < p.rank) { values.z = {{ name }}[at + 2u]; }
    if (j + 3u < p.rank) { values.w = {{ name }}[at + 3u]; }
    return values;
}
{% endfor %}

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
    let n_base = (group - row_group * p.column_groups) * 64u;
    let row_base = row_group * 64u;
    let tx = thread % 8u;
    let ty = thread / 8u;

    // What this thread stages: four rows (`quad`) by four values of K (`part`). Rows past the end repeat the last one.
    let quad = thread / 4u;
    let part = thread % 4u;
{% for i in range(4) %}
    let row{{ i }} = p.row + min(row_base + 4u * quad + {{ i }}u, p.rows - 1u);
    let n{{ i }} = min(n_base + 4u * quad + {{ i }}u, p.n - 1u);
{% endfor %}
{% if f16 %}
{% for i in range(4) %}
    let factor{{ i }} = row_factor[row{{ i }}];
{% endfor %}
{% endif %}
{% for i in range(8) %}
    var sum{{ i }}_0 = vec4<f32>(0.0);
    var sum{{ i }}_1 = vec4<f32>(0.0);
{% endfor %}

    let quads = (p.k + 3u) >> 2u;
    for (var start = 0u; start < quads; start = start + {{ depth // 4 }}u) {
        workgroupBarrier();
{% for round in range(depth // 16) %}
        {
            let q = start + {{ 4 * round }}u + part;
{% for i in range(4) %}
            var x{{ i }} = vec4<f32>(0.0);
            var w{{ i }} = vec4<f32>(0.0);
{% endfor %}
            if (q < quads) {
{% for i in range(4) %}
                x{{ i }} = x4(row{{ i }}, q){{ " * factor" ~ i if f16 }};
                w{{ i }} = weights4(n{{ i }}, q){{ " * p.m.factor" if f16 }};
{% endfor %}
            }
            let k = {{ 16 * round }}u + 4u * part;
{{ stage("x_tile", "k", "x", "vec4<f16>" if f16 else "vec4<f32>") }}
{{ stage("w_tile", "k", "w", "vec4<f16>" if f16 else "vec4<f32>") }}
        }
{% endfor %}
        workgroupBarrier();
{{ multiply("x_tile", "w_tile", depth) }}
    }

{% if f16 %}
{% for i in range(8) %}
    {
        let row = p.row + min(row_base + {{ 32 * (i // 4) }}u + 4u * ty + {{ i % 4 }}u, p.rows - 1u);
        let undo = 1.0 / row_factor[row] / p.m.factor;
        sum{{ i }}_0 = sum{{ i }}_0 * undo;
        sum{{ i }}_1 = sum{{ i }}_1 * undo;
    }
{% endfor %}
{% endif %}

{% set left, right = ("h_tile", "b_tile") if f16 else ("x_tile", "w_tile") %}
    for (var start = 0u; start < p.rank; start = start + {{ lora_depth }}u) {
        workgroupBarrier();
        if (part < {{ lora_depth // 4 }}u) {
            let j = start + 4u * part;
{% for i in range(4) %}
            let h{{ i }} = h4(row{{ i }}, j);
            let b{{ i }} = b4(p.column + n{{ i }}, j) * p.lora_scale;
{% endfor %}
            let k = 4u * part;
{{ stage(left, "k", "h", "vec4<f32>") }}
{{ stage(right, "k", "b", "vec4<f32>") }}
        }
        workgroupBarrier();
{{ multiply(left, right, lora_depth) }}
    }

{% for half in range(2) %}
    {
        let n = n_base + {{ 32 * half }}u + 4u * tx;
        var offset = vec4<f32>(0.0);
        if (p.has_bias != 0u) {
{% for j in range(4) %}
            offset.{{ "xyzw"[j] }} = bias[p.column + min(n + {{ j }}u, p.n - 1u)];
{% endfor %}
        }
{% for i in range(8) %}
        {
            let row = row_base + {{ 32 * (i // 4) }}u + 4u * ty + {{ i % 4 }}u;
            let value = sum{{ i }}_{{ half }} + offset;
            let at = (p.row + row) * p.y_stride + p.column + n;
            if (row < p.rows) {
{% for j in range(4) %}
                if (n + {{ j }}u < p.n) { y[at + {{ j }}u] = value.{{ "xyzw"[j] }}; }
{% endfor %}
            }
        }
{% endfor %}
    }
{% endfor %}
}
