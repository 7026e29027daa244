// One invocation for every four values: the including shader's `quad(i)` handles values 4i to 4i +
// 3. Buffers end at whole quads, so the last one is always read and written whole. Include after
// `Params`, which holds `quads`.
{% set count, each = "p.quads", "quad" %}
{% include "shared/each.wgsl" %}
