enable f16;
// Rows of X [M, K] as f16 for products by cooperative matrices. Each row is multiplied by the
// power of two that brings its largest value into [2^13, 2^14), and padded with zeros to a
// multiple of 64 values. {{ team }} threads own a row.
//
// Floor: the 4 M K bytes of X and the 2 M K bytes written, over the bandwidth. A row is read again
// while it is cached.

{% import "shared/entry.wgsl" as entry %}

{% include "rows/shared/row_largest.wgsl" %}

@group(0) @binding(2) var<storage, read_write> packed: array<vec4<f16>>;

{% call entry.each_group(threads) %}
    let own = group * {{ threads // team }}u + thread / {{ team }}u;
    let row = min(own, p.rows - 1u);
    let lane = thread % {{ team }}u;
    let row_factor = factor_of(largest_of(row, lane, thread));
    if (own >= p.rows) {
        return;
    }
    if (lane == 0u) {
        factor[row] = row_factor;
    }
    let quads = (p.k + 63u) / 64u * 16u;
    for (var q = lane; q < quads; q = q + {{ team }}u) {
{% if quads %}
        let at = row * (p.k >> 2u) + min(q, (p.k >> 2u) - 1u);
        let values = select(vec4<f32>(0.0), x[at], 4u * q < p.k);
{% else %}
        let place = vec4<u32>(4u * q) + vec4<u32>(0u, 1u, 2u, 3u);
        let at = min(place, vec4<u32>(p.k - 1u)) + vec4<u32>(row * p.k);
        let near = vec4<f32>(x[at.x], x[at.y], x[at.z], x[at.w]);
        let values = select(vec4<f32>(0.0), near, place < vec4<u32>(p.k));
{% endif %}
        packed[row * quads + q] = vec4<f16>(values * row_factor);
    }
{% endcall %}
