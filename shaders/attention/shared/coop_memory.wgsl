// Parameters and workgroup memory of the cooperative-matrix attention kernels. Both sides come
// from attention_pack, which pads them to whole tiles.
{% include "attention/shared/params.wgsl" %}

// Scores, or results before they are stored: [own row][other row].
var<workgroup> sums: array<{{ "vec4<f32>" if staged else "f32" }}, {{ own_rows * sum_stride // unit }}>;
// Values derived from the scores, as the next product reads them: [own row][other row].
var<workgroup> weights: array<{{ "vec4<f16>" if staged else "f16" }}, {{ own_rows * weight_stride // unit }}>;
{{ least() }}

// Rows of a head, as attention_pack pads them.
fn padded(rows: u32) -> u32 {
    return (rows + 63u) / 64u * 64u;
}

// Which of the four rows from `other` on lie in the range that a row sees.
fn visible(other: u32, seen: vec2<u32>) -> vec4<bool> {
    let others = vec4<u32>(other) + vec4<u32>(0u, 1u, 2u, 3u);
    return (others >= vec4<u32>(seen.x)) & (others < vec4<u32>(seen.y));
}
