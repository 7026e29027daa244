{# result = the sum over i of left_i * right[at + i], both of `quads` vec4. Two independent chains
   avoid waiting. #}
{% macro dot_quads(result, left, right, at, quads) %}
        {
            var even = {{ left }}0 * {{ right }}[{{ at }}];
{% if quads > 1 %}
            var odd = {{ left }}1 * {{ right }}[{{ at }} + 1u];
{% endif %}
{% for i in range(2, quads) %}
{% set chain = "odd" if i % 2 else "even" %}
            {{ chain }} = {{ chain }} + {{ left }}{{ i }} * {{ right }}[{{ at }} + {{ i }}u];
{% endfor %}
            {{ result }} = dot({{ "even + odd" if quads > 1 else "even" }}, vec4<f32>(1.0));
        }
{% endmacro %}
