enable f16;
enable wgpu_cooperative_matrix;
// Y = X * W^T + bias + s * H * B^T by cooperative matrices: 64 rows of X by 64 rows of W a workgroup of four subgroups, each
// a 32 x 32 piece of Y. Tiles of X and W are staged in workgroup memory as f16, W decoded on the way: rows of X times a power
// of two from their own largest value, W times `m.factor`; undone at the end.
//
// The adapter's part is f32: it is small beside the rest, and may be much smaller or larger in value.
{{ "" }}
{% from "coop.wgsl" import depth, sum_stride, enter, begin_tile, accumulators, stage_weights, multiply, finish_tile %}
{# Rows of a tile are padded by 8 values, which spreads the banks. #}
{% set stride = depth + 8 %}

{% include "qmatmul.wgsl" %}
@group(0) @binding(5) var<storage, read> row_factor: array<f32>; // of X, a power of two a row
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

{% include "matrix.wgsl" %}
{% set operand = "x" %}
{% include "rows.wgsl" %}

// [row][k]
var<workgroup> x_tile: array<f16, {{ 64 * stride }}>;
var<workgroup> w_tile: array<f16, {{ 64 * stride }}>;
var<workgroup> sums: array<f32, {{ 32 * sum_stride }}>;

@compute @workgroup_size({{ 4 * lanes }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
) {
{{ enter() }}
{{ begin_tile() }}
    let x_begin = half_row * {{ 32 * stride }}u;
    let w_begin = half_column * {{ 32 * stride }}u;
{{ accumulators(edge, 32, 32) }}

    let quads = (p.k + 3u) >> 2u;
    for (var start = 0u; start < quads; start = start + {{ depth // 4 }}u) {
        workgroupBarrier();
        // Rows past the end repeat the last one; values past K are zero.
        for (var i = thread; i < {{ 64 * depth // 4 }}u; i = i + {{ 4 * lanes }}u) {
            let row = p.row + min(row_base + i / {{ depth // 4 }}u, p.rows - 1u);
            let q = start + i % {{ depth // 4 }}u;
            var values = vec4<f32>(0.0);
            if (q < quads) { values = x4(row, q) * row_factor[row]; }
            let at = i / {{ depth // 4 }}u * {{ stride }}u + i % {{ depth // 4 }}u * 4u;
{% for e in range(4) %}
            x_tile[at + {{ e }}u] = f16(values.{{ "xyzw"[e] }});
{% endfor %}
        }
        for (var i = thread; i < {{ 64 * depth // 8 }}u; i = i + {{ 4 * lanes }}u) {
            let n = min(column_base + i / {{ depth // 8 }}u, p.n - 1u);
            let word = start / 2u + i % {{ depth // 8 }}u;
            var weights = W8(vec4<f32>(0.0), vec4<f32>(0.0));
            if (2u * word < quads) { weights = weights8(n, word); }
            let at = i / {{ depth // 8 }}u * {{ stride }}u + i % {{ depth // 8 }}u * 8u;
{{ stage_weights() }}
        }
        workgroupBarrier();
{{ multiply(edge, 32, 32,
    {"name": "x_tile", "begin": "x_begin", "stride": stride, "along": true},
    {"name": "w_tile", "begin": "w_begin", "stride": stride, "along": true}) }}
    }

{{ finish_tile(edge) }}
}

// Two by four results a thread.
fn finish(row_first: u32, column_first: u32, thread: u32) {
    for (var i = thread; i < 128u; i = i + {{ 4 * lanes }}u) {
        let local = i / 8u * 2u;
        let column = i % 8u * 4u;
        let row_base = row_first + local + local / 16u * 16u;
        let n = column_first + column + column / 16u * 16u;
{% for j in range(4) %}
        let n{{ j }} = p.column + min(n + {{ j }}u, p.n - 1u);
{% endfor %}
{% for j in range(2) %}
        let row{{ j }} = p.row + min(row_base + {{ j }}u, p.rows - 1u);
        var up{{ j }} = vec4<f32>(0.0);
{% endfor %}
        for (var j = 0u; j < p.rank; j = j + 1u) {
            let right = vec4<f32>(b[n0 * p.rank + j], b[n1 * p.rank + j], b[n2 * p.rank + j], b[n3 * p.rank + j]);
{% for j in range(2) %}
            up{{ j }} = up{{ j }} + h[row{{ j }} * p.rank + j] * right;
{% endfor %}
        }
        var offset = vec4<f32>(0.0);
        if (p.has_bias != 0u) {
            offset = vec4<f32>(bias[n0], bias[n1], bias[n2], bias[n3]);
        }
{% for j in range(2) %}
        if (row_base + {{ j }}u < p.rows) {
            let at = (local + {{ j }}u) * {{ sum_stride }}u + column;
            let sum = vec4<f32>(sums[at], sums[at + 1u], sums[at + 2u], sums[at + 3u]);
            let undo = 1.0 / row_factor[row{{ j }}] / p.m.factor;
            let value = sum * undo + p.lora_scale * up{{ j }} + offset;
            let to = row{{ j }} * p.y_stride + p.column + n;
{% for e in range(4) %}
            if (n + {{ e }}u < p.n) { y[to + {{ e }}u] = value.{{ "xyzw"[e] }}; }
{% endfor %}
        }
{% endfor %}
    }
}
