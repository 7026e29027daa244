// Four values of a row of `{{ operand }}`, row-major with K values per row. `ragged`: K is not a
// multiple of 8, so rows are read value by value, and as zero past K.
{% if ragged %}
fn {{ operand }}4(row: u32, q: u32) -> vec4<f32> {
    var values = vec4<f32>(0.0);
    let at = row * p.k + 4u * q;
    let left = p.k - min(p.k, 4u * q);
    if (left > 0u) { values.x = {{ operand }}[at]; }
    if (left > 1u) { values.y = {{ operand }}[at + 1u]; }
    if (left > 2u) { values.z = {{ operand }}[at + 2u]; }
    if (left > 3u) { values.w = {{ operand }}[at + 3u]; }
    return values;
}
{% else %}
fn {{ operand }}4(row: u32, q: u32) -> vec4<f32> {
    return {{ operand }}[row * (p.k >> 2u) + q];
}
{% endif %}
