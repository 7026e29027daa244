enable f16;
enable wgpu_cooperative_matrix;
// dX = dY * W + mask * (G * A) by cooperative matrices, {{ side }} rows of dY by {{ side }} columns of W a workgroup. Tiles of dY and W are
// staged in workgroup memory as f16, W decoded on the way: rows of dY times a power of two from their own largest value, W times
// `m.factor`; undone at the end.
//
// Floor: 2 M N K FLOP over the rate of f16 matrices. dY is read K / {{ side }} times, W is read and decoded M / {{ side }} times.
//
// The adapter's part is f32, as in the forward.
{{ "" }}
{% from "coop.wgsl" import depth, enter, begin_tile, accumulators, multiply, sums_memory, finish_tile, sums4 %}
{# Rows of a tile are padded by 8 values, which spreads the banks. #}
{% set stride = depth + 8 %}
{% set threads = side // 16 * lanes %}
{# Quads of dY that a thread stages, one row in so many. #}
{% set dy_step = threads // 8 %}
{% set dy_each = side // dy_step %}
{# A thread stages quads of two neighbouring rows of W, so that what it stores are pairs: one quad, or whole words. #}
{% set pairs = depth // 2 %}
{% set quads_each = pairs * side // 4 // threads %}
{% set words_each = quads_each // 2 %}
{# Scales of chunks of 32, where they are staged by themselves. #}
{% set scales_staged = depth * side // 32 %}

{% include "qmatmul_dx.wgsl" %}
@group(0) @binding(4) var<storage, read> row_factor: array<f32>; // of dY, a power of two a row
@group(0) @binding(5) var<storage, read> w4: array<vec4<u32>>;   // W again
@group(0) @binding(6) var<storage, read_write> dx: array<{{ "f32" if ragged else "vec4<f32>" }}>;

{% include "matrix.wgsl" %}
{% set operand = "a" %}
{% include "rows.wgsl" %}

var<workgroup> dy_tile: array<f16, {{ side * stride }}>; // [row][n]
var<workgroup> w_tile: array<f16, {{ side * stride }}>;  // [k][n]
{{ sums_memory(side) }}
{% if chunked %}
// Of this stage and of the next, times `m.factor`: [n][chunk].
var<workgroup> scale_tile: array<f32, {{ 2 * scales_staged }}>;
{% if mins != "none" %}
var<workgroup> min_tile: array<f32, {{ 2 * scales_staged }}>;
{% endif %}
{% endif %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) subgroup_size: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
{{ enter("dx", "f32" if ragged else "vec4<f32>") }}
    fill_codebook(thread);
{{ begin_tile(side) }}
    let dy_begin = piece_row * {{ stride }}u;
    let w_begin = piece_column * {{ stride }}u;
{{ accumulators(edge, side // 2, 32) }}

    // What this thread stages. Rows and columns past the end repeat the last ones.
    let dy_quad = thread % 8u;
    let dy_local = thread / 8u;
{% for i in range(dy_each) %}
    let row{{ i }} = p.row + min(row_base + dy_local + {{ dy_step * i }}u, p.rows - 1u);
    let factor{{ i }} = row_factor[row{{ i }}];
    var own{{ i }}: vec4<f32>;
{% endfor %}
    // Neighbours stage neighbouring pairs, whose stores fall into different banks.
    let pair = 2u * (thread % {{ pairs }}u);
    let w_quad = thread / {{ pairs }}u{{ " * " ~ quads_each ~ "u" if quads_each > 1 }};
{% for i in range([words_each, 1] | max) %}
    let word{{ i }} = min((column_base / 4u + w_quad) / 2u + {{ i }}u, p.words - 1u);
{% if chunked %}
    var first{{ i }}: u32;
    var second{{ i }}: u32;
{% endif %}
{% endfor %}
{# Loads what is staged from row `start` of W on. Past N the last values come again, of which dY's count as zero. #}
{% macro fetch(start) %}
{% for i in range(dy_each) %}
        own{{ i }} = dy4(row{{ i }}, {{ start }} + 4u * dy_quad);
{% endfor %}
{% if chunked %}
        let n0 = min({{ start }} + pair, p.n - 1u) * p.m.row_words;
        let n1 = min({{ start }} + pair + 1u, p.n - 1u) * p.m.row_words;
{% for i in range([words_each, 1] | max) %}
        first{{ i }} = w[n0 + word{{ i }}];
        second{{ i }} = w[n1 + word{{ i }}];
{% endfor %}
{% endif %}
{% endmacro %}
{# Stages the scales from row `start` of W on, in the half of their memory that `half` says. #}
{% macro stage_scales(start, half) %}
{% if chunked %}
        for (var i = thread; i < {{ scales_staged }}u; i = i + {{ threads }}u) {
            let n = min({{ start }} + i / {{ side // 32 }}u, p.n - 1u);
            let chunk = min(column_base / 32u + i % {{ side // 32 }}u, (p.words - 1u) >> 2u);
            let block = block_of(n, 32u * chunk);
            scale_tile[{{ half }} + i] = scale_of(block) * p.m.factor;
{% if mins != "none" %}
            min_tile[{{ half }} + i] = min_of(block) * p.m.factor;
{% endif %}
        }
{% endif %}
{% endmacro %}
    {
{{ fetch("0u") }}
{{ stage_scales("0u", "0u") }}
    }

    var half = 0u;
    for (var start = 0u; start < p.n; start = start + {{ depth }}u) {
        workgroupBarrier();
{% for i in range(dy_each) %}
        {
            let values = own{{ i }} * factor{{ i }};
            let at = (dy_local + {{ dy_step * i }}u) * {{ stride }}u + 4u * dy_quad;
{% for e in range(4) %}
            dy_tile[at + {{ e }}u] = f16(values.{{ "xyzw"[e] }});
{% endfor %}
        }
{% endfor %}
{% for i in range([words_each, 1] | max) %}
        {
            let to = 4u * (w_quad + {{ 2 * i }}u) * {{ stride }}u + pair;
{% if chunked %}
            let scales = half + pair * {{ side // 32 }}u + (w_quad + {{ 2 * i }}u) / 8u;
{% for which, name in [(0, "first"), (1, "second")] %}
            let scale{{ which }} = scale_tile[scales + {{ which * side // 32 }}u];
{% if mins != "none" %}
            let low{{ which }} = min_tile[scales + {{ which * side // 32 }}u];
{% endif %}
{% if words_each == 0 %}
            let {{ name }}_0 = decode_low({{ name }}{{ i }} >> (16u * (w_quad & 1u))) * scale{{ which }}{{ " + low" ~ which if mins != "none" }};
{% else %}
            let {{ name }}_0 = decode_low({{ name }}{{ i }}) * scale{{ which }}{{ " + low" ~ which if mins != "none" }};
            let {{ name }}_1 = decode_high({{ name }}{{ i }}) * scale{{ which }}{{ " + low" ~ which if mins != "none" }};
{% endif %}
{% endfor %}
{% else %}
{% for which, name in [(0, "first"), (1, "second")] %}
            let n{{ which }} = min(start + pair + {{ which }}u, p.n - 1u);
{% if words_each == 0 %}
            let {{ name }}_0 = weights4(n{{ which }}, min(column_base / 4u + w_quad, 2u * p.words - 1u)) * p.m.factor;
{% else %}
            let {{ name }} = weights8(n{{ which }}, word{{ i }});
            let {{ name }}_0 = {{ name }}.lo * p.m.factor;
            let {{ name }}_1 = {{ name }}.hi * p.m.factor;
{% endif %}
{% endfor %}
{% endif %}
{% for e in range(4 if words_each == 0 else 8) %}
            w_tile[to + {{ e * stride }}u] = f16(first_{{ e // 4 }}.{{ "xyzw"[e % 4] }});
            w_tile[to + {{ e * stride + 1 }}u] = f16(second_{{ e // 4 }}.{{ "xyzw"[e % 4] }});
{% endfor %}
        }
{% endfor %}
        workgroupBarrier();
        {
            let next = start + {{ depth }}u;
            half = {{ scales_staged }}u - half;
{{ fetch("next") }}
{{ stage_scales("next", "half") }}
        }
{{ multiply(edge, side // 2, 32,
    {"name": "dy_tile", "begin": "dy_begin", "stride": stride, "along": true},
    {"name": "w_tile", "begin": "w_begin", "stride": stride, "along": true}) }}
    }

{{ finish_tile(edge, side) }}
}

// Stores 16 x 16 results, four of a row a thread.
fn finish(row_first: u32, column_first: u32, sums_begin: u32, lane: u32) {
    for (var turn = 0u; turn < {{ 64 // lanes }}u; turn = turn + 1u) {
        let i = lane + turn * {{ lanes }}u;
        let q = column_first / 4u + i % 4u;
        let local = row_first + i / 4u;
        let row = p.row + min(local, p.rows - 1u);
        if (local < p.rows && 4u * q < p.k) {
            var down = vec4<f32>(0.0);
{% if rank_quads %}
            for (var j = 0u; j < p.rank; j = j + 4u) {
                let left = g[(row * p.rank + j) >> 2u];
{% for e in range(4) %}
                down = down + left.{{ "xyzw"[e] }} * a4(j + {{ e }}u, q);
{% endfor %}
            }
{% else %}
            for (var j = 0u; j < p.rank; j = j + 1u) {
                down = down + g[row * p.rank + j] * a4(j, q);
            }
{% endif %}
{{ sums4("i / 4u", "i % 4u * 4u") }}
            var value = sum * (1.0 / row_factor[row] / p.m.factor) + down{{ " * dropout_factor4(row, 4u * q)" if dropout }};
            if (p.accumulate != 0u) { value = value + load4(row, q); }
            store4(row, q, value);
        }
    }
}
