{# An AdamW step for quad `i` of a tensor, whose arrays' names end in `t`. Gradients are multiplied
   by `factor`. #}
{% macro update(t) %}
    let g = grad{{ t }}[i] * factor;
    let m_new = m{{ t }}[i] + (g - m{{ t }}[i]) * p.new1;
    let v_new = v{{ t }}[i] * p.beta2 + g * g * p.new2;
    m{{ t }}[i] = m_new;
    v{{ t }}[i] = v_new;
    let root = sqrt(v_new) / p.root2 + vec4<f32>(p.eps);
    param{{ t }}[i] = param{{ t }}[i] * p.decay - p.step_size * m_new / root;
{% endmacro %}
