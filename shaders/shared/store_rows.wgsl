// Stores four values of a row of `{{ operand }}`, as rows.wgsl reads them; values past K are left
// out.
{% if ragged %}
fn store_{{ operand }}4(row: u32, q: u32, values: vec4<f32>) {
    let at = row * p.k + 4u * q;
    let left = p.k - min(p.k, 4u * q);
{% for e in range(4) %}
    if (left > {{ e }}u) { {{ operand }}[at + {{ e }}u] = values.{{ "xyzw"[e] }}; }
{% endfor %}
}
{% else %}
fn store_{{ operand }}4(row: u32, q: u32, values: vec4<f32>) {
    {{ operand }}[row * (p.k >> 2u) + q] = values;
}
{% endif %}
