// Y[m, n] = X[m, n] * c[n] (+ D[m, n] or d[n]); with `divide`, X[m, n] / c[n].

struct Params {
    first_group: u32,
    groups: u32,
    len: u32,        // values of X
    columns: u32,    // N
    add_stride: u32, // stride from one row of D to the next, in values; 0: all rows share one
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> c: array<f32>;
@group(0) @binding(2) var<storage, read> d: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

{% include "shared/groups.wgsl" %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let group = group_index(workgroup, count);
    let i = group * {{ threads }}u + thread;
    if (group >= p.groups || i >= p.len) {
        return;
    }
    let row = i / p.columns;
    let column = i - row * p.columns;
    y[i] = x[i] {{ "/" if divide else "*" }} c[column]{{ " + d[row * p.add_stride + column]" if add }};
}
