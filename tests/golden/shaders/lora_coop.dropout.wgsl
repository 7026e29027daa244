// lora_coop: edge=16 lanes=32 vectors wide quads large=right dropout

enable f16;
enable wgpu_cooperative_matrix;
// OUT [P, Q] = s * the sum over c of L[p, c] * R[c, q] by cooperative matrices, where P or Q is a
// rank: the products with an adapter's matrices, and their gradients. A workgroup of four
// subgroups owns 16 x 64 of OUT, each subgroup 16 x 16, for a part
// of the contracted index. column_sum adds up the parts.
//
// Operands are staged as f16, multiplied by powers of two: one per row for [P, C] or [Q, C], and
// one that fits the whole part for [C, P] or [C, Q]. The larger operand, RIGHT, has
// row factors that other kernels share. Those of the other are computed here, for the part that is
// read.
//
// Floor: the bytes of the larger operand over the memory's bandwidth, because a rank is small.

struct Params {
    first_group: u32,
    groups: u32,
    rows: u32,          // P
    columns: u32,       // Q
    contracted: u32,    // C
    each: u32,          // contracted values per part
    row_groups: u32,    // workgroups along P
    column_groups: u32, // workgroups along Q
    scale: f32,         // s
    seed_low: u32,      // of the dropout
    seed_high: u32,
    drop_below: u32,    // values with a hash below this are dropped
    keep_scale: f32,    // 1: `scale` includes it
}

var<immediate> p: Params;
@group(0) @binding(0) var<storage, read> left: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> right: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> factor: array<f32>; // for each row of right
@group(0) @binding(3) var<storage, read_write> out: array<f32>;

// The power of two that brings a largest value into [2^13, 2^14). There f16 is most exact, and
// products with similar values, or with W (near 2^8), stay far from overflow in f32. 2^126 for
// zeros and subnormals, which a driver may flush.
fn factor_of(largest: f32) -> f32 {
    // Biased exponents of the largest value and of the factor, within the range of normal numbers.
    let exponent = i32(bitcast<u32>(largest) >> 23u) & 255;
    return bitcast<f32>(u32(clamp(127 + 13 + 127 - exponent, 1, 253)) << 23u);
}// Counter-based dropout: whether element i survives depends on (i, seed) alone, so that forward,
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

// [row of OUT][c] and [column of OUT][c]
var<workgroup> left_tile: array<f16, 640>;
var<workgroup> right_tile: array<f16, 2560>;
var<workgroup> sums: array<f32, 1088>;
var<workgroup> least: array<f32, 4>; // of each subgroup

fn least_of(value: f32, subgroup: u32) -> f32 {
    workgroupBarrier();
    least[subgroup] = subgroupMin(value);
    workgroupBarrier();
    return min(min(least[0], least[1]), min(least[2], least[3]));
}

fn left4(own: u32, c: u32) -> vec4<f32> {
    let row = min(c, p.contracted - 1u);
    let place = own;
    let at = row * p.rows + min(place, p.rows - 4u);
    let values = left[at >> 2u];
    return values;
}

fn right4(own: u32, c: u32) -> vec4<f32> {
    let row = min(c, p.contracted - 1u);
    let place = own;
    let at = row * p.columns + min(place, p.columns - 4u);
    let values = right[at >> 2u];
    let i = vec4<u32>(at, at + 1u, at + 2u, at + 3u);
    return values * vec4<f32>(
        dropout_factor(i.x), dropout_factor(i.y), dropout_factor(i.z), dropout_factor(i.w),
    );
}

