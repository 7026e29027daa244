// Given the sums of squares of runs of n gradients and their total, computes
// values = [norm, factor, loss, norms of the n gradients]
// with factor = min(1, max_norm / (norm + 1e-6)), or NaN if the norm or the loss is not finite.
{% import "shared/entry.wgsl" as entry %}

struct Params {
    first_group: u32,
    groups: u32,
    count: u32,    // n
    clip: u32,     // 0: the factor is 1 for finite gradients
    has_loss: u32,
    max_norm: f32,
    runs: u32,     // sums of squares per gradient
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> squares: array<f32>;
@group(0) @binding(1) var<storage, read> total: array<f32>;
@group(0) @binding(2) var<storage, read> loss: array<f32>;
// Stored as bits: WGSL can store a NaN, but not write it as a constant.
@group(0) @binding(3) var<storage, read_write> values: array<u32>;

fn is_finite(value: f32) -> bool {
    return (bitcast<u32>(value) & 0x7f800000u) != 0x7f800000u;
}

{% call entry.each_value(threads) %}
    if (i < p.count) {
        var sum = squares[i * p.runs];
        for (var run = 1u; run < p.runs; run = run + 1u) {
            sum = sum + squares[i * p.runs + run];
        }
        values[3u + i] = bitcast<u32>(sqrt(sum));
    }
    if (i > 0u) {
        return;
    }
    let norm = sqrt(total[0]);
    values[0] = bitcast<u32>(norm);
    var factor = bitcast<u32>(1.0);
    if (p.clip != 0u) {
        factor = bitcast<u32>(min(1.0, p.max_norm / (norm + 1e-6)));
    }
    var loss_bits = 0u;
    if (p.has_loss != 0u) {
        loss_bits = bitcast<u32>(loss[0]);
    }
    if (!is_finite(total[0]) || !is_finite(bitcast<f32>(loss_bits))) {
        factor = 0x7fc00000u;
    }
    values[1] = factor;
    values[2] = loss_bits;
{% endcall %}
