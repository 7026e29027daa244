{# Register tiles: `side` x `side` results by threads that own 8 x 8 each, `sum0_0` to `sum7_1`:
   sumI_H is row ty + I side / 8, columns 4 tx + H side / 2 to + 3. A thread's place is tx = thread
   % (side / 8), ty = thread / (side / 8).

   The left operand lies in workgroup memory as [row][contracted / 4]. So does the right one if its
   own memory runs along the contracted index (`multiply_rows`); otherwise it is
   [contracted][column / 4] (`multiply_columns`). Four values make one load, and one quad of
   padding per row spreads the banks. #}

{# Start of the right operand's row for column `n`. Columns that one thread reads at once are
   apart; columns that neighbouring threads read are side by side. #}
{% macro slot(n) -%}
({{ n }} % 4u * {{ side // 4 + 1 }}u + {{ n }} / 4u)
{%- endmacro %}

{% macro sums() %}
{% for i in range(8) %}
    var sum{{ i }}_0 = vec4<f32>(0.0);
    var sum{{ i }}_1 = vec4<f32>(0.0);
{% endfor %}
{% endmacro %}

{# Adds `quads` quads of the contracted index, as many as staged rows hold. #}
{% macro multiply_rows(left, right, quads) %}
        for (var k = 0u; k < {{ quads }}u; k = k + 1u) {
{% for h in range(2) %}
{% for j in range(4) %}
{% set column = j * (side // 4 + 1) + side // 8 * h %}
            let b{{ h }}{{ j }} =
                vec4<f32>({{ right }}[({{ column }}u + tx) * {{ quads + 1 }}u + k]);
{% endfor %}
{% endfor %}
{% for i in range(8) %}
            {
                let a = vec4<f32>({{ left }}[({{ side // 8 * i }}u + ty) * {{ quads + 1 }}u + k]);
{% for e in "xyzw" %}
{% for h in range(2) %}
                sum{{ i }}_{{ h }} = sum{{ i }}_{{ h }} + a.{{ e }} * vec4<f32>(
                    b{{ h }}0.{{ e }}, b{{ h }}1.{{ e }}, b{{ h }}2.{{ e }}, b{{ h }}3.{{ e }},
                );
{% endfor %}
{% endfor %}
            }
{% endfor %}
        }
{% endmacro %}

{% macro multiply_columns(left, right, quads) %}
        for (var k = 0u; k < {{ quads }}u; k = k + 1u) {
{% for e in range(4) %}
{% for h in range(2) %}
            let b{{ e }}{{ h }} = vec4<f32>({{ right }}[
                (4u * k + {{ e }}u) * {{ side // 4 + 1 }}u + {{ side // 8 * h }}u + tx
            ]);
{% endfor %}
{% endfor %}
{% for i in range(8) %}
            {
                let a = vec4<f32>({{ left }}[({{ side // 8 * i }}u + ty) * {{ quads + 1 }}u + k]);
{% for e in range(4) %}
{% for h in range(2) %}
                sum{{ i }}_{{ h }} = sum{{ i }}_{{ h }} + a.{{ "xyzw"[e] }} * b{{ e }}{{ h }};
{% endfor %}
{% endfor %}
            }
{% endfor %}
        }
{% endmacro %}

{# Four values of a row of an adapter's operand from rank j on, zero past the rank: one load, or
   four unconditional loads. #}
{% macro rank4(name) %}
fn {{ name }}4(row: u32, j: u32) -> vec4<f32> {
{% if rank_quads %}
    let values = {{ name }}[(row * p.rank + min(j, p.rank - 4u)) >> 2u];
    return select(vec4<f32>(0.0), values, j < p.rank);
{% else %}
    let ranks = vec4<u32>(j) + vec4<u32>(0u, 1u, 2u, 3u);
    let at = min(ranks, vec4<u32>(p.rank - 1u)) + vec4<u32>(row * p.rank);
    let values = vec4<f32>({{ name }}[at.x], {{ name }}[at.y], {{ name }}[at.z], {{ name }}[at.w]);
    return select(vec4<f32>(0.0), values, ranks < vec4<u32>(p.rank));
{% endif %}
}
{% endmacro %}
