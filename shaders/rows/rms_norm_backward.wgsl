// Input gradient of y = x * rstd * w, for each row of K values, with rstd recomputed from x:
// dx = rstd * (w * dy - x * rstd^2 * mean(w * dy * x)). A team owns a row.
{% if adds %}
// Adds to the values in dx.
{% endif %}
//
// Floor: {{ 16 if adds else 12 }} M K bytes over the bandwidth: dy and x are read from memory
// once, dx is {{ "read and written" if adds else "written" }}. 9 M K FLOP take less time.
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
@group(0) @binding(0) var<storage, read> dy: array<{{ type }}>;
@group(0) @binding(1) var<storage, read> x: array<{{ type }}>;
@group(0) @binding(2) var<storage, read> w: array<{{ type }}>;
@group(0) @binding(3) var<storage, read_write> dx: array<{{ type }}>;

{{ row_quads.load("dy") }}
{{ row_quads.load("x") }}
{{ row_quads.load("w") }}
{% if adds %}
{{ row_quads.load("dx") }}
{% endif %}
{{ row_quads.store("dx") }}

{% call row_teams.each_row() %}
    let quads = (p.k + 3u) >> 2u;
    var squares = 0.0;
    var products = 0.0;
    for (var q = team.lane; q < quads; q = q + team.size) {
        let values = x4(row, q);
        squares = squares + dot(values, values);
        products = products + dot(values, w4(0u, q) * dy4(row, q));
    }
    let k = f32(p.k);
    let rstd = 1.0 / sqrt(team_sum(squares, team.thread) / k + p.eps);
    let along = team_sum(products, team.thread) / k * rstd * rstd;
    for (var q = team.lane; mine && q < quads; q = q + team.size) {
        let values = rstd * (w4(0u, q) * dy4(row, q) - along * x4(row, q));
{% if adds %}
        store_dx4(row, q, dx4(row, q) + values);
{% else %}
        store_dx4(row, q, values);
{% endif %}
    }
{% endcall %}
