// Y = X * W^T + bias + s * H * B^T for few rows of X ({{ tokens }} at most): a matrix-vector product, bound by reading W once.
//
// A team (a subgroup, or {{ team }} threads) owns a row of W at a time; its lanes stride K by eight weights.

{% include "qmatmul.wgsl" %}
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

{% include "matrix.wgsl" %}
{% set operand = "x" %}
{% include "rows.wgsl" %}
{% set all_rows = "p.n" %}
{% include "row_teams.wgsl" %}

// Row n of W against every row of X.
fn one_row(n: u32, team: Team, mine: bool) {
{% for t in range(tokens) %}
    let row{{ t }} = p.row + min({{ t }}u, p.rows - 1u);
    var y{{ t }} = 0.0;
{% endfor %}
    let words = (p.k + 7u) >> 3u;
    for (var g = team.lane; g < words; g = g + team.size) {
        let weights = weights8(n, g);
{% for t in range(tokens) %}
        y{{ t }} = y{{ t }} + (dot(x4(row{{ t }}, 2u * g), weights.lo) + dot(x4(row{{ t }}, 2u * g + 1u), weights.hi));
{% endfor %}
    }
    for (var j = team.lane; j < p.rank; j = j + team.size) {
        let scaled = b[(p.column + n) * p.rank + j] * p.lora_scale;
{% for t in range(tokens) %}
        y{{ t }} = y{{ t }} + h[row{{ t }} * p.rank + j] * scaled;
{% endfor %}
    }
    let stores = mine && team.lane == 0u;
    var offset = 0.0;
    if (stores && p.has_bias != 0u) {
        offset = bias[p.column + n];
    }
{% for t in range(tokens) %}
    let sum{{ t }} = team_sum(y{{ t }}, team.thread);
    if (stores && {{ t }}u < p.rows) {
        y[row{{ t }} * p.y_stride + p.column + n] = sum{{ t }} + offset;
    }
{% endfor %}
}
