// y = x * rstd * w with rstd = 1 / sqrt(mean(x^2) + eps), for each row of K values. A team owns a
// row.
//
// Floor: 8 M K bytes over the bandwidth, because x is read from memory once and y is written. 4 M
// K FLOP take less time.

struct Params {
    first_group: u32,
    groups: u32,
    k: u32,
    rows: u32,
    eps: f32,
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> x: array<{{ "f32" if ragged else "vec4<f32>" }}>;
@group(0) @binding(1) var<storage, read> w: array<{{ "f32" if ragged else "vec4<f32>" }}>;
@group(0) @binding(2) var<storage, read_write> y: array<{{ "f32" if ragged else "vec4<f32>" }}>;

{% set operand = "x" %}
{% include "shared/rows.wgsl" %}
{% set operand = "w" %}
{% include "shared/rows.wgsl" %}
{% set operand = "y" %}
{% include "shared/store_rows.wgsl" %}
{% include "shared/row_teams.wgsl" %}

fn one_row(row: u32, team: Team, mine: bool) {
    let quads = (p.k + 3u) >> 2u;
    var squares = 0.0;
    for (var q = team.lane; q < quads; q = q + team.size) {
        let values = x4(row, q);
        squares = squares + dot(values, values);
    }
    let mean = team_sum(squares, team.thread) / f32(p.k);
    let rstd = 1.0 / sqrt(mean + p.eps);
    for (var q = team.lane; mine && q < quads; q = q + team.size) {
        store_y4(row, q, x4(row, q) * rstd * w4(0u, q));
    }
}
