// Activations X [M, K], row-major, as `x`. `ragged`: K is no multiple of 8, so rows are read value by value and
// read as zero past K.
{% if ragged %}
fn x4(row: u32, q: u32) -> vec4<f32> {
    var values = vec4<f32>(0.0);
    let at = row * p.k + 4u * q;
    let left = p.k - min(p.k, 4u * q);
    if (left > 0u) { values.x = x[at]; }
    if (left > 1u) { values.y = x[at + 1u]; }
    if (left > 2u) { values.z = x[at + 2u]; }
    if (left > 3u) { values.w = x[at + 3u]; }
    return values;
}
{% else %}
fn x4(row: u32, q: u32) -> vec4<f32> {
    return x[row * (p.k >> 2u) + q];
}
{% endif %}