@compute @workgroup_size(128)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) subgroup_size: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let group = p.first_group + workgroup.y * count.x + workgroup.x;
    if (group >= p.groups) {
        if (p.groups == 0u && thread == 0u) {
            out[0] = f32(f32(subgroup_size));
        }
        return;
    }
    let all_rows = group / p.column_groups;
    let part = all_rows / p.row_groups;
    let right_base = (group - all_rows * p.column_groups) * 64u;
    let left_base = (all_rows - part * p.row_groups) * 16u;
    let first = part * p.each;
    let part_end = min(first + p.each, p.contracted);
    let left_unit0 = thread + 0u;
    let left_c0 = left_unit0 % 16u * 2u;
    let left_local0 = left_unit0 / 16u * 4u;
    let left_own0 = left_base + left_local0;
    let right_unit0 = thread + 0u;
    let right_c0 = right_unit0 % 16u * 2u;
    let right_local0 = right_unit0 / 16u * 4u;
    let right_own0 = right_base + right_local0;
    let right_unit1 = thread + 128u;
    let right_c1 = right_unit1 % 16u * 2u;
    let right_local1 = right_unit1 / 16u * 4u;
    let right_own1 = right_base + right_local1;

    // Factors of right.
    var smallest = 0x1p126f;
    for (var c = first + thread; c < part_end; c = c + 128u) {
        smallest = min(smallest, factor[c]);
    }
    let right_least = least_of(smallest, subgroup);

    // Factors of left, from the values that this thread will stage. A part consists of
    // whole stages; past its end the last value is repeated.
    var most0 = vec4<f32>(0.0);
    let last_start = first + (part_end - 1u - first) / 32u * 32u;
    for (var begin = first; begin < part_end; begin = begin + 128u) {
        {
            let start = min(begin + 0u, last_start);
            let left_first0 =
                left4(left_own0, start + left_c0);
            let left_second0 =
                left4(left_own0, start + left_c0 + 1u);
            let first0 = abs(left_first0);
            let second0 = abs(left_second0);
            most0 = max(most0, max(first0, second0));
        }
        {
            let start = min(begin + 32u, last_start);
            let left_first0 =
                left4(left_own0, start + left_c0);
            let left_second0 =
                left4(left_own0, start + left_c0 + 1u);
            let first0 = abs(left_first0);
            let second0 = abs(left_second0);
            most0 = max(most0, max(first0, second0));
        }
        {
            let start = min(begin + 64u, last_start);
            let left_first0 =
                left4(left_own0, start + left_c0);
            let left_second0 =
                left4(left_own0, start + left_c0 + 1u);
            let first0 = abs(left_first0);
            let second0 = abs(left_second0);
            most0 = max(most0, max(first0, second0));
        }
        {
            let start = min(begin + 96u, last_start);
            let left_first0 =
                left4(left_own0, start + left_c0);
            let left_second0 =
                left4(left_own0, start + left_c0 + 1u);
            let first0 = abs(left_first0);
            let second0 = abs(left_second0);
            most0 = max(most0, max(first0, second0));
        }
    }
    let largest0 = max(max(most0.x, most0.y), max(most0.z, most0.w));
    var largest = 0.0;
    if (left_unit0 < 64u) {
        largest = max(largest, largest0);
    }
    let left_least = least_of(factor_of(largest), subgroup);

    // Start of this subgroup's piece.
    let left_begin = 0u;
    let right_begin = subgroup * 640u;
    var sum0_0 = coop_mat16x16<f32, C>();

    for (var start = first; start < part_end; start = start + 32u) {
        // Starts loads before the barrier.
        let left_first0 =
            left4(left_own0, start + left_c0);
        let left_second0 =
            left4(left_own0, start + left_c0 + 1u);
        let right_first0 =
            right4(right_own0, start + right_c0);
        let right_second0 =
            right4(right_own0, start + right_c0 + 1u);
        let right_first1 =
            right4(right_own1, start + right_c1);
        let right_second1 =
            right4(right_own1, start + right_c1 + 1u);
        workgroupBarrier();
        if (left_unit0 < 64u) {
            let c = start + left_c0;
            let to = left_local0 * 40u + left_c0;
            let first_scaled = left_first0 * left_least;
            let first = select(vec4<f32>(0.0), first_scaled, c < part_end);
            let second_scaled = left_second0 * left_least;
            let second = select(vec4<f32>(0.0), second_scaled, c + 1u < part_end);
            left_tile[to + 0u] = f16(first.x);
            left_tile[to + 1u] = f16(second.x);
            left_tile[to + 40u] = f16(first.y);
            left_tile[to + 41u] = f16(second.y);
            left_tile[to + 80u] = f16(first.z);
            left_tile[to + 81u] = f16(second.z);
            left_tile[to + 120u] = f16(first.w);
            left_tile[to + 121u] = f16(second.w);
        }
        {
            let c = start + right_c0;
            let to = right_local0 * 40u + right_c0;
            let first_scaled = right_first0 * right_least;
            let first = select(vec4<f32>(0.0), first_scaled, c < part_end);
            let second_scaled = right_second0 * right_least;
            let second = select(vec4<f32>(0.0), second_scaled, c + 1u < part_end);
            right_tile[to + 0u] = f16(first.x);
            right_tile[to + 1u] = f16(second.x);
            right_tile[to + 40u] = f16(first.y);
            right_tile[to + 41u] = f16(second.y);
            right_tile[to + 80u] = f16(first.z);
            right_tile[to + 81u] = f16(second.z);
            right_tile[to + 120u] = f16(first.w);
            right_tile[to + 121u] = f16(second.w);
        }
        {
            let c = start + right_c1;
            let to = right_local1 * 40u + right_c1;
            let first_scaled = right_first1 * right_least;
            let first = select(vec4<f32>(0.0), first_scaled, c < part_end);
            let second_scaled = right_second1 * right_least;
            let second = select(vec4<f32>(0.0), second_scaled, c + 1u < part_end);
            right_tile[to + 0u] = f16(first.x);
            right_tile[to + 1u] = f16(second.x);
            right_tile[to + 40u] = f16(first.y);
            right_tile[to + 41u] = f16(second.y);
            right_tile[to + 80u] = f16(first.z);
            right_tile[to + 81u] = f16(second.z);
            right_tile[to + 120u] = f16(first.w);
            right_tile[to + 121u] = f16(second.w);
        }
        workgroupBarrier();
        for (var k = 0u; k < 32u; k = k + 16u) {
            let a0 = coopLoadT<coop_mat16x16<f16, A>>(&left_tile[left_begin + 0u + k], 40u);
            let b0 = coopLoad<coop_mat16x16<f16, B>>(&right_tile[right_begin + 0u + k], 40u);
            sum0_0 = coopMultiplyAdd(a0, b0, sum0_0);
        }
    }

    let sums_begin = subgroup * 16u;
    {
        let at = sums_begin + 0u;
        let value = sum0_0;
        coopStoreT(value, &sums[at], 68u);
    }
    workgroupBarrier();
    for (var i = thread; i < 1024u; i = i + 128u) {
        let local_row = i / 64u;
        let local_column = i % 64u;
        let row = left_base + local_row;
        let column = right_base + local_column;
        if (row < p.rows && column < p.columns) {
            let left_factor = left_least;
            let right_factor = right_least;
            let undo = 1.0 / left_factor / right_factor;
            let sum = sums[local_row * 68u + local_column];
            out[(part * p.rows + row) * p.columns + column] = p.scale * (sum * undo);
        }
    }
}
