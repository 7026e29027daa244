// y[slot + row] = the sum of the squares of one of {{ runs }} runs of one of up to 12 tensors; row
// = {{ runs }} * tensor + run. A team owns a row.
{% import "shared/row_teams.wgsl" as row_teams %}

struct Params {
    first_group: u32,
    groups: u32,
    rows: u32,
    slot: u32,        // place of the first sum in y
    lens0: vec4<u32>, // number of values of the first four tensors
    lens1: vec4<u32>,
    lens2: vec4<u32>,
}

{{ param_space }} p: Params;
{% for t in range(12) %}
@group(0) @binding({{ t }}) var<storage, read> x{{ t }}: array<vec4<f32>>;
{% endfor %}
@group(0) @binding(12) var<storage, read_write> y: array<f32>;

{% call row_teams.each_row() %}
    let tensor = row / {{ runs }}u;
    var sums = vec4<f32>(0.0);
{% for t in range(12) %}
    if (tensor == {{ t }}u) {
        let len = p.lens{{ t // 4 }}[{{ t % 4 }}];
        let quads = (len + 3u) >> 2u;
        let each = (quads + {{ runs - 1 }}u) / {{ runs }}u;
        let first = row % {{ runs }}u * each;
        let end = min(first + each, quads);
        for (var q = first + team.lane; q < end; q = q + team.size) {
            // Buffers end at whole quads; values past the tensor's end don't count.
            let known = vec4<u32>(4u * q) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(len);
            let values = select(vec4<f32>(0.0), x{{ t }}[q], known);
            sums = sums + values * values;
        }
    }
{% endfor %}
    let sum = team_sum((sums.x + sums.y) + (sums.z + sums.w), team.thread);
    if (mine && team.lane == 0u) {
        y[p.slot + row] = sum;
    }
{% endcall %}
