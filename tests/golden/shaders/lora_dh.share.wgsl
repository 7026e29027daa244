// lora_dh: software share tokens=1 ranks=8 threads=8 parts=1

// G = s * dY * B: [M, r] from dY [M, N] and B [N, r]; both row-major f32. Lanes run along r, so
// they read neighbouring values of B.
//
// Floor: the 4 M N bytes of dY over the bandwidth, or 2 M N r FLOP over the rate of f32.

struct Params {
    first_group: u32,
    groups: u32,
    k: u32,           // N of the layer: the contracted values
    rows: u32,        // M
    rank: u32,
    rank_groups: u32, // workgroups along the rank
    scale: f32,       // s
}

var<immediate> p: Params;
@group(0) @binding(0) var<storage, read> dy: array<f32>;
@group(0) @binding(1) var<storage, read> b: array<f32>;
@group(0) @binding(2) var<storage, read_write> g: array<f32>;

fn left1(row: u32, n: u32) -> f32 {
    return dy[row * p.k + n];
}

fn right4_0(j: u32, q: u32) -> vec4<f32> {
    let n = 4u * q;
    let row = vec4<u32>(n, n + 1u, n + 2u, n + 3u) * p.rank + j;
    return vec4<f32>(b[row.x], b[row.y], b[row.z], b[row.w]);
}

fn store_0(at: u32, sum: f32) {
    g[at] = p.scale * sum;
}

// A product with few columns, RESULT [M, r] = LEFT [M, K] * RIGHT [K, r], with 1 RIGHT at
// a time. It uses functions of the kernel:
//   left1(row, k)    LEFT[row, k]
//   right4_I(j, q)   RIGHT I[4q .. 4q + 4, j]; finite past K
//   mask_I(row, k)   with dropout: what LEFT[row, k] is multiplied by before it meets RIGHT I
//   store_I(at, sum) stores a value of RESULT I
// For software drivers: lanes along r, 1 rows of LEFT per invocation, no workgroup
// memory. Loads dominate the time.
// Each of eight lanes loads one value of eight, and broadcasts hand them round.

@compute @workgroup_size(8)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let group = p.first_group + workgroup.y * count.x + workgroup.x;
    if (group >= p.groups) {
        return;
    }
    let row_group = group / p.rank_groups;
    let row_base = row_group * 1u;
    let row0 = min(row_base + 0u, p.rows - 1u);

    let j = (group - row_group * p.rank_groups) * 8u + thread;
    let j0 = min(j, p.rank - 1u);
    var sum0_0 = 0.0;
    for (var k = 0u; k < p.k; k = k + 8u) {
        let lo0 = right4_0(j0, k >> 2u);
        let hi0 = right4_0(j0, (k >> 2u) + 1u);
        {
            let mine = left1(row0, k + lane);
            let value0 = mine;
            sum0_0 = fma(subgroupBroadcast(value0, 0u), lo0.x, sum0_0);
            sum0_0 = fma(subgroupBroadcast(value0, 1u), lo0.y, sum0_0);
            sum0_0 = fma(subgroupBroadcast(value0, 2u), lo0.z, sum0_0);
            sum0_0 = fma(subgroupBroadcast(value0, 3u), lo0.w, sum0_0);
            sum0_0 = fma(subgroupBroadcast(value0, 4u), hi0.x, sum0_0);
            sum0_0 = fma(subgroupBroadcast(value0, 5u), hi0.y, sum0_0);
            sum0_0 = fma(subgroupBroadcast(value0, 6u), hi0.z, sum0_0);
            sum0_0 = fma(subgroupBroadcast(value0, 7u), hi0.w, sum0_0);
        }
    }
    if (j < p.rank) {
        if (row_base + 0u < p.rows) {
            store_0(row0 * p.rank + j, sum0_0);
        }
    }
}
