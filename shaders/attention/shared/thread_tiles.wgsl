{# Shared code of hardware's attention kernels: products of tiles staged in workgroup memory. A
   workgroup has 8 by 16 threads and owns 8 * `tall` rows (queries or keys) of one head, of
   `head_quads` vec4. It goes over the other side 64 rows at a time. A thread holds the scores of
   `tall` own rows with four other rows, and the results of the same own rows for every 16th vec4
   of the head.

   Loop bounds are hidden from compilers where possible: some compilers would unroll these loops
   and then need more registers than a thread has. #}
{% set down = 8 %}
{% set across = 16 %}
{% set quads = (head_quads + across - 1) // across %}
{% set threads = down * across %}
{% set own_rows = down * tall %}
{% set other_rows = 4 * across %}
{# vec4 of a row that are staged at a time. #}
{% set depth = 8 %}
{# Passes over the own tile, per thread. If there is less than one, some threads have no work. #}
{% set own_passes = [own_rows * depth // threads, 1] | max %}
{# Other rows whose whole heads are staged at a time: they take as much memory as the other tile.
   #}
{% set each = [32, 16, 8, 8][quads - 1] %}
{# In workgroup memory the other side's tile lies behind the own side's tile, or behind the
   weights. #}
{% set others_begin = own_rows * ([depth, across] | max) %}
{% set staged_quads = others_begin + other_rows * depth %}

{# This thread's place, and what it stages: a vec4 of every {{ threads // depth }}th row. #}
{% macro begin() %}
    let across = thread % {{ across }}u;
    let down = thread / {{ across }}u;
    let staged_row = thread / {{ depth }}u;
    let staged_quad = thread % {{ depth }}u;
{% endmacro %}

{# First values of the rows that this thread stages, for the tile from `base` on. There are `count`
   rows of `heads` heads. The thread stages some rows of the own tile, or four of the other one. #}
{% macro begins(name, rows, base, count, heads, head) %}
{% for i in range([rows * depth // threads, 1] | max) %}
    let {{ name }}{{ i }} = (min({{ base }} + staged_row + {{ i * threads // depth }}u, {{ count }} - 1u) * {{ heads }} + {{ head }}) * {{ head_quads }}u;
{% endfor %}
{% endmacro %}

{# sumI = the products of own row I with the four other rows. The vec4 of a row are permuted in
   memory, so that eight threads that read eight rows use different banks. #}
{% macro product(sum, left, left_begins, right, right_begins) %}
{% for i in range(tall) %}
        var {{ sum }}{{ i }} = vec4<f32>(0.0);
{% endfor %}
        for (var first = 0u; first < {{ head_quads }}u; first = first + {{ depth }}u) {
            let quad = {{ "min(first + staged_quad, " ~ (head_quads - 1) ~ "u)" if head_quads % depth else "first + staged_quad" }};
{% for i in range(own_passes) %}
            let left{{ i }} = {{ left }}[{{ left_begins }}{{ i }} + quad];
{% endfor %}
{% for i in range(other_rows * depth // threads) %}
            let right{{ i }} = {{ right }}[{{ right_begins }}{{ i }} + quad];
{% endfor %}
            workgroupBarrier();
{% for i in range(own_passes) %}
            {{ "if (staged_row < " ~ own_rows ~ "u) " if own_rows * depth < threads }}{
                let row = staged_row + {{ i * threads // depth }}u;
                staged[row * {{ depth }}u + (staged_quad ^ (row / {{ tall }}u % {{ depth }}u))] = left{{ i }};
            }
{% endfor %}
{% for i in range(other_rows * depth // threads) %}
            {
                let row = staged_row + {{ i * threads // depth }}u;
                staged[{{ others_begin }}u + row * {{ depth }}u + (staged_quad ^ (row / 4u % {{ depth }}u))] = right{{ i }};
            }
{% endfor %}
            workgroupBarrier();
            for (var quad = 0u; quad < min({{ head_quads }}u - first, {{ depth }}u); quad = quad + 1u) {
                let left_at = down * {{ tall * depth }}u + (quad ^ down);
                let right_at = across * {{ 4 * depth }}u + (quad ^ (across % {{ depth }}u));
{% for t in range(4) %}
                let other{{ t }} = staged[right_at + {{ others_begin + t * depth }}u];
{% endfor %}
{% for i in range(tall) %}
                {
                    let own = staged[left_at + {{ i * depth }}u];
{% for t in range(4) %}
                    {{ sum }}{{ i }}.{{ "xyzw"[t] }} = {{ sum }}{{ i }}.{{ "xyzw"[t] }}{% for e in "xyzw" %} + own.{{ e }} * other{{ t }}.{{ e }}{% endfor %};
{% endfor %}
                }
{% endfor %}
            }
        }
{% endmacro %}

{# Puts `weightI` of own row I and the four other rows in memory for `gather`. First a barrier,
   until everything staged there has been read. #}
{% macro stage_weights(weight) %}
{% for i in range(tall) %}
        staged[(down * {{ tall }}u + {{ i }}u) * {{ across }}u + across] = {{ weight }}{{ i }};
{% endfor %}
{% endmacro %}

{# Adds the other side's rows, multiplied by the staged weights. There are `count` rows; it takes
   those from `base` to at most `end`. sumI_J belongs to own row I. #}
{% macro gather(sum, right, base, end, count, heads, head) %}
        {
        let left = min({{ end }} - {{ base }}, {{ other_rows }}u);
        for (var first = 0u; first < left; first = first + {{ each }}u) {
{% for i in range(each // down) %}
            let begin{{ i }} = (min({{ base }} + first + down + {{ i * down }}u, {{ count }} - 1u) * {{ heads }} + {{ head }}) * {{ head_quads }}u;
{% for j in range(quads) %}
            let right{{ i }}_{{ j }} = {{ right }}[begin{{ i }} + {{ quad_of(j) }}];
{% endfor %}
{% endfor %}
            workgroupBarrier();
{% for i in range(each // down) %}{% for j in range(quads) %}
            staged[{{ others_begin + i * down * across * quads + j * across }}u + down * {{ across * quads }}u + across] = right{{ i }}_{{ j }};
{% endfor %}{% endfor %}
            workgroupBarrier();
            for (var four = 0u; four < (min(left - first, {{ each }}u) + 3u) / 4u; four = four + 1u) {
{% for i in range(tall) %}
                let weight{{ i }} = staged[down * {{ tall * across }}u + {{ i * across }}u + first / 4u + four];
{% endfor %}
{% for t in range(4) %}{% for j in range(quads) %}
                {
                    let value = staged[{{ others_begin + t * across * quads + j * across }}u + four * {{ 4 * across * quads }}u + across];
{% for i in range(tall) %}
                    {{ sum }}{{ i }}_{{ j }} = {{ sum }}{{ i }}_{{ j }} + weight{{ i }}.{{ "xyzw"[t] }} * value;
{% endfor %}
                }
{% endfor %}{% endfor %}
            }
        }
        }
{% endmacro %}

{# The thread's vec4 J of a head; past its end the last one, which is not stored. #}
{% macro quad_of(j) -%}
{% if (j + 1) * across > head_quads %}min(across + {{ j * across }}u, {{ head_quads - 1 }}u){% else %}across + {{ j * across }}u{% endif %}
{%- endmacro %}

{# Stores sumI_J times `factorI` into rows of `heads` heads, of which there are `count`. #}
{% macro store(array, sum, factor, base, count, heads, head) %}
{% for i in range(tall) %}
    {
        let row = {{ base }} + down * {{ tall }}u + {{ i }}u;
        if (row < {{ count }}) {
            let begin = (row * {{ heads }} + {{ head }}) * {{ head_quads }}u + across;
{% for j in range(quads) %}
{% if (j + 1) * across > head_quads %}
            if (across < {{ head_quads - j * across }}u) { {{ array }}[begin + {{ j * across }}u] = {{ sum }}{{ i }}_{{ j }} * {{ factor }}{{ i }}; }
{% else %}
            {{ array }}[begin + {{ j * across }}u] = {{ sum }}{{ i }}_{{ j }} * {{ factor }}{{ i }};
{% endif %}
{% endfor %}
        }
    }
{% endfor %}
{% endmacro %}

{# A zero for every vec4 that a thread sums. #}
{% macro zeros(sum) %}
{% for i in range(tall) %}{% for j in range(quads) %}
    var {{ sum }}{{ i }}_{{ j }} = vec4<f32>(0.0);
{% endfor %}{% endfor %}
{% endmacro %}

{# The range of the other side that any of the workgroup's own rows sees, from `start` to `end`.
   Neither end of a row's range moves back from one row to the next. #}
{% macro ranges(array, base, count) %}
    let start = {{ array }}[{{ base }}].x;
    let end = {{ array }}[min({{ base }} + {{ own_rows - 1 }}u, {{ count }} - 1u)].y;
{% endmacro %}

{# Declares `visibleI`: which of this thread's four rows of the tile from `other` on own row I
   sees. Its range is read again for every tile, because some GPUs lack the registers to keep it.
   #}
{% macro visible(array, base, count, other) %}
        let others = vec4<u32>({{ other }} + 4u * across) + vec4<u32>(0u, 1u, 2u, 3u);
{% for i in range(tall) %}
        let seen{{ i }} = {{ array }}[min({{ base }} + down * {{ tall }}u + {{ i }}u, {{ count }} - 1u)];
        let visible{{ i }} = (others >= vec4<u32>(seen{{ i }}.x)) & (others < vec4<u32>(seen{{ i }}.y));
{% endfor %}
{% endmacro %}
