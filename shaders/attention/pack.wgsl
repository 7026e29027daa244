enable f16;
// Packs Q, K, V and, if `backward`, dO for attention by cooperative matrices, each [M, H * D]. For
// every head and row, values become f16 times a power of two found from the row's own largest
// value. Rows are padded with zeros to {{ wide }} values and to whole tiles of 16 x 16. Each tile
// is contiguous: packed[plane][head][row / 16][d / 16][row % 16][d % 16].
//
// Q and K have two planes of f16, with 22 bits together: the value rounded to 11 bits, and the
// remainder. V and dO have one plane of values rounded to f16. Products that contract over rows
// read a transposed plane: [row / 16][d / 16][d % 16][row % 16].
//
// Floor: bytes of the input and of its planes, (4 + 2 per plane) * M * H * D each, over the
// memory's bandwidth; M * H * D FLOP each.
{% import "shared/entry.wgsl" as entry %}

struct Params {
    first_group: u32,
    groups: u32,
    queries: u32,    // M of Q and dO
    keys: u32,       // M of K and V
    heads: u32,      // H of Q and dO
    kv_heads: u32,   // H of K and V
    head_quads: u32, // D / 4
}

{{ param_space }} p: Params;
@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> d_o: array<vec4<f32>>; // unused, unless `backward`
@group(0) @binding(4) var<storage, read_write> queries: array<vec4<f16>>; // planes of Q, of dO
@group(0) @binding(5) var<storage, read_write> keys: array<vec4<f16>>;    // planes of K, of V
// The factors of a packed row's values: of Q, then dO, or of K, then V. 2^-126 for a row of zeros.
@group(0) @binding(6) var<storage, read_write> query_scales: array<f32>;
@group(0) @binding(7) var<storage, read_write> key_scales: array<f32>;

{% include "shared/factor.wgsl" %}

