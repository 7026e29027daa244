// lora_down: dropout subgroups tokens=2 ranks=1 threads=256 parts=2

// H = X * A^T with dropout on X: [M, r] from X [M, K] and A [r, K]; both row-major f32. Computes
// up to three A at a time, which read the same X and drop different values of it.
//
// Floor: the 4 M K bytes of X over the bandwidth, or 2 M K r FLOP per A over the rate of f32.

struct Params {
    first_group: u32,
    groups: u32,
    k: u32,
    rows: u32,        // M
    rank: u32,        // of every A
    rank_groups: u32, // workgroups along the rank
    seed_low: u32,    // of the dropout of the first A
    seed_high: u32,
    seed_low1: u32,   // of the second
    seed_high1: u32,
    seed_low2: u32,   // of the third
    seed_high2: u32,
    drop_below: u32,  // values with a hash below this are dropped
    keep_scale: f32,  // 1 / (1 - probability)
}

var<immediate> p: Params;
@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> a1: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> a2: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> h: array<f32>;
@group(0) @binding(5) var<storage, read_write> h1: array<f32>;
@group(0) @binding(6) var<storage, read_write> h2: array<f32>;

// Counter-based dropout: whether element i survives depends on (i, seed) alone, so that forward,
// backward, every device and every tier agree. The hash is pcg3d (Jarzynski and Olano, "Hash
// Functions for GPU Rendering", 2020).
fn dropout_factor_of(i: u32, seed_low: u32, seed_high: u32) -> f32 {
    var v = vec3<u32>(i, seed_low, seed_high) * 1664525u + vec3<u32>(1013904223u);
    v.x = v.x + v.y * v.z;
    v.y = v.y + v.z * v.x;
    v.z = v.z + v.x * v.y;
    v = v ^ (v >> vec3<u32>(16u));
    v.x = v.x + v.y * v.z;
    return select(0.0, p.keep_scale, v.x >= p.drop_below);
}

fn dropout_factor(i: u32) -> f32 {
    return dropout_factor_of(i, p.seed_low, p.seed_high);
}

fn a4(row: u32, q: u32) -> vec4<f32> {
    return a[row * (p.k >> 2u) + q];
}

// Dropout factor of an element of X, for this A.
fn mask_0(row: u32, k: u32) -> f32 {
    let i = row * p.k + k;
    return dropout_factor_of(i, p.seed_low, p.seed_high);
}

fn right4_0(j: u32, q: u32) -> vec4<f32> {
    return a4(j, q);
}

fn store_0(at: u32, sum: f32) {
    h[at] = sum;
}

fn a14(row: u32, q: u32) -> vec4<f32> {
    return a1[row * (p.k >> 2u) + q];
}

// Dropout factor of an element of X, for this A.
fn mask_1(row: u32, k: u32) -> f32 {
    let i = row * p.k + k;
    return dropout_factor_of(i, p.seed_low1, p.seed_high1);
}

fn right4_1(j: u32, q: u32) -> vec4<f32> {
    return a14(j, q);
}

fn store_1(at: u32, sum: f32) {
    h1[at] = sum;
}

fn x4(row: u32, q: u32) -> vec4<f32> {
    return x[row * (p.k >> 2u) + q];
}

fn left4(row: u32, q: u32) -> vec4<f32> {
    return x4(row, q);
}

// A product with few columns, RESULT [M, r] = LEFT [M, K] * RIGHT [K, r], with 2 RIGHT at
// a time. It uses functions of the kernel:
//   left4(row, q)    LEFT[row, 4q .. 4q + 4]; zero past K
//   right4_I(j, q)   RIGHT I[4q .. 4q + 4, j]; finite past K
//   mask_I(row, k)   with dropout: what LEFT[row, k] is multiplied by before it meets RIGHT I
//   store_I(at, sum) stores a value of RESULT I
// A workgroup owns 2 rows by 1 columns of the result. Its threads stride K,
// then the partial sums are added up.

// One partial sum per team (a subgroup of at least four threads, or a thread) for each of the
// 2 results.
var<workgroup> partial: array<f32, 128>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let group = p.first_group + workgroup.y * count.x + workgroup.x;
    if (group >= p.groups) {
        return;
    }
    let row_group = group / p.rank_groups;
    let row_base = row_group * 2u;
    let quads = (p.k + 3u) >> 2u;
    let row0 = min(row_base + 0u, p.rows - 1u);
    let row1 = min(row_base + 1u, p.rows - 1u);

    let j0 = (group - row_group * p.rank_groups) * 1u;
    let rank0 = min(j0 + 0u, p.rank - 1u);
    var sum0_0_0 = 0.0;
    var sum0_0_1 = 0.0;
    var sum1_0_0 = 0.0;
    var sum1_0_1 = 0.0;
    for (var q = thread; q < quads; q = q + 256u) {
        let right0_0 = right4_0(rank0, q);
        let right0_1 = right4_1(rank0, q);
        {
            let values = left4(row0, q);
            let values0 = values * vec4<f32>(
                mask_0(row0, 4u * q + 0u),
                mask_0(row0, 4u * q + 1u),
                mask_0(row0, 4u * q + 2u),
                mask_0(row0, 4u * q + 3u),
            );
            sum0_0_0 =
                sum0_0_0 + dot(values0, right0_0);
            let values1 = values * vec4<f32>(
                mask_1(row0, 4u * q + 0u),
                mask_1(row0, 4u * q + 1u),
                mask_1(row0, 4u * q + 2u),
                mask_1(row0, 4u * q + 3u),
            );
            sum0_0_1 =
                sum0_0_1 + dot(values1, right0_1);
        }
        {
            let values = left4(row1, q);
            let values0 = values * vec4<f32>(
                mask_0(row1, 4u * q + 0u),
                mask_0(row1, 4u * q + 1u),
                mask_0(row1, 4u * q + 2u),
                mask_0(row1, 4u * q + 3u),
            );
            sum1_0_0 =
                sum1_0_0 + dot(values0, right0_0);
            let values1 = values * vec4<f32>(
                mask_1(row1, 4u * q + 0u),
                mask_1(row1, 4u * q + 1u),
                mask_1(row1, 4u * q + 2u),
                mask_1(row1, 4u * q + 3u),
            );
            sum1_0_1 =
                sum1_0_1 + dot(values1, right0_1);
        }
    }
    let row = row_base + thread / 1u;
    let j = j0 + thread % 1u;
    let mine = thread < 2u && row < p.rows && j < p.rank;
    let teams = subgroups;
    let team0_0_0 = subgroupAdd(sum0_0_0);
    if (lane == 0u) { partial[0u + subgroup] = team0_0_0; }
    let team1_0_0 = subgroupAdd(sum1_0_0);
    if (lane == 0u) { partial[64u + subgroup] = team1_0_0; }
    workgroupBarrier();
    if (mine) {
        var sum = 0.0;
        for (var team = 0u; team < teams; team = team + 1u) {
            sum = sum + partial[thread * 64u + team];
        }
        store_0(row * p.rank + j, sum);
    }
    workgroupBarrier();
    let team0_0_1 = subgroupAdd(sum0_0_1);
    if (lane == 0u) { partial[0u + subgroup] = team0_0_1; }
    let team1_0_1 = subgroupAdd(sum1_0_1);
    if (lane == 0u) { partial[64u + subgroup] = team1_0_1; }
    workgroupBarrier();
    if (mine) {
        var sum = 0.0;
        for (var team = 0u; team < teams; team = team + 1u) {
            sum = sum + partial[thread * 64u + team];
        }
        store_1(row * p.rank + j, sum);
    }
}
