// y[slot + run] = scale * the sum of a run of {{ 4 * run_quads }} values of x, or of their squares.
// A team owns a run. The runs' sums are summed again until one is left.
{% import "shared/row_teams.wgsl" as row_teams %}

struct Params {
    first_group: u32,
    groups: u32,
    len: u32,  // values of x
    rows: u32, // runs
    slot: u32, // place of the first run's sum in y
    scale: f32,
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;

{% call row_teams.each_row() %}
    let quads = (p.len + 3u) >> 2u;
    let end = min((row + 1u) * {{ run_quads }}u, quads);
    var sums = vec4<f32>(0.0);
    for (var q = row * {{ run_quads }}u + team.lane; q < end; q = q + team.size) {
        // Buffers end at whole quads; values past the tensor's end don't count.
        let known = vec4<u32>(4u * q) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(p.len);
        let values = select(vec4<f32>(0.0), x[q], known);
{% if squares %}
        sums = sums + values * values;
{% else %}
        sums = sums + values;
{% endif %}
    }
    let sum = team_sum((sums.x + sums.y) + (sums.z + sums.w), team.thread);
    if (mine && team.lane == 0u) {
        y[p.slot + row] = p.scale * sum;
    }
{% endcall %}
