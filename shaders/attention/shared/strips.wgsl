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
{% from "shared/coop.wgsl" import store, load_again %}
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
{# Values per element of an array. #}
{% set unit = 4 if staged else 1 %}
{# Offsets of this subgroup in the first rows of a tile, used when only its own threads load them.
   #}
{% set of_strip = "" if staged else " + 16u * strip" %}
{% set of_half = "" if staged else " + 32u * half" %}
{# Strides of copied rows: of a slice of other rows, and of whole own rows. Padding spreads the
   banks. #}
{% set slice_stride = slice + 8 if staged %}
{% set own_stride = wide + 8 %}
{% set copied = [2 * other_rows * slice_stride, own_rows * own_stride] | max if staged %}
{# For one plane of the other rows: values of the head copied at a time. For transposed planes:
   rows copied at a time. #}
{% set slice_of_one = (wide if other_rows * own_stride <= copied else 2 * slice) if staged %}
{% set rows_across = (other_rows if wide * (other_rows + 8) <= copied else 32) if staged %}

{# Workgroup memory of the staged form. #}
{% macro memory() %}
{% if staged %}
// Tiles of the other rows (own rows before the first of them).
var<workgroup> others: array<vec4<f16>, {{ copied // 4 }}>;
{% if held %}
// Own rows: [plane][row][d].
var<workgroup> own: array<vec4<f16>, {{ held * own_rows * own_stride // 4 }}>;
{% endif %}
{% endif %}
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
   rows from `begin` on; and of each row, `count` tiles from tile `first` on. The copies are
   [plane][row][d], or for transposed tiles [d][row], with rows of `stride` values. 32 threads copy
   a tile. #}
{% macro copy(from, begin, row_tiles, first, count, into, to, stride, planes=1, plane="", transposed=false) %}
{% set a_turn = lanes // 8 %}
{% set total = planes * row_tiles * count %}
{% set turns = (total + a_turn - 1) // a_turn %}
    {
        let origin = ({{ begin }}) / 4u + {{ 64 * first }}u + thread % 32u * 2u;
{% for turn in range(turns) %}
{% set at = turn * a_turn %}
{% if count % a_turn == 0 %}
        let tile{{ turn }} = vec3<u32>({{ at // count // row_tiles }}u, {{ at // count % row_tiles }}u, thread / 32u + {{ at % count }}u);
{% else %}
        let number{{ turn }} = min(thread / 32u + {{ at }}u, {{ total - 1 }}u);
        let tile{{ turn }} = vec3<u32>({{ "0u" if planes == 1 else "number" ~ turn ~ " / " ~ row_tiles * count ~ "u" }}, number{{ turn }} / {{ count }}u{{ " % " ~ row_tiles ~ "u" if planes > 1 }}, number{{ turn }} % {{ count }}u);
{% endif %}
        let origin{{ turn }} = origin + {{ "tile" ~ turn ~ ".x * (" ~ plane ~ " / 4u) + " if planes > 1 }}tile{{ turn }}.y * {{ 64 * tiles }}u + tile{{ turn }}.z * 64u;
        let lo{{ turn }} = {{ from }}[origin{{ turn }}];
        let hi{{ turn }} = {{ from }}[origin{{ turn }} + 1u];
{% endfor %}
        workgroupBarrier();
        let place = {{ to // 4 }}u + thread % 32u / 2u * {{ stride // 4 }}u + thread % 2u * 2u;
{% for turn in range(turns) %}
{% set at = turn * a_turn %}
        let place{{ turn }} = place + {{ "tile" ~ turn ~ ".z * " ~ 4 * stride ~ "u + tile" ~ turn ~ ".y * 4u" if transposed else "(tile" ~ turn ~ ".x * " ~ row_tiles ~ "u + tile" ~ turn ~ ".y) * " ~ 4 * stride ~ "u + tile" ~ turn ~ ".z * 4u" }};
{% if at + a_turn > total %}
        if (thread / 32u < {{ total - at }}u) {
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
{% macro fetch_own(edge, array, begin, first, planes=1, plane="") %}
{% if staged %}
{% for number in range(first, first + planes) %}
{% set plane_begin = begin ~ " + " ~ plane if number > first else begin %}
{% if number < kept %}
{{ copy(array, plane_begin, strips, 0, tiles, "others", 0, own_stride) }}
{% for k in range(0, wide, edge) %}{% for i in range(16 // edge) %}
    let own{{ number }}_{{ i }}_{{ k }} = coopLoadT<coop_mat{{ edge }}x{{ edge }}<f16, A>>(&others[strip * {{ 4 * own_stride }}u + {{ (edge * i * own_stride + k) // 4 }}u], {{ own_stride // 4 }}u);
{% endfor %}{% endfor %}
{% elif number < kept + held %}
{{ copy(array, plane_begin, strips, 0, tiles, "own", (number - kept) * own_rows * own_stride, own_stride) }}
{% endif %}
{% endfor %}
{% endif %}
{% endmacro %}

{# This subgroup's part of the products, and this thread's rows between products. #}
{% macro begin() %}
    let strip = subgroup / {{ halves }}u;
    let half = subgroup % {{ halves }}u;
    let sums_begin = strip * {{ 16 * sum_stride // unit }}u + half * {{ 32 // unit }}u;
    let weights_begin = strip * {{ 16 * weight_stride // unit }}u;
    let worker = subgroup * {{ lanes }}u + lane;
    let segment = worker % {{ share }}u;
{% for r in range(rows_each) %}
    let local{{ r }} = worker / {{ share }}u + {{ r * 4 * lanes }}u;
{% endfor %}
{% endmacro %}

{# The range of the other side that each own row of this thread sees. The ranges of all of the
   workgroup's rows go from `start` to `end`. Neither end of a range moves back from one row to the
   next. #}
{% macro ranges(array, count) %}
{% for r in range(rows_each) %}
    let seen{{ r }} = select(vec2<u32>(0u), {{ array }}[min(row_base + local{{ r }}, {{ count }} - 1u)], row_base + local{{ r }} < {{ count }});
{% endfor %}
    let start = {{ array }}[row_base].x;
    let end = {{ array }}[min(row_base + {{ own_rows - 1 }}u, {{ count }} - 1u)].y;
{% endmacro %}

{# sums = the products of the own rows' tiles from `left` on with the other rows' tiles from
   `right` on. If the sizes of planes are given, there are two planes each; the product of the
   smaller parts is left out, because f32 couldn't hold it. `number`: number of the first own
   plane. #}
{% macro scores(edge, own, left, other, right, number, left_plane=none, right_plane=none) %}
    {
{% for i in range(16 // edge) %}{% for j in range(32 // edge) %}
        var score{{ i }}_{{ j }} = coop_mat{{ edge }}x{{ edge }}<f32, C>();
{% endfor %}{% endfor %}
{% if staged %}
{% set planes = 2 if right_plane else 1 %}
{% set width = slice if right_plane else slice_of_one %}
{% set stride = width + 8 %}
{% for first in range(0, wide, width) %}
{% set values = [width, wide - first] | min %}
{{ copy(other, right, other_rows // 16, first // 16, values // 16, "others", 0, stride, planes, right_plane) }}
{% for k in range(0, values, edge) %}
        {
{% for plane in range(planes) %}{% for i in range(16 // edge) %}
            let a{{ "_rest" if plane }}{{ i }} = {{ own_matrix(edge, number + plane, i, first + k, own, left ~ (" + " ~ left_plane if plane)) }};
{% endfor %}{% endfor %}
{% for j in range(32 // edge) %}
            {
                let at = half * {{ 8 * stride }}u + {{ (edge * j * stride + k) // 4 }}u;
                let b = coopLoad<coop_mat{{ edge }}x{{ edge }}<f16, B>>(&others[at], {{ stride // 4 }}u);
{% if planes > 1 %}
                let b_rest = coopLoad<coop_mat{{ edge }}x{{ edge }}<f16, B>>(&others[at + {{ other_rows * stride // 4 }}u], {{ stride // 4 }}u);
{% endif %}
{{ multiply_score(edge, j, planes > 1) }}
            }
{% endfor %}
        }
{% endfor %}
{% endfor %}
{% else %}
        for (var k = 0u; k < {{ wide }}u; k = k + {{ edge }}u) {
            let step = {{ "k * 16u" if edge == 16 else "k / 16u * 256u + k % 16u" }};
{% for i in range(16 // edge) %}
            let a{{ i }} = coopLoadT<coop_mat{{ edge }}x{{ edge }}<f16, A>>(&{{ own }}[{{ left }} + step + {{ 16 * edge * i }}u], 16u);
{% if left_plane %}
            let a_rest{{ i }} = coopLoadT<coop_mat{{ edge }}x{{ edge }}<f16, A>>(&{{ own }}[{{ left }} + {{ left_plane }} + step + {{ 16 * edge * i }}u], 16u);
{% endif %}
{% endfor %}
{% for j in range(32 // edge) %}
            {
                let at = {{ right }} + step + {{ edge * j // 16 * 16 * wide + edge * j % 16 * 16 }}u;
                let b = coopLoad<coop_mat{{ edge }}x{{ edge }}<f16, B>>(&{{ other }}[at], 16u);
{% if right_plane %}
                let b_rest = coopLoad<coop_mat{{ edge }}x{{ edge }}<f16, B>>(&{{ other }}[at + {{ right_plane }}], 16u);
{% endif %}
{{ multiply_score(edge, j, right_plane) }}
            }
{% endfor %}
        }
{% endif %}
{% for right in [0, 16] %}
{{ store(edge, 0, right, "sums", "sums_begin + " ~ right // unit ~ "u", sum_stride, "score", unit) }}
{% endfor %}
    }
{% endmacro %}

{# Own rows' matrix I of plane `number`, which begins at `begin` of `array`, from value K on. #}
{% macro own_matrix(edge, number, i, k, array, begin) -%}
{% set type = "coop_mat" ~ edge ~ "x" ~ edge ~ "<f16, A>" %}
{% if number < kept %}own{{ number }}_{{ i }}_{{ k }}{% elif number < kept + held -%}
coopLoadT<{{ type }}>(&own[strip * {{ 4 * own_stride }}u + {{ (((number - kept) * own_rows + edge * i) * own_stride + k) // 4 }}u], {{ own_stride // 4 }}u)
{%- else -%}
coopLoadT<{{ type }}>(&{{ array }}[({{ begin }}) / 4u + strip * {{ 4 * wide }}u + {{ (k // 16 * 256 + k % 16 + 16 * edge * i) // 4 }}u], 4u)
{%- endif %}
{%- endmacro %}

{% macro multiply_score(edge, j, two) %}
{% for i in range(16 // edge) %}
{% if two %}
                score{{ i }}_{{ j }} = coopMultiplyAdd(a_rest{{ i }}, b, score{{ i }}_{{ j }});
                score{{ i }}_{{ j }} = coopMultiplyAdd(a{{ i }}, b_rest, score{{ i }}_{{ j }});
{% endif %}
                score{{ i }}_{{ j }} = coopMultiplyAdd(a{{ i }}, b, score{{ i }}_{{ j }});
{% endfor %}
{% endmacro %}

{# Adds weights * the other side's rows, whose transposed tiles begin at `right`. #}
{% macro gather(edge, other, right, sum) %}
{% for first in range(0, other_rows, rows_across if staged else other_rows) %}
{% if staged %}
{{ copy(other, right ~ " + " ~ first * wide ~ "u", rows_across // 16, 0, tiles, "others", 0, rows_across + 8, transposed=true) }}
        for (var k = 0u; k < {{ rows_across // 4 }}u; k = k + {{ edge // 4 }}u) {
{% else %}
        for (var k = 0u; k < {{ other_rows }}u; k = k + {{ edge }}u) {
            let step = {{ "k * " ~ wide ~ "u" if edge == 16 else "k / 16u * " ~ 16 * wide ~ "u + k % 16u" }};
{% endif %}
{% for i in range(16 // edge) %}
            let a{{ i }} = coopLoadT<coop_mat{{ edge }}x{{ edge }}<f16, A>>(&weights[weights_begin + k + {{ (first + edge * i * weight_stride) // unit }}u], {{ weight_stride // unit }}u);
{% endfor %}
{% for j in range(16 * own_tiles // edge) %}
            {
{% if staged %}
                let at = {{ tile_of(edge * j // 16) }} * {{ 4 * (rows_across + 8) }}u + {{ edge * j % 16 * (rows_across + 8) // 4 }}u + k;
                let b = coopLoad<coop_mat{{ edge }}x{{ edge }}<f16, B>>(&others[at], {{ (rows_across + 8) // 4 }}u);
{% else %}
                let at = {{ right }} + step + {{ tile_of(edge * j // 16) }} * 256u + {{ edge * j % 16 * 16 }}u;
                let b = coopLoad<coop_mat{{ edge }}x{{ edge }}<f16, B>>(&{{ other }}[at], 16u);
{% endif %}
{% for i in range(16 // edge) %}
                {{ sum }}{{ i }}_{{ j }} = coopMultiplyAdd(a{{ i }}, b, {{ sum }}{{ i }}_{{ j }});
{% endfor %}
            }
{% endfor %}
        }
{% endfor %}
{% endmacro %}

{# The subgroup's tile J of a head; past its end the last one, which is not stored. #}
{% macro tile_of(j) -%}
{% if halves * own_tiles > tiles %}min(half * {{ own_tiles }}u + {{ j }}u, {{ tiles - 1 }}u){% else %}(half * {{ own_tiles }}u + {{ j }}u){% endif %}
{%- endmacro %}

{# Calls `function(d, ...)` for the subgroup's results in `sums`, 16 of the head's values from `d`
   on at a time. `again`: the function changes them. #}
{% macro in_memory(edge, sum, function, arguments=none, again=false) %}
{% for tile in range(own_tiles) %}
    workgroupBarrier();
{{ store(edge, 0, 16 * tile, "sums", "sums_begin", sum_stride, sum, unit) }}
    workgroupBarrier();
    {{ function }}(half * {{ 16 * own_tiles }}u + {{ 16 * tile }}u, strip, sums_begin, lane{{ ", " ~ arguments if arguments }});
{% if again %}
    workgroupBarrier();
{{ load_again(edge, 0, 16 * tile, "sums", "sums_begin", sum_stride, sum, unit) }}
{% endif %}
{% endfor %}
{% endmacro %}

{# Four values in a row of `sums` or `weights`, from element `at` on. #}
{% macro four(array, at) -%}
{% if staged %}vec4<f32>({{ array }}[{{ at }}]){% else -%}
{{ four_of(array, at) }}
{%- endif %}
{%- endmacro %}

{# The same for an array of single values. #}
{% macro four_of(array, at) -%}
vec4<f32>(f32({{ array }}[{{ at }}]), f32({{ array }}[{{ at }} + 1u]), f32({{ array }}[{{ at }} + 2u]), f32({{ array }}[{{ at }} + 3u]))
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

{# Place of the four results that a function of `in_memory` reads: the `quad`-th of row `row`. #}
{% macro result_at(row, quad) -%}
sums_begin + {{ row }} * {{ sum_stride // unit }}u + {{ quad }} * {{ 4 // unit }}u
{%- endmacro %}

{# The head of a loop over this thread's vec4 of own row `r`: their places, and the first of the
   four other rows. #}
{% macro each_quad(r) %}
            for (var n = 0u; n < {{ quads_each }}u; n = n + 1u) {
                let local_other = 4u * (segment + n * {{ share }}u);
                let at = local{{ r }} * {{ sum_stride // unit }}u + local_other / {{ unit }}u;
                let to = local{{ r }} * {{ weight_stride // unit }}u + local_other / {{ unit }}u;
                let other = base + local_other;
{% endmacro %}
