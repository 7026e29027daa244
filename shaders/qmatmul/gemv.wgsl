// Y = X * W^T + bias + s * H * B^T for few rows of X (at most {{ tokens }}): a matrix-vector
// product.
//
// Floor: bytes of W (K N / 2 and its scales) over the memory's bandwidth, or 2 M N K FLOP over the
// rate of f32, whichever is longer.
//
// {{ lanes }} threads share {{ rows }} rows of W. Each decodes
// {{ "32 weights of a row from one 16-byte load" if chunked else "8 weights of a row" }} at a time
// and multiplies them with X, which is staged in workgroup memory once for all rows. The number of
// threads that share rows, and so the order of a result's sums, depends on the rows of X alone.
{% import "shared/entry.wgsl" as entry %}
{% import "shared/row_quads.wgsl" as row_quads %}
{% set words = 4 if chunked else 1 %}
{# Quads of a row of X that are staged at a time. One quad of padding after every eight spreads the
   banks. #}
{% set quads_staged = lanes * words * 2 %}
{% set stride = quads_staged + quads_staged // 8 %}
{% set teams = threads // lanes %}
{# Rows of W whose sums are added up in workgroup memory at a time. #}
{% set batch = [rows, [1024 // (tokens * threads), 1] | max] | min %}

{# Scales are looked up when X is staged and their codes have arrived, unless there are too few
   registers to keep the loaded values. #}
{% set few_registers = tokens > 2 %}
{% macro look_up() %}
{% for r in range(rows) %}
        let scale{{ r }} = scale_from(stored_scale{{ r }});
{% if mins != "none" %}
        let low{{ r }} = min_from(stored_min{{ r }});
{% endif %}
{% endfor %}
{% endmacro %}

{% include "qmatmul/shared/forward.wgsl" %}

@group(0) @binding(5) var<storage, read> w4: array<vec4<u32>>; // W, bound again
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

{% include "shared/matrix.wgsl" %}

{{ row_quads.load("x") }}

var<workgroup> x_tile: array<vec4<f32>, {{ tokens * stride }}>;
// [row of W][row of X][thread]
var<workgroup> partial: array<f32, {{ batch * tokens * threads }}>;

{% call entry.each_group(threads) %}
    fill_codebook(thread);
{% if not chunked %}
    // The first weights are decoded before X is staged.
    workgroupBarrier();
{% endif %}
    let lane = thread % {{ lanes }}u;
    let n_base = group * {{ teams * rows }}u + thread / {{ lanes }}u;
    // Rows past the end repeat the last one and are not stored.
{% for r in range(rows) %}
    let n{{ r }} = min(n_base + {{ r * teams }}u, p.n - 1u);
{% for t in range(tokens) %}
    var sum{{ r }}_{{ t }} = 0.0;
{% endfor %}
{% endfor %}

    let quads = (p.k + 3u) >> 2u;
    let words = (p.k + 7u) >> 3u;
    for (var start = 0u; start < words; start = start + {{ lanes * words }}u) {
        // Loads of W run while X is staged. Past K the last weights are repeated, and X is zero.
{% if chunked %}
        let chunk = min((start >> 2u) + lane, (words - 1u) >> 2u);
{% for r in range(rows) %}
        var codes{{ r }} = codes_of(n{{ r }}, chunk);
        let block{{ r }} = block_of(n{{ r }}, 32u * chunk);
        let stored_scale{{ r }} = stored_scale(block{{ r }});
{% if mins != "none" %}
        let stored_min{{ r }} = stored_min(block{{ r }});
{% endif %}
{% endfor %}
{% else %}
        let word = min(start + lane, words - 1u);
{% for r in range(rows) %}
        let weights{{ r }} = weights8(n{{ r }}, word);
{% endfor %}
{% endif %}
        workgroupBarrier();
{{ look_up() if chunked and few_registers }}
{% set each = tokens * quads_staged // threads %}
        for (var turn = 0u; turn < {{ [each, 1] | max }}u; turn = turn + 1u) {
            let i = thread + turn * {{ threads }}u;
            let t = i / {{ quads_staged }}u;
            let local = i % {{ quads_staged }}u;
            let q = 2u * start + local;
            let values = x4(p.row + min(t, p.rows - 1u), min(q, quads - 1u));
{% if each == 0 %}
            if (t < {{ tokens }}u) {
{% else %}
            {
{% endif %}
                let at = t * {{ stride }}u + local + local / 8u;
                x_tile[at] = select(vec4<f32>(0.0), values, q < quads);
            }
        }
        workgroupBarrier();
{% if chunked %}
{{ look_up() if not few_registers }}
        for (var word = 0u; word < 4u; word = word + 1u) {
{% for r in range(rows) %}
            let lo{{ r }} = decode_low(codes{{ r }}.x);
            let hi{{ r }} = decode_high(codes{{ r }}.x);
            codes{{ r }} = codes{{ r }}.yzwx;
{% endfor %}
            let at = 9u * lane + 2u * word;
{% else %}
        {
{% for r in range(rows) %}
            let lo{{ r }} = weights{{ r }}.lo;
            let hi{{ r }} = weights{{ r }}.hi;
{% endfor %}
            let at = 2u * lane + lane / 4u;
{% endif %}
{% for t in range(tokens) %}
            {
                let a = x_tile[{{ t * stride }}u + at];
                let b = x_tile[{{ t * stride }}u + at + 1u];
{% if chunked and mins != "none" %}
                let x_sum = a.x + a.y + a.z + a.w + b.x + b.y + b.z + b.w;
{% endif %}
{% for r in range(rows) %}
{% if chunked %}
                var dot{{ r }} = a.x * lo{{ r }}.x;
{% for e in range(1, 8) %}
{% set x, weight = ("a", "lo") if e < 4 else ("b", "hi") %}
{% set part = "xyzw"[e % 4] %}
                dot{{ r }} = dot{{ r }} + {{ x }}.{{ part }} * {{ weight }}{{ r }}.{{ part }};
{% endfor %}
                sum{{ r }}_{{ t }} = sum{{ r }}_{{ t }} + dot{{ r }} * scale{{ r }};
{% if mins != "none" %}
                sum{{ r }}_{{ t }} = sum{{ r }}_{{ t }} + x_sum * low{{ r }};
{% endif %}
{% else %}
{% for e in range(8) %}
{% set x, weight = ("a", "lo") if e < 4 else ("b", "hi") %}
                sum{{ r }}_{{ t }} = sum{{ r }}_{{ t }}
                    + {{ x }}.{{ "xyzw"[e % 4] }} * {{ weight }}{{ r }}.{{ "xyzw"[e % 4] }};
{% endfor %}
{% endif %}
{% endfor %}
            }
{% endfor %}
        }
    }
    for (var j = lane; j < p.rank; j = j + {{ lanes }}u) {
{% for t in range(tokens) %}
        let h{{ t }} = h[(p.row + min({{ t }}u, p.rows - 1u)) * p.rank + j] * p.lora_scale;
{% endfor %}
{% for r in range(rows) %}
        let b{{ r }} = b[(p.column + n{{ r }}) * p.rank + j];
{% for t in range(tokens) %}
        sum{{ r }}_{{ t }} = sum{{ r }}_{{ t }} + h{{ t }} * b{{ r }};
{% endfor %}
{% endfor %}
    }

    // The threads' sums are added up, eight at a time and then the rest.
{% for first in range(0, rows, batch) %}
{% set some = [batch, rows - first] | min %}
    workgroupBarrier();
{% for r in range(some) %}
{% for t in range(tokens) %}
    partial[{{ (r * tokens + t) * threads }}u + thread] = sum{{ first + r }}_{{ t }};
{% endfor %}
{% endfor %}
    workgroupBarrier();
    finish({{ first }}u, {{ some }}u, group, thread);
{% endfor %}
{% endcall %}

// Adds up the sums in `partial` for `some` rows of each team, from row `first` on, and stores the
// results.
fn finish(first: u32, some: u32, group: u32, thread: u32) {
{% set pieces = lanes // 8 %}
    let results = some * {{ tokens * teams }}u;
{% if pieces > 1 %}
    // Eight neighbours become one, in the place of the first.
    for (var i = thread; i < results * {{ pieces }}u; i = i + {{ threads }}u) {
        var piece = 0.0;
        for (var e = 0u; e < 8u; e = e + 1u) {
            piece = piece + partial[8u * i + e];
        }
        partial[8u * i] = piece;
    }
    workgroupBarrier();
{% endif %}
    for (var i = thread; i < results; i = i + {{ threads }}u) {
        var result = 0.0;
{% set terms, apart = (pieces, 8) if pieces > 1 else (8, 1) %}
        for (var e = 0u; e < {{ terms }}u; e = e + 1u) {
            result = result + partial[{{ lanes }}u * i + {{ apart }}u * e];
        }
        let team = i % {{ teams }}u;
        let t = i / {{ teams }}u % {{ tokens }}u;
        let r = first + i / {{ teams * tokens }}u;
        let n = group * {{ teams * rows }}u + r * {{ teams }}u + team;
        if (n < p.n && t < p.rows) {
            if (p.bias_rows > 0u) {
                result = result + bias[bias_at(p.row + t, p.column + n)];
            }
            y[(p.row + t) * p.y_stride + p.column + n] = result;
        }
    }
}
