{# Products of strips for the cooperative-matrix attention kernels. A workgroup of four subgroups
   owns `strips` strips of 16 rows (queries or keys) of one head, and goes over the other side {{
   32 * (4 // strips) }} rows at a time. A subgroup holds the scores of its strip with 32 other
   rows, and the results of its strip for the whole head, or for half of the head if two subgroups
   share a strip.

   There are two forms, which give the same bits. In the first, matrices are loaded from the
   buffers, where their tiles are contiguous. `staged`: matrices are loaded from workgroup memory.
   Threads copy them there once for all subgroups, 16 bytes at a time; this is for devices that
   load from buffers value by value. A copy holds `slice` values of the other rows' heads in two
   planes, or other data as far as there is room. Of the own rows' planes, the first `kept` stay in
   registers and the next `held` in workgroup memory; any more are loaded from the buffer for every
   tile of the other rows. Arrays are then arrays of vec4. #}
{% import "shared/coop.wgsl" as coop %}
{% import "attention/shared/sides.wgsl" as sides %}
{% set halves = 4 // strips %}
{% set own_rows = 16 * strips %}
{% set other_rows = 32 * halves %}
{# Padding spreads the banks. #}
{% set sum_stride = other_rows + 4 %}
{% set weight_stride = other_rows + 8 %}
{# Tiles of 16 values of a head, and the number of tiles that a subgroup sums. #}
{% set tiles = wide // 16 %}
{% set own_tiles = (tiles + halves - 1) // halves %}
{# Between products threads own rows: `share` threads share a row, or a thread has `rows_each`
   rows. Each time it has `quads_each` vec4 of a row. #}
{% set share = [4 * lanes // own_rows, 1] | max %}
{% set rows_each = [own_rows // (4 * lanes), 1] | max %}
{% set quads_each = other_rows // 4 // share %}
{# Values per element of an array, and an element's type. #}
{% set unit = 4 if staged else 1 %}
{% set packed_type = "vec4<f16>" if staged else "f16" %}
{# Strides of copied rows: of a slice of other rows, and of whole own rows. Padding spreads the
   banks. #}
{% set slice_stride = slice + 8 if staged %}
{% set own_stride = wide + 8 %}
{% set copied = [2 * other_rows * slice_stride, own_rows * own_stride] | max if staged %}
{# For one plane of the other rows: values of the head copied at a time. For transposed planes:
   rows copied at a time. #}
{% set slice_of_one = (wide if other_rows * own_stride <= copied else 2 * slice) if staged %}
{% set rows_across = (other_rows if wide * (other_rows + 8) <= copied else 32) if staged %}

{# Workgroup memory, and functions that the blocks use. Both sides come from attention/pack.wgsl,
   which pads them to whole tiles. #}
{% macro memory() %}
// Scores, or results before they are stored: [own row][other row].
{% set type = "vec4<f32>" if staged else "f32" %}
var<workgroup> sums: array<{{ type }}, {{ own_rows * sum_stride // unit }}>;
// Values derived from the scores, as the next product reads them: [own row][other row].
var<workgroup> weights: array<{{ packed_type }}, {{ own_rows * weight_stride // unit }}>;
{% if staged %}
// Tiles of the other rows (own rows before the first of them).
var<workgroup> others: array<vec4<f16>, {{ copied // 4 }}>;
{% if held %}
// Own rows: [plane][row][d].
var<workgroup> own: array<vec4<f16>, {{ held * own_rows * own_stride // 4 }}>;
{% endif %}
{% endif %}
{{ coop.least() }}

// Rows of a head, as attention/pack.wgsl pads them.
fn padded(rows: u32) -> u32 {
    return (rows + 63u) / 64u * 64u;
}

// Which of the four rows from `other` on lie in the range that a row sees.
fn visible(other: u32, seen: vec2<u32>) -> vec4<bool> {
    let others = vec4<u32>(other) + vec4<u32>(0u, 1u, 2u, 3u);
    return (others >= vec4<u32>(seen.x)) & (others < vec4<u32>(seen.y));
}
{% endmacro %}

{# The block is what a thread does. The workgroup owns the rows of a side from `row_base` on;
   `seenR` is the range of the other side that the thread's own row R sees, and `start` to `end`
   what any row of the workgroup sees. `out` is the last buffer, with elements of `type`. #}
{% macro each_block(side, out, type) %}
{{ memory() }}

{% set body = caller %}
{% call coop.each_group(4 * lanes, out, type) %}
{{ sides.own_block(side) }}
    let row_base = block * {{ own_rows }}u;
{% if side == sides.queries %}
{{ query_rows() }}
{% endif %}
{{ key_rows() }}
    // This subgroup's part of the products, and this thread's rows between products.
    let strip = subgroup / {{ halves }}u;
    let half = subgroup % {{ halves }}u;
{% if staged %}
    // All of the workgroup's rows are copied together.
    let strip_row = 0u;
    let half_row = 0u;
{% else %}
    let strip_row = 16u * strip;
    let half_row = 32u * half;
{% endif %}
    let sums_begin = strip * {{ 16 * sum_stride // unit }}u + half * {{ 32 // unit }}u;
    let weights_begin = strip * {{ 16 * weight_stride // unit }}u;
    let worker = subgroup * {{ lanes }}u + lane;
    let segment = worker % {{ share }}u;
{% for r in range(rows_each) %}
    let local{{ r }} = worker / {{ share }}u + {{ r * 4 * lanes }}u;
    let row{{ r }} = row_base + local{{ r }};
    let range{{ r }} = {{ side.ranges }}[min(row{{ r }}, {{ side.count }} - 1u)];
    let seen{{ r }} = select(vec2<u32>(0u), range{{ r }}, row{{ r }} < {{ side.count }});
{% endfor %}
    let start = {{ side.ranges }}[row_base].x;
    let end = {{ side.ranges }}[min(row_base + {{ own_rows - 1 }}u, {{ side.count }} - 1u)].y;
{{ body() }}
{% endcall %}
{% endmacro %}

{# First rows of `head`, and values per plane. #}
{% macro query_rows() %}
    let q_rows = padded(p.queries);
    let q_row = head * q_rows;
    let do_row = (p.heads + head) * q_rows;
    let q_plane = p.heads * q_rows * {{ wide }}u;
{% endmacro %}

{# The same for `kv_head`. #}
{% macro key_rows() %}
    let k_rows = padded(p.keys);
    let k_row = kv_head * k_rows;
    let v_row = (p.kv_heads + kv_head) * k_rows;
    let k_plane = p.kv_heads * k_rows * {{ wide }}u;
{% endmacro %}

{# Copies tiles of 16 x 16 to `into` in workgroup memory, once all threads have finished reading
   there. It takes `planes` planes, which are `plane` values apart; of these, `row_tiles` times 16
   rows from `begin + ahead` on; and of each row, `count` tiles from tile `first` on. The copies are
   [plane][row][d], or for transposed tiles [d][row], with rows of `stride` values. 32 threads copy
   a tile. #}
{% macro copy(
    from, begin, row_tiles, first, count, into, to, stride,
    planes=1, plane="", transposed=false, ahead="0u",
) %}
{% set a_turn = lanes // 8 %}
{% set total = planes * row_tiles * count %}
{% set turns = (total + a_turn - 1) // a_turn %}
    {
        let origin = ({{ begin }} + {{ ahead }}) / 4u + {{ 64 * first }}u + thread % 32u * 2u;
{% for turn in range(turns) %}
{% set at = turn * a_turn %}
        // Plane, row of tiles, and tile.
{% if count % a_turn == 0 %}
        let tile{{ turn }} = vec3<u32>(
            {{ at // count // row_tiles }}u,
            {{ at // count % row_tiles }}u,
            thread / 32u + {{ at % count }}u,
        );
{% else %}
        let number{{ turn }} = min(thread / 32u + {{ at }}u, {{ total - 1 }}u);
        let tile{{ turn }} = vec3<u32>(
{% if planes == 1 %}
            0u,
            number{{ turn }} / {{ count }}u,
{% else %}
            number{{ turn }} / {{ row_tiles * count }}u,
            number{{ turn }} / {{ count }}u % {{ row_tiles }}u,
{% endif %}
            number{{ turn }} % {{ count }}u,
        );
{% endif %}
{% if planes == 1 %}
        let origin{{ turn }} =
            origin + tile{{ turn }}.y * {{ 64 * tiles }}u + tile{{ turn }}.z * 64u;
{% else %}
        let origin{{ turn }} = origin + tile{{ turn }}.x * ({{ plane }} / 4u)
            + tile{{ turn }}.y * {{ 64 * tiles }}u + tile{{ turn }}.z * 64u;
{% endif %}
        let lo{{ turn }} = {{ from }}[origin{{ turn }}];
        let hi{{ turn }} = {{ from }}[origin{{ turn }} + 1u];
{% endfor %}
        workgroupBarrier();
        let place = {{ to // 4 }}u + thread % 32u / 2u * {{ stride // 4 }}u + thread % 2u * 2u;
{% for turn in range(turns) %}
{% set left = total - turn * a_turn %}
{% if transposed %}
        let place{{ turn }} = place + tile{{ turn }}.z * {{ 4 * stride }}u + tile{{ turn }}.y * 4u;
{% else %}
        let row{{ turn }} = tile{{ turn }}.x * {{ row_tiles }}u + tile{{ turn }}.y;
        let place{{ turn }} = place + row{{ turn }} * {{ 4 * stride }}u + tile{{ turn }}.z * 4u;
{% endif %}
{% if left < a_turn %}
        if (thread / 32u < {{ left }}u) {
            {{ into }}[place{{ turn }}] = lo{{ turn }};
            {{ into }}[place{{ turn }} + 1u] = hi{{ turn }};
        }
{% else %}
        {{ into }}[place{{ turn }}] = lo{{ turn }};
        {{ into }}[place{{ turn }} + 1u] = hi{{ turn }};
{% endif %}
{% endfor %}
        workgroupBarrier();
    }
{% endmacro %}

{# Fetches own planes: number `first`, and the next if `planes` is two. They begin at `begin` and
   are `plane` values apart. In registers, `ownN_I_K` is matrix I of plane N, from value K on. #}
{% macro fetch_own(array, begin, first, planes=1, plane="") %}
{% if staged %}
{% for number in range(first, first + planes) %}
{% set ahead = plane if number > first else "0u" %}
{% if number < kept %}
{{ copy(array, begin, strips, 0, tiles, "others", 0, own_stride, ahead=ahead) }}
{% for k in range(0, wide, edge) %}
{% for i in range(16 // edge) %}
    let own{{ number }}_{{ i }}_{{ k }} = {{ copied_own("others", edge * i * own_stride + k) }};
{% endfor %}
{% endfor %}
{% elif number < kept + held %}
{% set to = (number - kept) * own_rows * own_stride %}
{{ copy(array, begin, strips, 0, tiles, "own", to, own_stride, ahead=ahead) }}
{% endif %}
{% endfor %}
{% endif %}
{% endmacro %}

{# A matrix of the subgroup's strip of copied own rows, from value `at` of the strip on. #}
{% macro copied_own(array, at) -%}
coopLoadT<{{ coop.matrix("A") }}>(
    &{{ array }}[strip * {{ 4 * own_stride }}u + {{ at // 4 }}u], {{ own_stride // 4 }}u)
{%- endmacro %}

{# sums = the products of the own rows' tiles from `left` on with the other rows' tiles from
   `right` on. If the sizes of planes are given, there are two planes each; the product of the
   smaller parts is left out, because f32 couldn't hold it. `number`: number of the first own
   plane. #}
{% macro scores(own, left, other, right, number, left_plane=none, right_plane=none) %}
    {
{% for i in range(16 // edge) %}
{% for j in range(32 // edge) %}
        var score{{ i }}_{{ j }} = {{ coop.matrix("C") }}();
{% endfor %}
{% endfor %}
{% if staged %}
{{ scores_from_memory(own, left, other, right, number, left_plane, right_plane) }}
{% else %}
{{ scores_from_buffers(own, left, other, right, left_plane, right_plane) }}
{% endif %}
{% for right in [0, 16] %}
{{ coop.store(0, right, "sums", "sums_begin", sum_stride, "score", unit, right // unit) }}
{% endfor %}
    }
{% endmacro %}

{% macro scores_from_memory(own, left, other, right, number, left_plane, right_plane) %}
{% set planes = 2 if right_plane else 1 %}
{% set width = slice if right_plane else slice_of_one %}
{% set stride = width + 8 %}
{% for first in range(0, wide, width) %}
{% set values = [width, wide - first] | min %}
{% set row_tiles, first_tile, count = other_rows // 16, first // 16, values // 16 %}
{{ copy(other, right, row_tiles, first_tile, count, "others", 0, stride, planes, right_plane) }}
{% for k in range(0, values, edge) %}
        {
{% for plane in range(planes) %}
{% for i in range(16 // edge) %}
{% set name, ahead = ("a_rest", left_plane) if plane else ("a", "0u") %}
            let {{ name }}{{ i }} =
                {{ own_matrix(number + plane, i, first + k, own, left, ahead) }};
{% endfor %}
{% endfor %}
{% for j in range(32 // edge) %}
            {
                let at = half * {{ 8 * stride }}u + {{ (edge * j * stride + k) // 4 }}u;
                let b = coopLoad<{{ coop.matrix("B") }}>(&others[at], {{ stride // 4 }}u);
{% if planes > 1 %}
                let rest_at = at + {{ other_rows * stride // 4 }}u;
                let b_rest = coopLoad<{{ coop.matrix("B") }}>(&others[rest_at], {{ stride // 4 }}u);
{% endif %}
{{ multiply_score(j, planes > 1) }}
            }
{% endfor %}
        }
{% endfor %}
{% endfor %}
{% endmacro %}

{% macro scores_from_buffers(own, left, other, right, left_plane, right_plane) %}
        for (var k = 0u; k < {{ wide }}u; k = k + {{ edge }}u) {
{% if edge == 16 %}
            let step = k * 16u;
{% else %}
            let step = k / 16u * 256u + k % 16u;
{% endif %}
{% for i in range(16 // edge) %}
            let a{{ i }} = coopLoadT<{{ coop.matrix("A") }}>(
                &{{ own }}[{{ left }} + step + {{ 16 * edge * i }}u], 16u);
{% if left_plane %}
            let a_rest{{ i }} = coopLoadT<{{ coop.matrix("A") }}>(
                &{{ own }}[{{ left }} + {{ left_plane }} + step + {{ 16 * edge * i }}u], 16u);
{% endif %}
{% endfor %}
{% for j in range(32 // edge) %}
            {
                let at = {{ right }} + step
                    + {{ edge * j // 16 * 16 * wide + edge * j % 16 * 16 }}u;
                let b = coopLoad<{{ coop.matrix("B") }}>(&{{ other }}[at], 16u);
{% if right_plane %}
                let rest_at = at + {{ right_plane }};
                let b_rest = coopLoad<{{ coop.matrix("B") }}>(&{{ other }}[rest_at], 16u);
{% endif %}
{{ multiply_score(j, right_plane) }}
            }
{% endfor %}
        }
{% endmacro %}

{# Own rows' matrix I of plane `number`, which begins at `begin + ahead` of `array`, from value K
   on: from registers, from workgroup memory, or from the buffer. #}
{% macro own_matrix(number, i, k, array, begin, ahead) -%}
{% if number < kept -%}
own{{ number }}_{{ i }}_{{ k }}
{%- elif number < kept + held -%}
{{ copied_own("own", ((number - kept) * own_rows + edge * i) * own_stride + k) }}
{%- else -%}
coopLoadT<{{ coop.matrix("A") }}>(
    &{{ array }}[({{ begin }} + {{ ahead }}) / 4u + strip * {{ 4 * wide }}u
        + {{ (k // 16 * 256 + k % 16 + 16 * edge * i) // 4 }}u], 4u)
{%- endif %}
{%- endmacro %}

{% macro multiply_score(j, two) %}
{% for i in range(16 // edge) %}
{% set score = "score" ~ i ~ "_" ~ j %}
{% if two %}
                {{ score }} = coopMultiplyAdd(a_rest{{ i }}, b, {{ score }});
                {{ score }} = coopMultiplyAdd(a{{ i }}, b_rest, {{ score }});
{% endif %}
                {{ score }} = coopMultiplyAdd(a{{ i }}, b, {{ score }});
{% endfor %}
{% endmacro %}

{# Adds weights * the other side's rows, whose transposed tiles begin at `right`. #}
{% macro gather(other, right, sum) %}
{% if staged %}
{% set stride = rows_across + 8 %}
{% for first in range(0, other_rows, rows_across) %}
{% set row_tiles, ahead = rows_across // 16, first * wide ~ "u" %}
{{ copy(other, right, row_tiles, 0, tiles, "others", 0, stride, transposed=true, ahead=ahead) }}
    for (var k = 0u; k < {{ rows_across // 4 }}u; k = k + {{ edge // 4 }}u) {
{{ load_weights(first) }}
{% for j in range(16 * own_tiles // edge) %}
        {
            let tile = {{ tile_of(edge * j // 16) }};
            let at = tile * {{ 4 * stride }}u + {{ edge * j % 16 * stride // 4 }}u + k;
            let b = coopLoad<{{ coop.matrix("B") }}>(&others[at], {{ stride // 4 }}u);
{{ multiply_weights(j, sum) }}
        }
{% endfor %}
    }
{% endfor %}
{% else %}
    for (var k = 0u; k < {{ other_rows }}u; k = k + {{ edge }}u) {
{% if edge == 16 %}
        let step = k * {{ wide }}u;
{% else %}
        let step = k / 16u * {{ 16 * wide }}u + k % 16u;
{% endif %}
{{ load_weights(0) }}
{% for j in range(16 * own_tiles // edge) %}
        {
            let tile = {{ tile_of(edge * j // 16) }};
            let at = {{ right }} + step + tile * 256u + {{ edge * j % 16 * 16 }}u;
            let b = coopLoad<{{ coop.matrix("B") }}>(&{{ other }}[at], 16u);
{{ multiply_weights(j, sum) }}
        }
{% endfor %}
    }
{% endif %}
{% endmacro %}

{# Matrices of weights from other row `first` and k on. #}
{% macro load_weights(first) %}
{% for i in range(16 // edge) %}
        let a{{ i }} = coopLoadT<{{ coop.matrix("A") }}>(
            &weights[weights_begin + k + {{ (first + edge * i * weight_stride) // unit }}u],
            {{ weight_stride // unit }}u);
{% endfor %}
{% endmacro %}

{% macro multiply_weights(j, sum) %}
{% for i in range(16 // edge) %}
            {{ sum }}{{ i }}_{{ j }} = coopMultiplyAdd(a{{ i }}, b, {{ sum }}{{ i }}_{{ j }});
{% endfor %}
{% endmacro %}

{# The subgroup's tile J of a head; past its end the last one, which is not stored. #}
{% macro tile_of(j) -%}
{% if halves * own_tiles > tiles -%}
min(half * {{ own_tiles }}u + {{ j }}u, {{ tiles - 1 }}u)
{%- else -%}
(half * {{ own_tiles }}u + {{ j }}u)
{%- endif %}
{%- endmacro %}

{# The block handles the subgroup's results in `sums`, 16 of the head's values from `d` on at a
   time. `again`: it changes them. #}
{% macro in_memory(sum, again=false) %}
{% for tile in range(own_tiles) %}
    workgroupBarrier();
{{ coop.store(0, 16 * tile, "sums", "sums_begin", sum_stride, sum, unit) }}
    workgroupBarrier();
    {
        let d = half * {{ 16 * own_tiles }}u + {{ 16 * tile }}u;
{{ caller() }}
    }
{% if again %}
    workgroupBarrier();
{{ coop.load_again(0, 16 * tile, "sums", "sums_begin", sum_stride, sum, unit) }}
{% endif %}
{% endfor %}
{% endmacro %}

{# Four values in a row of `sums` or `weights`, from element `at` on. #}
{% macro four(array, at) -%}
{% if staged -%}
vec4<f32>({{ array }}[{{ at }}])
{%- else -%}
{{ four_of(array, at) }}
{%- endif %}
{%- endmacro %}

{# The same for an array of single values. #}
{% macro four_of(array, at) -%}
vec4<f32>(
    f32({{ array }}[{{ at }}]), f32({{ array }}[{{ at }} + 1u]),
    f32({{ array }}[{{ at }} + 2u]), f32({{ array }}[{{ at }} + 3u]))
{%- endmacro %}

{# Stages four weights, or puts four other values back. #}
{% macro stage(at, values, array="weights", type="f16") %}
{% if staged %}
                {{ array }}[{{ at }}] = vec4<{{ type }}>({{ values }});
{% else %}
{% for e in range(4) %}
                {{ array }}[{{ at }} + {{ e }}u] = {{ type }}({{ values }}.{{ "xyzw"[e] }});
{% endfor %}
{% endif %}
{% endmacro %}

{# The block handles four results in `sums` at a time that lie in the result: they are at `at`,
   belong to row `local` of the workgroup, and go to `to` in an array of vec4. #}
{% macro each_result(side) %}
    for (var i = lane; i < 64u; i = i + {{ lanes }}u) {
        let local = 16u * strip + i / 4u;
        let own = row_base + local;
        let first = d + i % 4u * 4u;
        if (own < {{ side.count }} && first < {{ head_dim }}u) {
            let at = sums_begin + i / 4u * {{ sum_stride // unit }}u + i % 4u * {{ 4 // unit }}u;
            let to = (own * {{ side.heads }} + {{ side.head }}) * {{ head_dim // 4 }}u + first / 4u;
{{ caller() }}
        }
    }
{% endmacro %}

{# The block handles each vec4 of this thread's own row `r`: `at` in `sums` and `to` in `weights`
   are its places, and `other` is the first of the four other rows. #}
{% macro each_quad(r) %}
            for (var n = 0u; n < {{ quads_each }}u; n = n + 1u) {
                let local_other = 4u * (segment + n * {{ share }}u);
                let at = local{{ r }} * {{ sum_stride // unit }}u + local_other / {{ unit }}u;
                let to = local{{ r }} * {{ weight_stride // unit }}u + local_other / {{ unit }}u;
                let other = base + local_other;
{{ caller() }}
            }
{% endmacro %}