{% set quads = wide // 4 %}
{# Padding spreads the banks. #}
{% set stride = quads + 1 %}
{# In the order of their workgroups: the tensor, the group before which its workgroups end, its
   side, whether its scales are the second ones there, its first plane, and its planes. #}
{% set tensors = [
    {
        "name": "q", "end": "k_first", "side": "query", "second": false,
        "plane": 0, "split": true, "whole": false, "transposed": backward,
    },
    {
        "name": "k", "end": "v_first", "side": "key", "second": false,
        "plane": 0, "split": true, "whole": false, "transposed": backward,
    },
    {
        "name": "v", "end": "do_first", "side": "key", "second": true,
        "plane": 3 if backward else 2, "split": false, "whole": backward,
        "transposed": not backward,
    },
    {
        "name": "d_o", "end": "p.groups", "side": "query", "second": true,
        "plane": 3, "split": false, "whole": true, "transposed": true,
    },
] %}
{% set tensors = tensors if backward else tensors[:3] %}
{% macro pack(packed, tensor) %}
{% for tile in range(wide // 16) %}
        {
            let to = to + {{ tensor.plane }}u * plane + {{ 64 * tile }}u;
{% if tensor.split or tensor.whole %}
            let value = rows[at + {{ 4 * tile }}u + thread % 4u];
{% endif %}
{% if tensor.split %}
            // Rounds to 11 bits, all of which f16 holds. Converting to f16 and back doesn't work
            // here: Mesa optimizes it away.
            let near = bitcast<vec4<u32>>(value) + vec4<u32>(0x1000u);
            let larger = bitcast<vec4<f32>>(near & vec4<u32>(0xffffe000u));
            {{ packed }}[to] = vec4<f16>(larger);
            {{ packed }}[to + plane] = vec4<f16>(value - larger);
{% elif tensor.whole %}
            {{ packed }}[to] = vec4<f16>(value);
{% endif %}
{% if tensor.transposed %}
            // Takes a value from each of four rows.
            let from_row = thread % 4u * {{ 4 * stride }}u + {{ 4 * tile }}u + thread / 16u;
            let e = thread / 4u % 4u;
            let column = vec4<f32>(
                rows[from_row][e],
                rows[from_row + {{ stride }}u][e],
                rows[from_row + {{ 2 * stride }}u][e],
                rows[from_row + {{ 3 * stride }}u][e],
            );
            {{ packed }}[to + {{ 2 if tensor.split else 1 if tensor.whole else 0 }}u * plane] =
                vec4<f16>(column);
{% endif %}
        }
{% endfor %}
{% endmacro %}
// The workgroup's 16 rows, multiplied by their factors.
var<workgroup> rows: array<vec4<f32>, {{ 16 * stride }}>;
// The largest value of each thread.
var<workgroup> largest: array<f32, 64>;

{% call entry.each_group(64) %}
    // Rows of a packed head, and the number of tiles of 16 rows in all heads.
    let query_padded = (p.queries + 63u) / 64u * 64u;
    let key_padded = (p.keys + 63u) / 64u * 64u;
    let query_tiles = p.heads * (query_padded / 16u);
    let key_tiles = p.kv_heads * (key_padded / 16u);
    // Number of tiles of 16 rows before those of K, of V and of dO.
    let k_first = query_tiles;
    let v_first = k_first + key_tiles;
    let do_first = v_first + key_tiles;

    let of_keys = group >= k_first && group < do_first;
    let padded = select(query_padded, key_padded, of_keys);
    let heads = select(p.heads, p.kv_heads, of_keys);
    let tiles = select(query_tiles, key_tiles, of_keys);
    let first = select(
        select(0u, k_first, group >= k_first),
        select(v_first, do_first, group >= do_first),
        group >= v_first,
    );
    let tile = group - first;
    // Four threads share a row.
    let row = tile * 16u + thread / 4u;
    let head = row / padded;
    let m = row - head * padded;
    let rows_of_x = select(p.queries, p.keys, of_keys);
    let begin = (min(m, rows_of_x - 1u) * heads + head) * p.head_quads;
    let at = thread / 4u * {{ stride }}u;
{% for i in range(quads // 4) %}
    let quad{{ i }} = thread % 4u + {{ 4 * i }}u;
    var value{{ i }}: vec4<f32>;
{% endfor %}
{% for tensor in tensors %}
    {{ "if" if loop.first else "else if" }} (group < {{ tensor.end }}) {
{% for i in range(quads // 4) %}
        value{{ i }} = {{ tensor.name }}[begin + min(quad{{ i }}, p.head_quads - 1u)];
{% endfor %}
    }
{% endfor %}
    var most = vec4<f32>(0.0);
{% for i in range(quads // 4) %}
    let known{{ i }} = vec4<bool>(m < rows_of_x && quad{{ i }} < p.head_quads);
    value{{ i }} = select(vec4<f32>(0.0), value{{ i }}, known{{ i }});
    most = max(most, abs(value{{ i }}));
{% endfor %}
    largest[thread] = max(max(most.x, most.y), max(most.z, most.w));
    workgroupBarrier();
    let of_row = thread & ~3u;
    let factor = factor_of(max(
        max(largest[of_row], largest[of_row + 1u]),
        max(largest[of_row + 2u], largest[of_row + 3u]),
    ));
{% for i in range(quads // 4) %}
    rows[at + quad{{ i }}] = value{{ i }} * factor;
{% endfor %}
    workgroupBarrier();

    // The exact inverse of a power of two.
    let scale = bitcast<f32>(0x7f000000u - bitcast<u32>(factor));
    // One vec4 of every tile.
    let plane = tiles * {{ 16 * quads }}u;
    let to = tile * {{ 16 * quads }}u + thread;
{% for tensor in tensors %}
    {{ "if" if loop.first else "else if" }} (group < {{ tensor.end }}) {
        if (thread % 4u == 0u) {
            {{ tensor.side }}_scales[{{ "16u * tiles + " if tensor.second }}row] = scale;
        }
{{ pack("queries" if tensor.side == "query" else "keys", tensor) }}
    }
{% endfor %}
{% endcall %}
