// Y = X * W^T + bias + s * H * B^T, for software drivers: no workgroup memory, no barriers.
//
// Lanes run along N. One invocation owns {{ tokens }} rows of X by {{ columns }} columns of Y: a word of codes is decoded once and
// feeds {{ tokens }} rows, whose x are the same in all lanes and so load as scalars.
{{ "" }}
{% include "qmatmul.wgsl" %}
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

{% include "groups.wgsl" %}
{% include "matrix.wgsl" %}
{% include "x.wgsl" %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = group_index(workgroup, count);
    if (group >= p.groups) {
        return;
    }
    let row_group = group / p.column_groups;
    let n_base = (group - row_group * p.column_groups) * {{ threads * columns }}u + lane;
    let row_base = row_group * {{ tokens }}u;

    // Columns and rows past the end are computed from the last one and not stored.
{% for c in range(columns) %}
    let n{{ c }} = min(n_base + {{ c * threads }}u, p.n - 1u);
{% endfor %}
{% for t in range(tokens) %}
    let row{{ t }} = p.row + min(row_base + {{ t }}u, p.rows - 1u);
{% endfor %}
{% for t in range(tokens) %}{% for c in range(columns) %}
    var y{{ t }}_{{ c }} = 0.0;
{% endfor %}{% endfor %}

    let words = (p.k + 7u) >> 3u;
{% if kind == "quant" and not ragged %}
    // {{ words_per_scale }} words in a row share a scale: it is fetched once.
    for (var start = 0u; start < words; start = start + {{ words_per_scale }}u) {
{% for c in range(columns) %}
        let block{{ c }} = block_of(n{{ c }}, 8u * start);
        let scale{{ c }} = vec4<f32>(scale_of(block{{ c }}));
{% if mins != "none" %}
        let low{{ c }} = vec4<f32>(min_of(block{{ c }}));
{% endif %}
{% endfor %}
        for (var g = start; g < start + {{ words_per_scale }}u; g = g + 1u) {
{% for c in range(columns) %}
            let word{{ c }} = w[n{{ c }} * p.m.row_words + g];
{% if mins != "none" %}
            let lo{{ c }} = decode(low_codes(word{{ c }})) * scale{{ c }} + low{{ c }};
            let hi{{ c }} = decode(high_codes(word{{ c }})) * scale{{ c }} + low{{ c }};
{% else %}
            let lo{{ c }} = decode(low_codes(word{{ c }})) * scale{{ c }};
            let hi{{ c }} = decode(high_codes(word{{ c }})) * scale{{ c }};
{% endif %}
{% endfor %}
{% else %}
    {
        for (var g = 0u; g < words; g = g + 1u) {
{% for c in range(columns) %}
            let w{{ c }} = weights8(n{{ c }}, g);
            let lo{{ c }} = w{{ c }}.lo;
            let hi{{ c }} = w{{ c }}.hi;
{% endfor %}
{% endif %}
{% for t in range(tokens) %}
            {
                let a = x4(row{{ t }}, 2u * g);
                let c = x4(row{{ t }}, 2u * g + 1u);
{% for c in range(columns) %}
                y{{ t }}_{{ c }} = y{{ t }}_{{ c }} + (dot(a, lo{{ c }}) + dot(c, hi{{ c }}));
{% endfor %}
            }
{% endfor %}
        }
    }

    for (var j = 0u; j < p.rank; j = j + 1u) {
{% for c in range(columns) %}
        let b{{ c }} = b[(p.column + n{{ c }}) * p.rank + j] * p.lora_scale;
{% endfor %}
{% for t in range(tokens) %}
        {
            let a = h[row{{ t }} * p.rank + j];
{% for c in range(columns) %}
            y{{ t }}_{{ c }} = y{{ t }}_{{ c }} + a * b{{ c }};
{% endfor %}
        }
{% endfor %}
    }

{% for c in range(columns) %}
    if (n_base + {{ c * threads }}u < p.n) {
        var bias{{ c }} = 0.0;
        if (p.has_bias != 0u) {
            bias{{ c }} = bias[p.column + n{{ c }}];
        }
{% for t in range(tokens) %}
        if (row_base + {{ t }}u < p.rows) {
            y[row{{ t }} * p.y_stride + p.column + n{{ c }}] = y{{ t }}_{{ c }} + bias{{ c }};
        }
{% endfor %}
    }
{% endfor %}
}
