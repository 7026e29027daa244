{# Register tiles of 64 x 64 results by 64 threads, 8 x 8 a thread: `sum0_0` to `sum7_1`, of which `sumI_H` is row
   32 (I / 4) + 4 ty + I % 4, columns 32 H + 4 tx to + 3. Operands lie in workgroup memory as [k][row / 4] of four rows each. #}
{# From one k to the next; 17 spreads the banks. #}
{% set stride = 17 %}

{# Adds `steps` of the contracted index to the sums. #}
{% macro multiply(left, right, steps) %}
        for (var k = 0u; k < {{ steps }}u; k = k + 1u) {
            let a0 = vec4<f32>({{ left }}[k * {{ stride }}u + ty]);
            let a1 = vec4<f32>({{ left }}[k * {{ stride }}u + 8u + ty]);
            let b0 = vec4<f32>({{ right }}[k * {{ stride }}u + tx]);
            let b1 = vec4<f32>({{ right }}[k * {{ stride }}u + 8u + tx]);
{% for i in range(8) %}
            sum{{ i }}_0 = sum{{ i }}_0 + a{{ i // 4 }}.{{ "xyzw"[i % 4] }} * b0;
            sum{{ i }}_1 = sum{{ i }}_1 + a{{ i // 4 }}.{{ "xyzw"[i % 4] }} * b1;
{% endfor %}
        }
{% endmacro %}

{# Stores four rows (`quad`) by four values: VALUES0 to VALUES3 are the rows, transposed here. #}
{% macro stage(tile, row, values, type) %}
{% for j in range(4) %}
            {{ tile }}[({{ row }} + {{ j }}u) * {{ stride }}u + quad] = {{ type }}(vec4<f32>({{ values }}0.{{ "xyzw"[j] }}, {{ values }}1.{{ "xyzw"[j] }}, {{ values }}2.{{ "xyzw"[j] }}, {{ values }}3.{{ "xyzw"[j] }}));
{% endfor %}
{% endmacro %}
