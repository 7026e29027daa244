// rms_norm: threads=64 team=32 group_rows=4

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

var<immediate> p: Params;
@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> w: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>;

fn x4(row: u32, q: u32) -> vec4<f32> {
    return x[row * (p.k >> 2u) + q];
}

fn w4(row: u32, q: u32) -> vec4<f32> {
    return w[row * (p.k >> 2u) + q];
}

fn store_y4(row: u32, q: u32, values: vec4<f32>) {
    y[row * (p.k >> 2u) + q] = values;
}

struct Team {
    lane: u32,   // of this thread in its team
    size: u32,   // threads
    thread: u32, // of this thread in the workgroup, for `team_sum` and `team_max`
}

var<workgroup> team_partial: array<f32, 64>;

fn team_sum(value: f32, thread: u32) -> f32 {
    workgroupBarrier();
    team_partial[thread] = value;
    workgroupBarrier();
    if ((thread & 31u) < 16u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 16u];
        team_partial[thread] = own + other;
    }
    workgroupBarrier();
    if ((thread & 31u) < 8u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 8u];
        team_partial[thread] = own + other;
    }
    workgroupBarrier();
    if ((thread & 31u) < 4u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 4u];
        team_partial[thread] = own + other;
    }
    workgroupBarrier();
    if ((thread & 31u) < 2u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 2u];
        team_partial[thread] = own + other;
    }
    workgroupBarrier();
    if ((thread & 31u) < 1u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 1u];
        team_partial[thread] = own + other;
    }
    workgroupBarrier();
    return team_partial[thread & ~31u];
}

fn team_max(value: f32, thread: u32) -> f32 {
    workgroupBarrier();
    team_partial[thread] = value;
    workgroupBarrier();
    if ((thread & 31u) < 16u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 16u];
        team_partial[thread] = max(own, other);
    }
    workgroupBarrier();
    if ((thread & 31u) < 8u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 8u];
        team_partial[thread] = max(own, other);
    }
    workgroupBarrier();
    if ((thread & 31u) < 4u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 4u];
        team_partial[thread] = max(own, other);
    }
    workgroupBarrier();
    if ((thread & 31u) < 2u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 2u];
        team_partial[thread] = max(own, other);
    }
    workgroupBarrier();
    if ((thread & 31u) < 1u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 1u];
        team_partial[thread] = max(own, other);
    }
    workgroupBarrier();
    return team_partial[thread & ~31u];
}

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

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let group = p.first_group + workgroup.y * count.x + workgroup.x;
    if (group >= p.groups) {
        return;
    }
    let subgroup = thread / 32u;
    let subgroups = 2u;
    let subgroup_size = 32u;
    let lane = thread % 32u;
    // A workgroup handles 4 rows, whatever the size of its subgroups.
    for (var i = 0u; i < 4u; i = i + subgroups) {
        // Teams past the last row repeat it and do not store.
        let wanted = group * 4u + i + subgroup;
        let mine = i + subgroup < 4u && wanted < p.rows;
        one_row(min(wanted, p.rows - 1u), Team(lane, subgroup_size, thread), mine);
    }
}
