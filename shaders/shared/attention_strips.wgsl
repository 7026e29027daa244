{# Products of strips for the attention kernels of cooperative matrices. A workgroup of four
   subgroups owns `strips` strips of 16 rows (queries, or keys) of one head, and goes over the
   other side {{ 32 * (4 // strips) }} rows at a time. Of the scores a subgroup has its strip by 32
   other rows; of what is added up from them the strip by the whole head, or by half of it where
   two subgroups share a strip. #}
{% from "coop.wgsl" import store, load_again %}
{% set halves = 4 // strips %}
{% set own_rows = 16 * strips %}
{% set other_rows = 32 * halves %}
{# Padding spreads the banks. #}
{% set sum_stride = other_rows + 4 %}
{% set weight_stride = other_rows + 8 %}
{# Tiles of 16 values of a head, and how many of them a subgroup adds up. #}
{% set tiles = wide // 16 %}
{% set own_tiles = (tiles + halves - 1) // halves %}
{# Between products threads own rows: `share` threads a row, or a thread `rows_each` rows; of a row
   that is `quads_each` vec4. #}
{% set share = [4 * lanes // own_rows, 1] | max %}
{% set rows_each = [own_rows // (4 * lanes), 1] | max %}
{% set quads_each = other_rows // 4 // share %}

{# Where the rows of `head` and `kv_head` begin, and the values of a plane. #}
{% macro packed_rows() %}
    let q_rows = padded(p.queries);
    let k_rows = padded(p.keys);
    let q_row = head * q_rows;
    let do_row = (p.heads + head) * q_rows;
    let k_row = kv_head * k_rows;
    let v_row = (p.kv_heads + kv_head) * k_rows;
    let q_plane = p.heads * q_rows * {{ wide }}u;
    let k_plane = p.kv_heads * k_rows * {{ wide }}u;
{% endmacro %}

{# This subgroup's part of the products, and this thread's rows between them. #}
{% macro begin() %}
    let strip = subgroup / {{ halves }}u;
    let half = subgroup % {{ halves }}u;
    let sums_begin = strip * {{ 16 * sum_stride }}u + half * 32u;
    let weights_begin = strip * {{ 16 * weight_stride }}u;
    let worker = subgroup * {{ lanes }}u + lane;
    let segment = worker % {{ share }}u;
{% for r in range(rows_each) %}
    let local{{ r }} = worker / {{ share }}u + {{ r * 4 * lanes }}u;
{% endfor %}
{% endmacro %}

{# Of each own row of this thread the range of the other side that it sees; of all of the
   workgroup's from `start` to `end`. Neither end of a range goes back from a row to the next. #}
{% macro ranges(array, count) %}
{% for r in range(rows_each) %}
    let seen{{ r }} = select(vec2<u32>(0u), {{ array }}[min(row_base + local{{ r }}, {{ count }} - 1u)], row_base + local{{ r }} < {{ count }});
{% endfor %}
    let start = {{ array }}[row_base].x;
    let end = {{ array }}[min(row_base + {{ own_rows - 1 }}u, {{ count }} - 1u)].y;
{% endmacro %}

{# sums = the products of the own rows' tiles from `left` on with the other rows' from `right` on;
   of two planes each, of which the product of the smaller parts is below what f32 keeps, where
   their sizes are given. #}
{% macro scores(edge, own, left, other, right, left_plane=none, right_plane=none) %}
    {
{% for i in range(16 // edge) %}{% for j in range(32 // edge) %}
        var score{{ i }}_{{ j }} = coop_mat{{ edge }}x{{ edge }}<f32, C>();
{% endfor %}{% endfor %}
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
{% for i in range(16 // edge) %}
{% if left_plane %}
                score{{ i }}_{{ j }} = coopMultiplyAdd(a_rest{{ i }}, b, score{{ i }}_{{ j }});
                score{{ i }}_{{ j }} = coopMultiplyAdd(a{{ i }}, b_rest, score{{ i }}_{{ j }});
{% endif %}
                score{{ i }}_{{ j }} = coopMultiplyAdd(a{{ i }}, b, score{{ i }}_{{ j }});
{% endfor %}
            }
{% endfor %}
        }
{% for right in [0, 16] %}
{{ store(edge, 0, right, "sums", "sums_begin + " ~ right ~ "u", sum_stride, "score") }}
{% endfor %}
    }
{% endmacro %}

{# Adds weights * the other side's rows, whose transposed tiles begin at `right`. #}
{% macro gather(edge, other, right, sum) %}
        for (var k = 0u; k < {{ other_rows }}u; k = k + {{ edge }}u) {
            let step = {{ "k * " ~ wide ~ "u" if edge == 16 else "k / 16u * " ~ 16 * wide ~ "u + k % 16u" }};
{% for i in range(16 // edge) %}
            let a{{ i }} = coopLoadT<coop_mat{{ edge }}x{{ edge }}<f16, A>>(&weights[weights_begin + k + {{ edge * i * weight_stride }}u], {{ weight_stride }}u);
{% endfor %}
{% for j in range(16 * own_tiles // edge) %}
            {
                let at = {{ right }} + step + {{ tile_of(edge * j // 16) }} * 256u + {{ edge * j % 16 * 16 }}u;
                let b = coopLoad<coop_mat{{ edge }}x{{ edge }}<f16, B>>(&{{ other }}[at], 16u);
{% for i in range(16 // edge) %}
                {{ sum }}{{ i }}_{{ j }} = coopMultiplyAdd(a{{ i }}, b, {{ sum }}{{ i }}_{{ j }});
{% endfor %}
            }
{% endfor %}
        }
{% endmacro %}

{# The subgroup's tile J of a head; past its end the last one, which is not stored. #}
{% macro tile_of(j) -%}
{% if halves * own_tiles > tiles %}min(half * {{ own_tiles }}u + {{ j }}u, {{ tiles - 1 }}u){% else %}(half * {{ own_tiles }}u + {{ j }}u){% endif %}
{%- endmacro %}

{# Has `function(d, ...)` look at the subgroup's results in `sums`, 16 of the head's values from
   `d` on at a time. `again`: it changes them. #}
{% macro in_memory(edge, sum, function, arguments=none, again=false) %}
{% for tile in range(own_tiles) %}
    workgroupBarrier();
{{ store(edge, 0, 16 * tile, "sums", "sums_begin", sum_stride, sum) }}
    workgroupBarrier();
    {{ function }}(half * {{ 16 * own_tiles }}u + {{ 16 * tile }}u, strip, sums_begin, lane{{ ", " ~ arguments if arguments }});
{% if again %}
    workgroupBarrier();
{{ load_again(edge, 0, 16 * tile, "sums", "sums_begin", sum_stride, sum) }}
{% endif %}
{% endfor %}
{% endmacro %}

{# Four values in a row. #}
{% macro four(array, at) -%}
vec4<f32>(f32({{ array }}[{{ at }}]), f32({{ array }}[{{ at }} + 1u]), f32({{ array }}[{{ at }} + 2u]), f32({{ array }}[{{ at }} + 3u]))
{%- endmacro %}

{# Stages four weights, or puts four other values back. #}
{% macro stage(at, values, array="weights", type="f16") %}
{% for e in range(4) %}
                {{ array }}[{{ at }} + {{ e }}u] = {{ type }}({{ values }}.{{ "xyzw"[e] }});
{% endfor %}
{% endmacro %}

{# The head of a loop over the vec4 that this thread has of own row `r`: where they lie, and the first of the four other rows. #}
{% macro each_quad(r) %}
            for (var n = 0u; n < {{ quads_each }}u; n = n + 1u) {
                let local_other = 4u * (segment + n * {{ share }}u);
                let at = local{{ r }} * {{ sum_stride }}u + local_other;
                let to = local{{ r }} * {{ weight_stride }}u + local_other;
                let other = base + local_other;
{% endmacro %}
