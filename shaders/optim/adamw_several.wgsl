// One AdamW step of up to three tensors, each like in adamw.wgsl. A workgroup works on one of
// them.
{% from "optim/shared/update.wgsl" import update %}

struct Params {
    first_group: u32,
    groups: u32,
    first1: u32,      // first workgroup of the second tensor
    first2: u32,      // first workgroup of the third tensor
    quads0: u32,
    quads1: u32,
    quads2: u32,
    decay: f32,       // 1 - lr * weight_decay
    new1: f32,        // 1 - beta1
    beta2: f32,
    new2: f32,        // 1 - beta2
    step_size: f32,   // lr / (1 - beta1^t)
    root2: f32,       // sqrt(1 - beta2^t)
    eps: f32,
}

{{ param_space }} p: Params;
// Read as bits to detect a NaN: WGSL may assume that there are none.
@group(0) @binding(0) var<storage, read> norm: array<u32>;
{% for t in range(3) %}
@group(0) @binding({{ 4 * t + 1 }}) var<storage, read_write> param{{ t }}: array<vec4<f32>>;
@group(0) @binding({{ 4 * t + 2 }}) var<storage, read> grad{{ t }}: array<vec4<f32>>;
@group(0) @binding({{ 4 * t + 3 }}) var<storage, read_write> m{{ t }}: array<vec4<f32>>;
@group(0) @binding({{ 4 * t + 4 }}) var<storage, read_write> v{{ t }}: array<vec4<f32>>;
{% endfor %}

{% include "shared/groups.wgsl" %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let group = group_index(workgroup, count);
    let bits = norm[1];
    if (group >= p.groups || (bits & 0x7f800000u) == 0x7f800000u) {
        return;
    }
    let factor = bitcast<f32>(bits);
{% for t in range(3) %}
    {{ "if" if t == 0 else "} else if" }} ({{ "true" if t == 2 else "group < p.first" ~ (t + 1) }}) {
        let i = (group - {{ "0u" if t == 0 else "p.first" ~ t }}) * {{ threads }}u + thread;
        if (i < p.quads{{ t }}) {
{{ update(t, "factor") }}
        }
{% endfor %}
    }
}
