enable f16;
// What the cooperative matrices of attention read of Q (or K, V, dO), X [M, H * D]: for every head
// and row f16 times a power of two from the row's own largest value, padded by zeros to {{ wide }}
// values and to whole tiles of 16 x 16, each in one piece: packed[plane][head][row / 16][d /
// 16][row % 16][d % 16].
{{ "" }}
{% if split %}
// Two planes of f16, with 22 bits together: the value rounded to 11, and what is left.
{% endif %}
{% if whole %}
// A plane of values rounded to f16.
{% endif %}
{% if transposed %}
// A plane of values rounded to f16, for products that contract over rows: [row / 16][d / 16][d %
// 16][row % 16].
{% endif %}
{{ "" }}
// Floor: bytes of X and of the planes, (4 + 2 a plane) * M * H * D, over the memory's bandwidth; M
// * H * D FLOP.

struct Params {
    first_group: u32,
    groups: u32,
    rows: u32,       // all heads' padded rows
    padded: u32,     // rows of a head
    count: u32,      // M, those of X
    heads: u32,      // H
    head_quads: u32, // D / 4
    plane: u32,      // the first of X
    scales: u32,     // where those of X begin
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> packed: array<vec4<f16>>;
@group(0) @binding(2) var<storage, read_write> scales: array<f32>; // of each packed row, what its values are times; 2^-126 where there are only zeros

{% include "groups.wgsl" %}
{% include "factor.wgsl" %}

{% set quads = wide // 4 %}
{# Padding spreads the banks. #}
{% set stride = quads + 1 %}
// The workgroup's 16 rows, times their factors.
var<workgroup> rows: array<vec4<f32>, {{ 16 * stride }}>;
// The largest value of each thread's.
var<workgroup> largest: array<f32, 64>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let group = group_index(workgroup, count);
    if (group >= p.groups) {
        return;
    }
    // Four threads a row.
    let row = group * 16u + thread / 4u;
    let head = row / p.padded;
    let m = row - head * p.padded;
    let begin = (min(m, p.count - 1u) * p.heads + head) * p.head_quads;
    let at = thread / 4u * {{ stride }}u;
    var most = vec4<f32>(0.0);
{% for i in range(quads // 4) %}
    let quad{{ i }} = thread % 4u + {{ 4 * i }}u;
    let value{{ i }} = select(vec4<f32>(0.0), x[begin + min(quad{{ i }}, p.head_quads - 1u)], vec4<bool>(m < p.count && quad{{ i }} < p.head_quads));
    most = max(most, abs(value{{ i }}));
{% endfor %}
    largest[thread] = max(max(most.x, most.y), max(most.z, most.w));
    workgroupBarrier();
    let of_row = thread & ~3u;
    let factor = factor_of(max(max(largest[of_row], largest[of_row + 1u]), max(largest[of_row + 2u], largest[of_row + 3u])));
{% for i in range(quads // 4) %}
    rows[at + quad{{ i }}] = value{{ i }} * factor;
{% endfor %}
    // The inverse of a power of two, exactly.
    if (thread % 4u == 0u) { scales[p.scales + row] = bitcast<f32>(0x7f000000u - bitcast<u32>(factor)); }
    workgroupBarrier();

    // A vec4 of every tile.
    let first = p.plane * p.rows * {{ quads }}u + group * {{ 16 * quads }}u + thread;
    let plane = p.rows * {{ quads }}u;
{% for tile in range(wide // 16) %}
    {
{% if split or whole %}
        let value = rows[at + {{ 4 * tile }}u + thread % 4u];
{% if split %}
        // Rounded to 11 bits, which all are f16's. By conversion to f16 and back it cannot be had:
        // Mesa takes that for no change.
        let larger = bitcast<vec4<f32>>((bitcast<vec4<u32>>(value) + vec4<u32>(0x1000u)) & vec4<u32>(0xffffe000u));
        packed[first + {{ 64 * tile }}u] = vec4<f16>(larger);
        packed[first + {{ 64 * tile }}u + plane] = vec4<f16>(value - larger);
{% else %}
        packed[first + {{ 64 * tile }}u] = vec4<f16>(value);
{% endif %}
{% endif %}
{% if transposed %}
        // Of four rows one value each.
        let from_row = thread % 4u * {{ 4 * stride }}u + {{ 4 * tile }}u + thread / 16u;
        let e = thread / 4u % 4u;
        let column = vec4<f32>(rows[from_row][e], rows[from_row + {{ stride }}u][e], rows[from_row + {{ 2 * stride }}u][e], rows[from_row + {{ 3 * stride }}u][e]);
        packed[first + {{ 64 * tile }}u + {{ 2 if split else 1 if whole else 0 }}u * plane] = vec4<f16>(column);
{% endif %}
    }
{% endfor %}
}
