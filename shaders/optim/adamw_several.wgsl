// One AdamW step of up to three tensors, each like in adamw.wgsl. A workgroup works on one of
// them.
{% import "shared/entry.wgsl" as entry %}
{% import "optim/shared/update.wgsl" as step %}

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

{# The step for tensor `t`, whose workgroups begin at `first`. #}
{% macro update_one(t, first) %}
        let i = (group - {{ first }}) * {{ threads }}u + thread;
        if (i < p.quads{{ t }}) {
{{ step.update(t) }}
        }
{% endmacro %}
{% call entry.each_group(threads) %}
    let bits = norm[1];
    if ((bits & 0x7f800000u) == 0x7f800000u) {
        return;
    }
    let factor = bitcast<f32>(bits);
    if (group < p.first1) {
{{ update_one(0, "0u") }}
    } else if (group < p.first2) {
{{ update_one(1, "p.first1") }}
    } else {
{{ update_one(2, "p.first2") }}
    }
{% endcall %}
