// Rotary position embedding: each pair of values of a head is turned by the angle of its token's position. X and Y [M, H * D].
{% if interleaved %}
// Pairs are neighbours: (2 i, 2 i + 1).
{% else %}
// Pairs are half a head apart: (i, i + D / 2).
{% endif %}
struct Params {
    first_group: u32,
    groups: u32,
    pairs: u32,     // of all values, M * H * D / 2
    row_pairs: u32, // of a token, H * D / 2
    half: u32,      // of a head, D / 2
    positions: u32, // rows of the table
    sign: f32,      // of the angle: -1 for the backward
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> cosines: array<f32>; // [positions, D / 2]
@group(0) @binding(2) var<storage, read> sines: array<f32>;   // [positions, D / 2]
@group(0) @binding(3) var<storage, read> position: array<u32>; // of each token
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

{% include "groups.wgsl" %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let group = group_index(workgroup, count);
    let pair = group * {{ threads }}u + thread;
    if (group >= p.groups || pair >= p.pairs) {
        return;
    }
    let i = pair % p.half;
{% if interleaved %}
    let first = 2u * pair;
    let second = first + 1u;
{% else %}
    let first = 2u * (pair - i) + i;
    let second = first + p.half;
{% endif %}
    let at = min(position[pair / p.row_pairs], p.positions - 1u) * p.half + i;
    let cosine = cosines[at];
    let sine = p.sign * sines[at];
    let a = x[first];
    let b = x[second];
    y[first] = a * cosine - b * sine;
    y[second] = b * cosine + a * sine;
}
