// Y = deq(W) + s * B * A: rows of a matrix as f32, with an adapter merged in if there is one (rank
// > 0). One invocation writes eight values of a row.
{% import "shared/entry.wgsl" as entry %}

struct Params {
    first_group: u32,
    groups: u32,
    k: u32,
    first_row: u32, // first row of W, in this part
    rows: u32,      // rows to write
    column: u32,    // row of B for this part's first row of W
    rank: u32,
    lora_scale: f32,
    m: Matrix,
}

{% include "shared/matrix_params.wgsl" %}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> w: array<u32>;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

{% include "shared/matrix.wgsl" %}

{% call entry.each_group(threads) %}
    let words = (p.k + 7u) >> 3u;
    let i = group * {{ threads }}u + thread;
    let row = i / words;
    let g = i - row * words;
    if (row >= p.rows) {
        return;
    }
    let n = p.first_row + row;
    var values = weights8(n, g);
    let k = 8u * g;
    let last = p.k - 1u;
    for (var j = 0u; j < p.rank; j = j + 1u) {
        let scaled = b[(p.column + n) * p.rank + j] * p.lora_scale;
        let at = j * p.k;
{% for e in range(4) %}
{% for half, first in [("lo", 0), ("hi", 4)] %}
{% set value = "values." ~ half ~ "." ~ "xyzw"[e] %}
        {{ value }} = {{ value }} + scaled * a[at + min(k + {{ first + e }}u, last)];
{% endfor %}
{% endfor %}
    }
    let out = row * p.k + k;
{% for half, first in [("lo", 0), ("hi", 4)] %}
{% for e in range(4) %}
    if (k + {{ first + e }}u < p.k) {
        y[out + {{ first + e }}u] = values.{{ half }}.{{ "xyzw"[e] }};
    }
{% endfor %}
{% endfor %}
{% endcall %}
