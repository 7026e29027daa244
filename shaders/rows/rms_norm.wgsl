// y = x * rstd * w with rstd = 1 / sqrt(mean(x^2) + eps), for each row of K values. A team owns a
// row.
//
// Floor: 8 M K bytes over the bandwidth, because x is read from memory once and y is written. 4 M
// K FLOP take less time.
{% import "shared/row_quads.wgsl" as row_quads %}
{% import "shared/row_teams.wgsl" as row_teams %}

struct Params {
    first_group: u32,
    groups: u32,
    k: u32,
    rows: u32,
    eps: f32,
}

{% set type = "f32" if ragged else "vec4<f32>" %}
{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> x: array<{{ type }}>;
@group(0) @binding(1) var<storage, read> w: array<{{ type }}>;
@group(0) @binding(2) var<storage, read_write> y: array<{{ type }}>;

{{ row_quads.load("x") }}
{{ row_quads.load("w") }}
{{ row_quads.store("y") }}

{% call row_teams.each_row() %}
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
{% endcall %}
