// Y[m, n] = X[m, n] * c[n] (+ D[m, n] or d[n]); with `divide`, X[m, n] / c[n].
{% import "shared/entry.wgsl" as entry %}

struct Params {
    first_group: u32,
    groups: u32,
    len: u32,        // values of X
    columns: u32,    // N
    add_stride: u32, // stride from one row of D to the next, in values; 0: all rows share one
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> c: array<f32>;
@group(0) @binding(2) var<storage, read> d: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

{% call entry.each_value(threads) %}
    if (i >= p.len) {
        return;
    }
    let row = i / p.columns;
    let column = i - row * p.columns;
    let scaled = x[i] {{ "/" if divide else "*" }} c[column];
{% if add %}
    y[i] = scaled + d[row * p.add_stride + column];
{% else %}
    y[i] = scaled;
{% endif %}
{% endcall %}
