// Linear index of this workgroup among all that the host asked for. The host splits long
// dispatches and folds wide ones into y. `p.groups` is where this dispatch ends.
fn group_index(workgroup: vec3<u32>, count: vec3<u32>) -> u32 {
    return p.first_group + workgroup.y * count.x + workgroup.x;
}
