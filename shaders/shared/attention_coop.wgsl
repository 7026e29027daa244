// How the attention kernels of cooperative matrices share work: a workgroup of four subgroups owns 64 rows (queries, or keys) of
// one head, 16 a subgroup, and goes over the other side 32 rows at a time. Both sides come from attention_pack, which pads
// them to whole tiles.
{% include "attention_params.wgsl" %}

// Scores, or results on their way out: [own row][other row].
var<workgroup> sums: array<f32, {{ 64 * sum_stride }}>;
// What follows from the scores, as the next product reads it: [own row][other row].
var<workgroup> weights: array<f16, {{ 64 * weight_stride }}>;
{{ least() }}

// Rows of a head as attention_pack pads them.
fn padded(rows: u32) -> u32 {
    return (rows + 63u) / 64u * 64u;
}

// Where a head's rows begin: those of Q and K in what is packed, and all of them in the factors.
struct Rows {
    head: u32,
    q: u32,
    d_o: u32,
    k: u32,
    v: u32,
}
