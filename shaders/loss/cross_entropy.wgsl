// Softmax cross-entropy of logits [rows, K] (K = V, the vocabulary) with their labels:
// loss = log(sum(exp(logits))) - logits[label]. With `gradient` the logits become
// (softmax - onehot(label)) * scale. Both are 0 where the label is 0xffffffff. A team owns a row.
//
// Floor: 8 M V bytes over the bandwidth with `gradient`, 4 M V without. 5 M V FLOP and one
// exponential per logit take less time.
{% import "shared/row_quads.wgsl" as row_quads %}
{% import "shared/row_teams.wgsl" as row_teams %}

struct Params {
    first_group: u32,
    groups: u32,
    k: u32,        // V
    rows: u32,     // rows of these logits
    first: u32,    // place of the first row's label and loss
    gradient: u32, // 0: leave the logits as they are
    scale: f32,
}

{% set type = "f32" if ragged else "vec4<f32>" %}
{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> labels: array<u32>;
@group(0) @binding(1) var<storage, read_write> logits: array<{{ type }}>;
@group(0) @binding(2) var<storage, read_write> losses: array<f32>;

{{ row_quads.load("logits") }}
{{ row_quads.store("logits") }}

fn columns(q: u32) -> vec4<u32> {
    return vec4<u32>(4u * q) + vec4<u32>(0u, 1u, 2u, 3u);
}

// Four logits; the lowest number past the end.
fn known4(row: u32, q: u32) -> vec4<f32> {
{% if ragged %}
    return select(vec4<f32>(-3.4e38), logits4(row, q), columns(q) < vec4<u32>(p.k));
{% else %}
    return logits4(row, q);
{% endif %}
}

{% call row_teams.each_row() %}
    let quads = (p.k + 3u) >> 2u;
    var most = vec4<f32>(-3.4e38);
    for (var q = team.lane; q < quads; q = q + team.size) {
        most = max(most, known4(row, q));
    }
    let largest = team_max(max(max(most.x, most.y), max(most.z, most.w)), team.thread);

    // Sums of sums, because a row may have 10^5 terms.
    var sums = vec4<f32>(0.0);
    for (var start = team.lane; start < quads; start = start + 64u * team.size) {
        var part = vec4<f32>(0.0);
        let end = min(start + 64u * team.size, quads);
        for (var q = start; q < end; q = q + team.size) {
            part = part + exp(known4(row, q) - vec4<f32>(largest));
        }
        sums = sums + part;
    }
    let wanted = labels[p.first + row];
    let counts = wanted != 0xffffffffu;
    let label = min(wanted, p.k - 1u);
    // Read before the barriers of the sum; after them its place may be overwritten.
    let target4 = logits4(row, label >> 2u);
    let sum = team_sum((sums.x + sums.y) + (sums.z + sums.w), team.thread);

    if (mine && team.lane == 0u) {
        losses[p.first + row] = select(0.0, log(sum) + (largest - target4[label & 3u]), counts);
    }
    if (!mine || p.gradient == 0u) {
        return;
    }
    let zero = vec4<f32>(0.0);
    for (var q = team.lane; q < quads; q = q + team.size) {
        let softmax = exp(known4(row, q) - vec4<f32>(largest)) / sum;
        let onehot = select(zero, vec4<f32>(1.0), columns(q) == vec4<u32>(label));
        store_logits4(row, q, select(zero, (softmax - onehot) * p.scale, vec4<bool>(counts)));
    }
{% endcall %}
