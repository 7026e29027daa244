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
{% from "coop.wgsl" import depth, enter %}
{% from "coop_tiles.wgsl" import threads, octs, left_step, left_each, sharing, chunks_each, chunk_words, memory, begin, stage, multiply, finish_all, quads_wide, row_step, rows_each, four %}
{# Chunks of 32 columns, or words of eight, of a row of W, that a thread stages of one row in so many. #}
{% set units = threads // sharing %}

{% include "qmatmul_dx.wgsl" %}
@group(0) @binding(4) var<storage, read> row_factor: array<f32>; // of dY, a power of two a row
@group(0) @binding(5) var<storage, read> w4: array<vec4<u32>>;   // W again
@group(0) @binding(6) var<storage, read_write> dx: array<{{ "f32" if ragged else "vec4<f32>" }}>;

{% include "matrix.wgsl" %}
{% set operand = "a" %}
{% include "rows.wgsl" %}

{{ memory() }}
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
{{ begin() }}

    // What this thread stages. Rows and columns past the end repeat the last ones.
    let dy_oct = thread % {{ octs }}u;
    let dy_local = thread / {{ octs }}u;
{% for i in range(left_each) %}
    let row{{ i }} = p.row + min(row_base + dy_local + {{ left_step * i }}u, p.rows - 1u);
    let factor{{ i }} = row_factor[row{{ i }}];
    var lo{{ i }}: vec4<f32>;
    var hi{{ i }}: vec4<f32>;
{% endfor %}
    let w_part = thread % {{ sharing }}u * {{ chunk_words }}u;
{% for i in range(chunks_each) %}
    // Neighbours have two chunks of a few rows, whose stores fall into different banks.
    let unit{{ i }} = thread / {{ sharing }}u + {{ units * i }}u;
    let w_local{{ i }} = unit{{ i }} / 2u % {{ depth }}u;
    let w_chunk{{ i }} = unit{{ i }} % 2u + unit{{ i }} / {{ 2 * depth }}u * 2u;
{% if chunked %}
    var codes{{ i }}: vec4<u32>;
    var scale{{ i }}: f32;
    var low{{ i }}: f32;
{% endif %}
{% endfor %}
{# Loads what is staged from row `start` of W on. Past N the last row comes again, of which dY's values count as zero. #}
{% macro fetch(start) %}
{% for i in range(left_each) %}
        lo{{ i }} = dy4(row{{ i }}, {{ start }} + 8u * dy_oct);
        hi{{ i }} = dy4(row{{ i }}, {{ start }} + 8u * dy_oct + 4u);
{% endfor %}
{% if chunked %}
{% for i in range(chunks_each) %}
        let n{{ i }} = min({{ start }} + w_local{{ i }}, p.n - 1u);
        let chunk{{ i }} = min(column_base / 32u + w_chunk{{ i }}, (p.words - 1u) >> 2u);
        codes{{ i }} = codes_of(n{{ i }}, chunk{{ i }});
        let block{{ i }} = block_of(n{{ i }}, 32u * chunk{{ i }});
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

    for (var start = 0u; start < p.n; start = start + {{ depth }}u) {
        workgroupBarrier();
{% for i in range(left_each) %}
        {
            let lo = lo{{ i }} * factor{{ i }};
            let hi = hi{{ i }} * factor{{ i }};
{{ stage("left", "dy_local + " ~ left_step * i ~ "u", "dy_oct", "lo", "hi") }}
        }
{% endfor %}
{% for i in range(chunks_each) %}
        {
{% if chunked and chunk_words == 2 %}
            let pair = select(codes{{ i }}.xy, codes{{ i }}.zw, w_part != 0u);
{% elif chunked and chunk_words == 1 %}
            let pair = select(codes{{ i }}.xz, codes{{ i }}.yw, (w_part & 1u) != 0u);
{% endif %}
{% for j in range(chunk_words) %}
            {
{% if not chunked %}
                let n = min(start + w_local{{ i }}, p.n - 1u);
                let weights = weights8(n, min(column_base / 8u + 4u * w_chunk{{ i }} + w_part + {{ j }}u, p.words - 1u));
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
{{ stage("right", "w_local" ~ i, "4u * w_chunk" ~ i ~ " + w_part + " ~ j ~ "u", "lo", "hi") }}
            }
{% endfor %}
        }
{% endfor %}
        workgroupBarrier();
        {
            let next = start + {{ depth }}u;
{{ fetch("next") }}
        }
{{ multiply() }}
    }

{{ finish_all() }}
}

// Stores 16 rows of a subgroup's results, four of a row a thread at a time.
fn finish(row_first: u32, column_first: u32, sums_begin: u32, lane: u32) {
    let first_row = lane / {{ quads_wide }}u;
{% for i in range(rows_each) %}
    let local{{ i }} = row_first + first_row + {{ row_step * i }}u;
    let row{{ i }} = p.row + min(local{{ i }}, p.rows - 1u);
{% endfor %}
    let quad = lane % {{ quads_wide }}u;
    let q = column_first / 4u + quad;
    // Columns past the end are not stored, and read as the last ones.
    let near = min(q, (p.k - 1u) >> 2u);
{% for i in range(rows_each) %}
    var down{{ i }} = vec4<f32>(0.0);
{% endfor %}
{% if rank_quads %}
    for (var j = 0u; j < p.rank; j = j + 4u) {
{% for e in range(4) %}
        let right{{ e }} = a4(j + {{ e }}u, near);
{% endfor %}
{% for i in range(rows_each) %}
        let left{{ i }} = g[(row{{ i }} * p.rank + j) >> 2u];
{% for e in range(4) %}
        down{{ i }} = down{{ i }} + left{{ i }}.{{ "xyzw"[e] }} * right{{ e }};
{% endfor %}
{% endfor %}
    }
{% else %}
    for (var j = 0u; j < p.rank; j = j + 1u) {
        let right = a4(j, near);
{% for i in range(rows_each) %}
        down{{ i }} = down{{ i }} + g[row{{ i }} * p.rank + j] * right;
{% endfor %}
    }
{% endif %}
{% for i in range(rows_each) %}
    if (local{{ i }} < p.rows && 4u * q < p.k) {
        let sum = {{ four("first_row + " ~ row_step * i ~ "u", "quad") }};
        var value = sum * (1.0 / row_factor[row{{ i }}] / p.m.factor) + down{{ i }}{{ " * dropout_factor4(row" ~ i ~ ", 4u * q)" if dropout }};
        if (p.accumulate != 0u) { value = value + load4(row{{ i }}, q); }
        store4(row{{ i }}, q, value);
    }
{% endfor %}
}
