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
