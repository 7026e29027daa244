{# Functions for four values of a row of a buffer, row-major with `p.k` values per row. `ragged`: K
   is not a multiple of 8, so rows are read and written value by value; past K values are read as
   zero and not written. #}

{# `NAME4(row, q)` reads values 4q to 4q + 3 of a row of buffer NAME. #}
{% macro load(name) %}
{% if ragged %}
fn {{ name }}4(row: u32, q: u32) -> vec4<f32> {
    var values = vec4<f32>(0.0);
    let at = row * p.k + 4u * q;
    let left = p.k - min(p.k, 4u * q);
    if (left > 0u) { values.x = {{ name }}[at]; }
    if (left > 1u) { values.y = {{ name }}[at + 1u]; }
    if (left > 2u) { values.z = {{ name }}[at + 2u]; }
    if (left > 3u) { values.w = {{ name }}[at + 3u]; }
    return values;
}
{% else %}
fn {{ name }}4(row: u32, q: u32) -> vec4<f32> {
    return {{ name }}[row * (p.k >> 2u) + q];
}
{% endif %}
{% endmacro %}

{# `store_NAME4(row, q, values)` writes them. #}
{% macro store(name) %}
{% if ragged %}
fn store_{{ name }}4(row: u32, q: u32, values: vec4<f32>) {
    let at = row * p.k + 4u * q;
    let left = p.k - min(p.k, 4u * q);
{% for e in range(4) %}
    if (left > {{ e }}u) { {{ name }}[at + {{ e }}u] = values.{{ "xyzw"[e] }}; }
{% endfor %}
}
{% else %}
fn store_{{ name }}4(row: u32, q: u32, values: vec4<f32>) {
    {{ name }}[row * (p.k >> 2u) + q] = values;
}
{% endif %}
{% endmacro %}
