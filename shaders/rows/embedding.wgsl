// y[t] = deq(W)[ids[t]]: the table rows of token ids. One invocation writes eight values of a
// token, if its row is in this part of the table.
{% import "shared/entry.wgsl" as entry %}

struct Params {
    first_group: u32,
    groups: u32,
    k: u32,
    tokens: u32,
    first_row: u32,  // of this part, in the table
    rows: u32,       // in this part
    table_rows: u32, // in all parts
    unused: u32,     // padding: the matrix starts at a multiple of 16 bytes
    m: Matrix,
}

{% include "shared/matrix_params.wgsl" %}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> ids: array<u32>;
@group(0) @binding(1) var<storage, read> w: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

{% include "shared/matrix.wgsl" %}

{% call entry.each_group(threads) %}
    let words = (p.k + 7u) >> 3u;
    let i = group * {{ threads }}u + thread;
    let token = i / words;
    let g = i - token * words;
    if (token >= p.tokens) {
        return;
    }
    let id = min(ids[token], p.table_rows - 1u);
    if (id < p.first_row || id - p.first_row >= p.rows) {
        return;
    }
    let values = weights8(id - p.first_row, g);
    let k = 8u * g;
    let out = token * p.k + k;
{% for half, first in [("lo", 0), ("hi", 4)] %}
{% for e in range(4) %}
    if (k + {{ first + e }}u < p.k) {
        y[out + {{ first + e }}u] = values.{{ half }}.{{ "xyzw"[e] }};
    }
{% endfor %}
{% endfor %}
{% endcall %}
