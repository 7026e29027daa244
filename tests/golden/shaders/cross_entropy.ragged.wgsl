// cross_entropy: threads=256 team=256 group_rows=1 ragged

// Softmax cross-entropy of logits [rows, K] (K = V, the vocabulary) with their labels:
// loss = log(sum(exp(logits))) - logits[label]. With `gradient` the logits become
// (softmax - onehot(label)) * scale. Both are 0 where the label is 0xffffffff. A team owns a row.
//
// Floor: 8 M V bytes over the bandwidth with `gradient`, 4 M V without. 5 M V FLOP and one
// exponential per logit take less time.

struct Params {
    first_group: u32,
    groups: u32,
    k: u32,        // V
    rows: u32,     // rows of these logits
    first: u32,    // place of the first row's label and loss
    gradient: u32, // 0: leave the logits as they are
    scale: f32,
}

var<immediate> p: Params;
@group(0) @binding(0) var<storage, read> labels: array<u32>;
@group(0) @binding(1) var<storage, read_write> logits: array<f32>;
@group(0) @binding(2) var<storage, read_write> losses: array<f32>;

fn logits4(row: u32, q: u32) -> vec4<f32> {
    var values = vec4<f32>(0.0);
    let at = row * p.k + 4u * q;
    let left = p.k - min(p.k, 4u * q);
    if (left > 0u) { values.x = logits[at]; }
    if (left > 1u) { values.y = logits[at + 1u]; }
    if (left > 2u) { values.z = logits[at + 2u]; }
    if (left > 3u) { values.w = logits[at + 3u]; }
    return values;
}

fn store_logits4(row: u32, q: u32, values: vec4<f32>) {
    let at = row * p.k + 4u * q;
    let left = p.k - min(p.k, 4u * q);
    if (left > 0u) { logits[at + 0u] = values.x; }
    if (left > 1u) { logits[at + 1u] = values.y; }
    if (left > 2u) { logits[at + 2u] = values.z; }
    if (left > 3u) { logits[at + 3u] = values.w; }
}

fn columns(q: u32) -> vec4<u32> {
    return vec4<u32>(4u * q) + vec4<u32>(0u, 1u, 2u, 3u);
}

// Four logits; the lowest number past the end.
fn known4(row: u32, q: u32) -> vec4<f32> {
    return select(vec4<f32>(-3.4e38), logits4(row, q), columns(q) < vec4<u32>(p.k));
}

struct Team {
    lane: u32,   // of this thread in its team
    size: u32,   // threads
    thread: u32, // of this thread in the workgroup, for `team_sum` and `team_max`
}

var<workgroup> team_partial: array<f32, 256>;

fn team_sum(value: f32, thread: u32) -> f32 {
    workgroupBarrier();
    team_partial[thread] = value;
    workgroupBarrier();
    if ((thread & 255u) < 128u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 128u];
        team_partial[thread] = own + other;
    }
    workgroupBarrier();
    if ((thread & 255u) < 64u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 64u];
        team_partial[thread] = own + other;
    }
    workgroupBarrier();
    if ((thread & 255u) < 32u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 32u];
        team_partial[thread] = own + other;
    }
    workgroupBarrier();
    if ((thread & 255u) < 16u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 16u];
        team_partial[thread] = own + other;
    }
    workgroupBarrier();
    if ((thread & 255u) < 8u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 8u];
        team_partial[thread] = own + other;
    }
    workgroupBarrier();
    if ((thread & 255u) < 4u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 4u];
        team_partial[thread] = own + other;
    }
    workgroupBarrier();
    if ((thread & 255u) < 2u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 2u];
        team_partial[thread] = own + other;
    }
    workgroupBarrier();
    if ((thread & 255u) < 1u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 1u];
        team_partial[thread] = own + other;
    }
    workgroupBarrier();
    return team_partial[thread & ~255u];
}

fn team_max(value: f32, thread: u32) -> f32 {
    workgroupBarrier();
    team_partial[thread] = value;
    workgroupBarrier();
    if ((thread & 255u) < 128u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 128u];
        team_partial[thread] = max(own, other);
    }
    workgroupBarrier();
    if ((thread & 255u) < 64u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 64u];
        team_partial[thread] = max(own, other);
    }
    workgroupBarrier();
    if ((thread & 255u) < 32u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 32u];
        team_partial[thread] = max(own, other);
    }
    workgroupBarrier();
    if ((thread & 255u) < 16u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 16u];
        team_partial[thread] = max(own, other);
    }
    workgroupBarrier();
    if ((thread & 255u) < 8u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 8u];
        team_partial[thread] = max(own, other);
    }
    workgroupBarrier();
    if ((thread & 255u) < 4u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 4u];
        team_partial[thread] = max(own, other);
    }
    workgroupBarrier();
    if ((thread & 255u) < 2u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 2u];
        team_partial[thread] = max(own, other);
    }
    workgroupBarrier();
    if ((thread & 255u) < 1u) {
        let own = team_partial[thread];
        let other = team_partial[thread + 1u];
        team_partial[thread] = max(own, other);
    }
    workgroupBarrier();
    return team_partial[thread & ~255u];
}

fn one_row(row: u32, team: Team, mine: bool) {
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
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let group = p.first_group + workgroup.y * count.x + workgroup.x;
    if (group >= p.groups) {
        return;
    }
    let subgroup = thread / 256u;
    let subgroups = 1u;
    let subgroup_size = 256u;
    let lane = thread % 256u;
    // A workgroup handles 1 rows, whatever the size of its subgroups.
    for (var i = 0u; i < 1u; i = i + subgroups) {
        // Teams past the last row repeat it and do not store.
        let wanted = group * 1u + i + subgroup;
        let mine = i + subgroup < 1u && wanted < p.rows;
        one_row(min(wanted, p.rows - 1u), Team(lane, subgroup_size, thread), mine);
    }
}
