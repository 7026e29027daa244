// Parameters of the attention kernels, `AttentionParams` in src/kernels/attention.rs.
struct Params {
    first_group: u32,
    groups: u32,
    queries: u32,   // M, rows of Q and O
    keys: u32,      // rows of K and V
    heads: u32,     // H
    kv_heads: u32,  // of K and V; H / kv_heads consecutive query heads share one
    scale: f32,     // of the scores
    no_key: f32,    // log-sum-exp of a query that sees no key: minus infinity, which WGSL cannot spell
}

{{ param_space }} p: Params;

{% include "shared/groups.wgsl" %}
