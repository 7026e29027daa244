enable f16;
enable wgpu_cooperative_matrix;
// dX = dY * W + mask * (G * A) by cooperative matrices: 64 rows of dY by 64 columns of W a workgroup of four subgroups, each a
// 32 x 32 piece of dX. Tiles of dY and W are staged in workgroup memory as f16, W decoded on the way: rows of dY times a power
// of two from their own largest value, W times `m.factor`; undone at the end.
//
// The adapter's part is f32, as in the forward.
{{ "" }}
{% from "coop.wgsl" import depth, sum_stride, enter, begin_tile, accumulators, stage_weights, multiply, finish_tile %}
{# Rows of a tile are padded by 8 values, which spreads the banks. #}
{% set dy_stride = depth + 8 %}
{% set w_stride = 64 + 8 %}

{% include "qmatmul_dx.wgsl" %}
@group(0) @binding(4) var<storage, read> row_factor: array<f32>; // of dY, a power of two a row
@group(0) @binding(5) var<storage, read_write> dx: array<f32>;

{% include "matrix.wgsl" %}
{% set operand = "a" %}
{% include "rows.wgsl" %}

var<workgroup> dy_tile: array<f16, {{ 64 * dy_stride }}>; // [row][n]
var<workgroup> w_tile: array<f16, {{ depth * w_stride }}>; // [n][k]
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
    let dy_begin = half_row * {{ 32 * dy_stride }}u;
    let w_begin = half_column * 32u;
{{ accumulators(edge, 32, 32) }}

    for (var start = 0u; start < p.n; start = start + {{ depth }}u) {
        workgroupBarrier();
        // Rows and columns past the end of dX repeat the last ones; past N there are zeros.
        for (var i = thread; i < {{ 64 * depth }}u; i = i + {{ 4 * lanes }}u) {
            let row = p.row + min(row_base + i / {{ depth }}u, p.rows - 1u);
            let n = start + i % {{ depth }}u;
            var value = 0.0;
            if (n < p.n) { value = dy[row * p.dy_stride + p.column + n] * row_factor[row]; }
            dy_tile[i / {{ depth }}u * {{ dy_stride }}u + i % {{ depth }}u] = f16(value);
        }
        for (var i = thread; i < {{ depth * 8 }}u; i = i + {{ 4 * lanes }}u) {
            let n = start + i / 8u;
            let word = min(column_base / 8u + i % 8u, p.words - 1u);
            var weights = W8(vec4<f32>(0.0), vec4<f32>(0.0));
            if (n < p.n) { weights = weights8(n, word); }
            let at = i / 8u * {{ w_stride }}u + i % 8u * 8u;
{{ stage_weights() }}
        }
        workgroupBarrier();
{{ multiply(edge, 32, 32,
    {"name": "dy_tile", "begin": "dy_begin", "stride": dy_stride, "along": true},
    {"name": "w_tile", "begin": "w_begin", "stride": w_stride, "along": false}) }}
    }

{{ finish_tile(edge) }}
}

// Two by four results a thread.
fn finish(row_first: u32, column_first: u32, thread: u32) {
    for (var i = thread; i < 128u; i = i + {{ 4 * lanes }}u) {
        let local = i / 8u * 2u;
        let column = i % 8u * 4u;
        let row_base = row_first + local + local / 16u * 16u;
        let q = (column_first + column + column / 16u * 16u) / 4u;
        if (4u * q < p.k) {
{% for j in range(2) %}
            let row{{ j }} = p.row + min(row_base + {{ j }}u, p.rows - 1u);
            var down{{ j }} = vec4<f32>(0.0);
{% endfor %}
            for (var j = 0u; j < p.rank; j = j + 1u) {
                let right = a4(j, q);
{% for j in range(2) %}
                down{{ j }} = down{{ j }} + g[row{{ j }} * p.rank + j] * right;
{% endfor %}
            }
{% for j in range(2) %}
            if (row_base + {{ j }}u < p.rows) {
                let at = (local + {{ j }}u) * {{ sum_stride }}u + column;
                let sum = vec4<f32>(sums[at], sums[at + 1u], sums[at + 2u], sums[at + 3u]);
                let undo = 1.0 / row_factor[row{{ j }}] / p.m.factor;
                var value = sum * undo + down{{ j }}{{ " * dropout_factor4(row" ~ j ~ ", 4u * q)" if dropout }};
                if (p.accumulate != 0u) { value = value + load4(row{{ j }}, q); }
                store4(row{{ j }}, q, value);
            }
{% endfor %}
        }
    }
}
