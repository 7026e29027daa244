enable f16;
// What the cooperative matrices of attention read of Q (or K, V, dO), X [M, H * D]: a row of f16 for every head and row, times a
// power of two from its own largest value, padded by zeros to {{ wide }} values and to whole tiles of rows:
// packed[plane][head][row][d].
{% if split %}
//
// As two f16, with 22 bits together: plane 0 has the value rounded to 11, plane 1 what is left.
{% else %}
//
// As one f16, in plane 2: behind what is packed in two.
{% endif %}

struct Params {
    first_group: u32,
    groups: u32,
    rows: u32,     // all heads' padded rows
    padded: u32,   // rows of a head
    count: u32,    // M, those of X
    heads: u32,    // H
    head_dim: u32, // D
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> packed: array<f16>;
@group(0) @binding(2) var<storage, read_write> factors: array<f32>; // of each packed row, 2^126 where there are only zeros; plane {{ 0 if split else 1 }}

{% include "row_teams.wgsl" %}
{% include "factor.wgsl" %}

fn one_row(row: u32, team: Team, mine: bool) {
    let head = row / p.padded;
    let m = row - head * p.padded;
    let begin = (m * p.heads + head) * p.head_dim;
    let end = select(0u, p.head_dim, m < p.count);
    var largest = 0.0;
    for (var d = team.lane; d < end; d = d + team.size) {
        largest = max(largest, abs(x[begin + d]));
    }
    let factor = factor_of(team_max(largest, team.thread));
    if (mine) {
        for (var d = team.lane; d < {{ wide }}u; d = d + team.size) {
            var value = 0.0;
            if (d < end) { value = x[begin + d] * factor; }
{% if split %}
            // Rounded to 11 bits, which all are f16's. By conversion to f16 and back it cannot be had: Mesa takes that for no change.
            let larger = bitcast<f32>((bitcast<u32>(value) + 0x1000u) & 0xffffe000u);
            packed[row * {{ wide }}u + d] = f16(larger);
            packed[(p.rows + row) * {{ wide }}u + d] = f16(value - larger);
{% else %}
            packed[(2u * p.rows + row) * {{ wide }}u + d] = f16(value);
{% endif %}
        }
        if (team.lane == 0u) { factors[{{ "row" if split else "p.rows + row" }}] = factor; }
    }
}
