// OUT [S, N] = s * the sums over the rows of A [M, N] (* B [M, N]), with one row of OUT for each
// `rows_each` rows: S = 1, or partial sums that a second pass adds up. A thread owns a column.
// `accumulate`: add to OUT.
{% import "shared/entry.wgsl" as entry %}

struct Params {
    first_group: u32,
    groups: u32,
    rows: u32,          // M
    rows_each: u32,     // rows per sum
    columns: u32,       // N
    column_groups: u32, // workgroups along N
    scale: f32,         // s
    accumulate: u32,    // 1: add to OUT
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> a: array<f32>;
@group(0) @binding(1) var<storage, read> b: array<f32>;
@group(0) @binding(2) var<storage, read_write> sums: array<f32>;

{% call entry.each_group(threads) %}
    let split = group / p.column_groups;
    let column = (group - split * p.column_groups) * {{ threads }}u + thread;
    if (column >= p.columns) {
        return;
    }
    let first = split * p.rows_each;
    let end = min(first + p.rows_each, p.rows);
    var sum = 0.0;
    for (var row = first; row < end; row = row + 1u) {
        let i = row * p.columns + column;
{% if product %}
        sum = sum + a[i] * b[i];
{% else %}
        sum = sum + a[i];
{% endif %}
    }
    sum = p.scale * sum;
    let to = split * p.columns + column;
    if (p.accumulate != 0u) { sum = sums[to] + sum; }
    sums[to] = sum;
{% endcall %}
