// norm[n] = the length of row n of deq(W) + s * B * A (rank > 0). W is decoded on the way.
{% if software %}
// For software drivers: lanes along N, {{ rows }} rows per invocation, no workgroup memory.
{% else %}
// A workgroup owns {{ rows }} rows, which share the loads of A. Its threads stride K, then the
// partial sums are added up.
{% endif %}
{% import "shared/entry.wgsl" as entry %}
{% import "shared/row_quads.wgsl" as row_quads %}

struct Params {
    first_group: u32,
    groups: u32,
    k: u32,
    words: u32,   // words of eight weights per row
    rows: u32,    // rows of W in this part
    column: u32,  // row of B and place in the result, for this part's first row of W
    rank: u32,
    lora_scale: f32,
    m: Matrix,
}

{% include "shared/matrix_params.wgsl" %}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> w: array<u32>;
@group(0) @binding(1) var<storage, read> a: array<{{ "f32" if ragged else "vec4<f32>" }}>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(3) var<storage, read_write> norm: array<f32>;

{% include "shared/matrix.wgsl" %}

{{ row_quads.load("a") }}

// The smallest result is the smallest normal number, so that a row of zeros isn't divided by zero.
fn length_of(squares: f32) -> f32 {
    return max(sqrt(squares), 1.17549435e-38);
}

{% if not software %}
var<workgroup> partial: array<vec4<f32>, {{ threads }}>;
{% endif %}

{% call entry.each_group(threads) %}
{% if software %}
    let n_base = group * {{ threads * rows }}u + thread;
    let g_first = 0u;
{% set apart, step = threads, 1 %}
{% else %}
    let n_base = group * {{ rows }}u;
    let g_first = thread;
{% set apart, step = 1, threads %}
{% endif %}
{% for i in range(rows) %}
    let n{{ i }} = min(n_base + {{ i * apart }}u, p.rows - 1u);
    let b{{ i }} = (p.column + n{{ i }}) * p.rank;
    var sum{{ i }} = 0.0;
{% endfor %}
    for (var g = g_first; g < p.words; g = g + {{ step }}u) {
{% for i in range(rows) %}
        var w{{ i }} = weights8(n{{ i }}, g);
{% endfor %}
        for (var j = 0u; j < p.rank; j = j + 1u) {
            let lo = a4(j, 2u * g) * p.lora_scale;
            let hi = a4(j, 2u * g + 1u) * p.lora_scale;
{% for i in range(rows) %}
            w{{ i }}.lo = w{{ i }}.lo + b[b{{ i }} + j] * lo;
            w{{ i }}.hi = w{{ i }}.hi + b[b{{ i }} + j] * hi;
{% endfor %}
        }
{% for i in range(rows) %}
        sum{{ i }} = sum{{ i }} + (dot(w{{ i }}.lo, w{{ i }}.lo) + dot(w{{ i }}.hi, w{{ i }}.hi));
{% endfor %}
    }
{% if software %}
{% for i in range(rows) %}
    if (n_base + {{ i * apart }}u < p.rows) {
        norm[p.column + n{{ i }}] = length_of(sum{{ i }});
    }
{% endfor %}
{% else %}
    partial[thread] = vec4<f32>(sum0, sum1, sum2, sum3);
    for (var step = {{ threads // 2 }}u; step > 0u; step = step >> 1u) {
        workgroupBarrier();
        if (thread < step) {
            partial[thread] = partial[thread] + partial[thread + step];
        }
    }
    if (thread == 0u) {
{% for i in range(rows) %}
        if (n_base + {{ i }}u < p.rows) {
            norm[p.column + n{{ i }}] = length_of(partial[0].{{ "xyzw"[i] }});
        }
{% endfor %}
    }
{% endif %}
{% endcall %}
