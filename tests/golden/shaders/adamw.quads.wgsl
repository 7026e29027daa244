// adamw: threads=64

// One AdamW step, in place, on gradients multiplied by norm[1]; nothing changes if that is not
// finite.
//
// param *= decay; m += (g - m) * (1 - beta1); v = beta2 * v + (1 - beta2) * g^2;
// param -= step_size * m / (sqrt(v) / root2 + eps)

struct Params {
    first_group: u32,
    groups: u32,
    quads: u32,
    decay: f32,       // 1 - lr * weight_decay
    new1: f32,        // 1 - beta1
    beta2: f32,
    new2: f32,        // 1 - beta2
    step_size: f32,   // lr / (1 - beta1^t)
    root2: f32,       // sqrt(1 - beta2^t)
    eps: f32,
}

var<immediate> p: Params;
@group(0) @binding(0) var<storage, read_write> param: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> grad: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> m: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> v: array<vec4<f32>>;
// Read as bits to detect a NaN: WGSL may assume that there are none.
@group(0) @binding(4) var<storage, read> norm: array<u32>;

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
    let i = group * 64u + thread;
    if (i >= p.quads) {
        return;
    }
    let bits = norm[1];
    if ((bits & 0x7f800000u) == 0x7f800000u) {
        return;
    }
    let factor = bitcast<f32>(bits);
    let g = grad[i] * factor;
    let m_new = m[i] + (g - m[i]) * p.new1;
    let v_new = v[i] * p.beta2 + g * g * p.new2;
    m[i] = m_new;
    v[i] = v_new;
    let root = sqrt(v_new) / p.root2 + vec4<f32>(p.eps);
    param[i] = param[i] * p.decay - p.step_size * m_new / root;
}
