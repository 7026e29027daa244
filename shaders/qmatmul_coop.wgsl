enable f16;
enable wgpu_cooperative_matrix;
// Y = X * W^T + bias + s * H * B^T by cooperative matrices, {{ side }} rows of X by {{ side }} rows of W a workgroup. Tiles of X and W are staged
// in workgroup memory as f16, W decoded on the way: rows of X times a power of two from their own largest value, W times
// `m.factor`; undone at the end.
//
// Floor: 2 M N K FLOP over the rate of f16 matrices. X is read N / {{ side }} times, W is read and decoded M / {{ side }} times.
//
// The adapter's part is f32: it is small beside the rest, and may be much smaller or larger in value.
{{ "" }}
{% from "coop.wgsl" import depth, enter, begin_tile, accumulators, multiply, sums_memory, finish_tile, sums4 %}
{# Rows of a tile are padded by 8 values, which spreads the banks. #}
{% set stride = depth + 8 %}
{% set threads = side // 16 * lanes %}
{# Quads of X that a thread stages, one row in so many. #}
{% set x_step = threads // 8 %}
{% set x_each = side // x_step %}
{# Words of W that a thread stages: whole chunks of four words, or a part of one. #}
{% set words_each = side * 4 // threads %}
{% set sharing = [4 // words_each, 1] | max %}
{% set chunks_each = [words_each // 4, 1] | max %}
{% set chunk_words = [words_each, 4] | min %}

{% include "qmatmul.wgsl" %}
@group(0) @binding(5) var<storage, read> row_factor: array<f32>; // of X, a power of two a row
@group(0) @binding(6) var<storage, read> w4: array<vec4<u32>>;   // W again
@group(0) @binding(7) var<storage, read_write> y: array<{{ "vec4<f32>" if quads else "f32" }}>;

{% include "matrix.wgsl" %}
{% set operand = "x" %}
{% include "rows.wgsl" %}

// [row][k]
var<workgroup> x_tile: array<f16, {{ side * stride }}>;
var<workgroup> w_tile: array<f16, {{ side * stride }}>;
{{ sums_memory(side) }}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) subgroup_size: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
{{ enter("y", "vec4<f32>" if quads else "f32") }}
    fill_codebook(thread);
{{ begin_tile(side) }}
    let x_begin = piece_row * {{ stride }}u;
    let w_begin = piece_column * {{ stride }}u;
{{ accumulators(edge, side // 2, 32) }}

    // What this thread stages. Rows past the end repeat the last one.
    let quads = (p.k + 3u) >> 2u;
    let words = (p.k + 7u) >> 3u;
    let x_quad = thread % 8u;
    let x_local = thread / 8u;
{% for i in range(x_each) %}
    let row{{ i }} = p.row + min(row_base + x_local + {{ x_step * i }}u, p.rows - 1u);
    let factor{{ i }} = row_factor[row{{ i }}];
    var own{{ i }}: vec4<f32>;
{% endfor %}
    let w_local = thread / {{ sharing }}u;
    let w_part = thread % {{ sharing }}u * {{ chunk_words }}u;
{% for i in range(chunks_each) %}
    let n{{ i }} = min(column_base + w_local + {{ threads // sharing * i }}u, p.n - 1u);
{% if chunked %}
    var codes{{ i }}: vec4<u32>;
    var scale{{ i }}: f32;
    var low{{ i }}: f32;
{% endif %}
{% endfor %}
{# Loads what is staged from quad `start` on. Past K the last values come again, of which X's count as zero. #}
{% macro fetch(start) %}
{% for i in range(x_each) %}
        own{{ i }} = x4(row{{ i }}, min({{ start }} + x_quad, quads - 1u));
{% endfor %}
{% if chunked %}
        let chunk = min({{ start }} >> 3u, (words - 1u) >> 2u);
{% for i in range(chunks_each) %}
        codes{{ i }} = codes_of(n{{ i }}, chunk);
        let block{{ i }} = block_of(n{{ i }}, 32u * chunk);
        scale{{ i }} = scale_of(block{{ i }}) * p.m.factor;
{% if mins != "none" %}
        low{{ i }} = min_of(block{{ i }}) * p.m.factor;
{% endif %}
{% endfor %}
{% endif %}
{% endmacro %}
    {
{{ fetch("0u") }}
    }

    for (var start = 0u; start < quads; start = start + {{ depth // 4 }}u) {
        workgroupBarrier();
{% for i in range(x_each) %}
        {
            // Chunks of W fill whole stages.
            let values = {{ "own" ~ i ~ " * factor" ~ i if chunked else "select(vec4<f32>(0.0), own" ~ i ~ " * factor" ~ i ~ ", start + x_quad < quads)" }};
            let at = (x_local + {{ x_step * i }}u) * {{ stride }}u + 4u * x_quad;
{% for e in range(4) %}
            x_tile[at + {{ e }}u] = f16(values.{{ "xyzw"[e] }});
{% endfor %}
        }
{% endfor %}
{% for i in range(chunks_each) %}
        {
            let to = (w_local + {{ threads // sharing * i }}u) * {{ stride }}u + 8u * w_part;
{% if chunked and chunk_words == 2 %}
            let pair = select(codes{{ i }}.xy, codes{{ i }}.zw, w_part != 0u);
{% elif chunked and chunk_words == 1 %}
            let pair = select(codes{{ i }}.xz, codes{{ i }}.yw, (w_part & 1u) != 0u);
{% endif %}
{% for j in range(chunk_words) %}
            {
{% if not chunked %}
                let weights = weights8(n{{ i }}, min(start / 2u + w_part + {{ j }}u, words - 1u));
                let lo = weights.lo * p.m.factor;
                let hi = weights.hi * p.m.factor;
{% else %}
{% if chunk_words == 4 %}
                let word = codes{{ i }}.{{ "xyzw"[j] }};
{% elif chunk_words == 2 %}
                let word = pair.{{ "xy"[j] }};
{% else %}
                let word = select(pair.x, pair.y, w_part > 1u);
{% endif %}
                let lo = decode_low(word) * scale{{ i }}{{ " + low" ~ i if mins != "none" }};
                let hi = decode_high(word) * scale{{ i }}{{ " + low" ~ i if mins != "none" }};
{% endif %}
{% for e in range(8) %}
                w_tile[to + {{ 8 * j + e }}u] = f16({{ "lo" if e < 4 else "hi" }}.{{ "xyzw"[e % 4] }});
{% endfor %}
            }
{% endfor %}
        }
{% endfor %}
        workgroupBarrier();
        {
            let next = start + {{ depth // 4 }}u;
{{ fetch("next") }}
        }
{{ multiply(edge, side // 2, 32,
    {"name": "x_tile", "begin": "x_begin", "stride": stride, "along": true},
    {"name": "w_tile", "begin": "w_begin", "stride": stride, "along": true}) }}
    }

{{ finish_tile(edge, side) }}
}

// Stores 16 x 16 results, four of a row a thread.
fn finish(row_first: u32, column_first: u32, sums_begin: u32, lane: u32) {
    for (var turn = 0u; turn < {{ 64 // lanes }}u; turn = turn + 1u) {
        let i = lane + turn * {{ lanes }}u;
        let n = column_first + i % 4u * 4u;
        let local = row_first + i / 4u;
        let row = p.row + min(local, p.rows - 1u);
{% for j in range(4) %}
        let n{{ j }} = p.column + min(n + {{ j }}u, p.n - 1u);
{% endfor %}
{{ sums4("i / 4u", "i % 4u * 4u") }}
        var up = vec4<f32>(0.0);
{% if rank_quads %}
        let ranks = p.rank >> 2u;
        for (var j = 0u; j < ranks; j = j + 1u) {
            let left = h[row * ranks + j];
{% for c in range(4) %}
            let right{{ c }} = b[n{{ c }} * ranks + j];
{% endfor %}
{% for e in "xyzw" %}
            up = up + left.{{ e }} * vec4<f32>(right0.{{ e }}, right1.{{ e }}, right2.{{ e }}, right3.{{ e }});
{% endfor %}
        }
{% else %}
        for (var j = 0u; j < p.rank; j = j + 1u) {
            let right = vec4<f32>(b[n0 * p.rank + j], b[n1 * p.rank + j], b[n2 * p.rank + j], b[n3 * p.rank + j]);
            up = up + h[row * p.rank + j] * right;
        }
{% endif %}
        var value = sum * (1.0 / row_factor[row] / p.m.factor) + p.lora_scale * up;
        if (p.has_bias != 0u) {
            value = value + vec4<f32>(bias[n0], bias[n1], bias[n2], bias[n3]);
        }
        let to = row * p.y_stride + p.column + n;
        if (local < p.rows) {
{% if quads %}
            if (n < p.n) { y[to >> 2u] = value; }
{% else %}
{% for e in range(4) %}
            if (n + {{ e }}u < p.n) { y[to + {{ e }}u] = value.{{ "xyzw"[e] }}; }
{% endfor %}
{% endif %}
        }
    }
}
