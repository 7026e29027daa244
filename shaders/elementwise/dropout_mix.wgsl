// Y[i] = f(i) * X[i] + (1 - f(i)) * Z[i], with f(i) the dropout factor of element i, 0 or 1 / (1 -
// probability).
{% import "shared/entry.wgsl" as entry %}

struct Params {
    first_group: u32,
    groups: u32,
    len: u32,        // values
    seed_low: u32,   // of the dropout
    seed_high: u32,
    drop_below: u32, // values with a hash below this are dropped
    keep_scale: f32, // 1 / (1 - probability)
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> z: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

{% include "shared/dropout.wgsl" %}

{% call entry.each_value(threads) %}
    if (i >= p.len) {
        return;
    }
    let f = dropout_factor(i);
{% if kept and rest %}
    y[i] = f * x[i] + (1.0 - f) * z[i];
{% elif kept %}
    y[i] = f * x[i];
{% else %}
    y[i] = (1.0 - f) * z[i];
{% endif %}
{% endcall %}
