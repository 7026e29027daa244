{# Shared code of hardware's attention kernels: products of tiles staged in workgroup memory. A
   workgroup has 8 by 16 threads and owns 8 * `tall` rows (queries or keys) of one head, of
   `head_quads` vec4. It goes over the other side 64 rows at a time. A thread holds the scores of
   `tall` own rows with four other rows, and the results of the same own rows for every 16th vec4
   of the head.

   Loop bounds are hidden from compilers where possible: some compilers would unroll these loops
   and then need more registers than a thread has. #}
{% import "attention/shared/sides.wgsl" as sides %}
{% set down = 8 %}
{% set across = 16 %}
{% set quads = (head_quads + across - 1) // across %}
{% set threads = down * across %}
{% set own_rows = down * tall %}
{% set other_rows = 4 * across %}
{# vec4 of a row that are staged at a time. #}
{% set depth = 8 %}
{# Passes over a tile, per thread. If there is less than one, some threads have no work. #}
{% set own_passes = [own_rows * depth // threads, 1] | max %}
{% set other_passes = other_rows * depth // threads %}
{# Other rows whose whole heads are staged at a time: they take as much memory as the other tile.
   #}
{% set each = [32, 16, 8, 8][quads - 1] %}
{# In workgroup memory the other side's tile lies behind the own side's tile, or behind the
   weights. #}
{% set others_begin = own_rows * ([depth, across] | max) %}
{% set staged_quads = others_begin + other_rows * depth %}

{# The block is what a thread does. The workgroup owns the rows of a side from `base` on, and any of
   these sees the other side from `start` to `end`. The thread's place is `across` and `down`; it
   stages a vec4 of every `threads / depth`th row. #}
{% macro each_block(side) %}
// Tiles of both sides, later weights and what they are multiplied by.
var<workgroup> staged: array<vec4<f32>, {{ staged_quads }}>;

{% set body = caller %}
{% call sides.each_block(side, threads) %}
    let base = block * {{ own_rows }}u;
    let across = thread % {{ across }}u;
    let down = thread / {{ across }}u;
    let staged_row = thread / {{ depth }}u;
    let staged_quad = thread % {{ depth }}u;
    let start = {{ side.ranges }}[base].x;
    let end = {{ side.ranges }}[min(base + {{ own_rows - 1 }}u, {{ side.count }} - 1u)].y;
{{ begins("own", own_passes, "base", side) }}
{{ body() }}
{% endcall %}
{% endmacro %}

{# First values of the other side's rows that this thread stages. #}
{% macro other_begins(side) %}
{{ begins("other", other_passes, side.row, side) }}
{% endmacro %}

{# First values of the rows of a side that this thread stages, for the tile from `base` on. #}
{% macro begins(name, passes, base, side) %}
{% for i in range(passes) %}
    let {{ name }}_row{{ i }} =
        min({{ base }} + staged_row + {{ i * threads // depth }}u, {{ side.count }} - 1u);
    let {{ name }}_begin{{ i }} =
        ({{ name }}_row{{ i }} * {{ side.heads }} + {{ side.head }}) * {{ head_quads }}u;
{% endfor %}
{% endmacro %}

{# sumI = the products of own row I with the four other rows. The vec4 of a row are permuted in
   memory, so that eight threads that read eight rows use different banks. #}
{% macro product(sum, left, right) %}
{% for i in range(tall) %}
        var {{ sum }}{{ i }} = vec4<f32>(0.0);
{% endfor %}
        for (var first = 0u; first < {{ head_quads }}u; first = first + {{ depth }}u) {
{% if head_quads % depth %}
            let quad = min(first + staged_quad, {{ head_quads - 1 }}u);
{% else %}
            let quad = first + staged_quad;
{% endif %}
{% for i in range(own_passes) %}
            let left{{ i }} = {{ left }}[own_begin{{ i }} + quad];
{% endfor %}
{% for i in range(other_passes) %}
            let right{{ i }} = {{ right }}[other_begin{{ i }} + quad];
{% endfor %}
            workgroupBarrier();
{% for i in range(own_passes) %}
            {
                let row = staged_row + {{ i * threads // depth }}u;
                let at = row * {{ depth }}u + (staged_quad ^ (row / {{ tall }}u % {{ depth }}u));
{% if own_rows * depth < threads %}
                if (staged_row < {{ own_rows }}u) { staged[at] = left{{ i }}; }
{% else %}
                staged[at] = left{{ i }};
{% endif %}
            }
{% endfor %}
{% for i in range(other_passes) %}
            {
                let row = staged_row + {{ i * threads // depth }}u;
                let at = row * {{ depth }}u + (staged_quad ^ (row / 4u % {{ depth }}u));
                staged[{{ others_begin }}u + at] = right{{ i }};
            }
{% endfor %}
            workgroupBarrier();
            let staged_quads = min({{ head_quads }}u - first, {{ depth }}u);
            for (var quad = 0u; quad < staged_quads; quad = quad + 1u) {
                let left_at = down * {{ tall * depth }}u + (quad ^ down);
                let right_at = across * {{ 4 * depth }}u + (quad ^ (across % {{ depth }}u));
{% for t in range(4) %}
                let other{{ t }} = staged[right_at + {{ others_begin + t * depth }}u];
{% endfor %}
{% for i in range(tall) %}
                {
                    let own = staged[left_at + {{ i * depth }}u];
{% for t in range(4) %}
                    {{ sum }}{{ i }}.{{ "xyzw"[t] }} = {{ sum }}{{ i }}.{{ "xyzw"[t] }}
{%- for e in "xyzw" %} + own.{{ e }} * other{{ t }}.{{ e }}{% endfor %};
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

{# Adds the other side's rows in `right`, from the tile's first to at most `end`, multiplied by the
   staged weights. sumI_J belongs to own row I. #}
{% macro gather(sum, right, side) %}
        {
        let left = min(end - {{ side.row }}, {{ other_rows }}u);
        for (var first = 0u; first < left; first = first + {{ each }}u) {
{% for i in range(each // down) %}
            let row{{ i }} =
                min({{ side.row }} + first + down + {{ i * down }}u, {{ side.count }} - 1u);
            let begin{{ i }} =
                (row{{ i }} * {{ side.heads }} + {{ side.head }}) * {{ head_quads }}u;
{% for j in range(quads) %}
            let right{{ i }}_{{ j }} = {{ right }}[begin{{ i }} + {{ quad_of(j) }}];
{% endfor %}
{% endfor %}
            workgroupBarrier();
            let to = down * {{ across * quads }}u + across;
{% for i in range(each // down) %}
{% for j in range(quads) %}
            staged[{{ others_begin + i * down * across * quads + j * across }}u + to] =
                right{{ i }}_{{ j }};
{% endfor %}
{% endfor %}
            workgroupBarrier();
            let fours = (min(left - first, {{ each }}u) + 3u) / 4u;
            for (var four = 0u; four < fours; four = four + 1u) {
                let weights_at = down * {{ tall * across }}u + first / 4u + four;
{% for i in range(tall) %}
                let weight{{ i }} = staged[weights_at + {{ i * across }}u];
{% endfor %}
                let at = four * {{ 4 * across * quads }}u + across;
{% for t in range(4) %}
{% for j in range(quads) %}
                {
                    let value = staged[{{ others_begin + t * across * quads + j * across }}u + at];
{% for i in range(tall) %}
                    {{ sum }}{{ i }}_{{ j }} =
                        {{ sum }}{{ i }}_{{ j }} + weight{{ i }}.{{ "xyzw"[t] }} * value;
{% endfor %}
                }
{% endfor %}
{% endfor %}
            }
        }
        }
{% endmacro %}

{# The thread's vec4 J of a head; past its end the last one, which is not stored. #}
{% macro quad_of(j) -%}
{% if (j + 1) * across > head_quads -%}
min(across + {{ j * across }}u, {{ head_quads - 1 }}u)
{%- else -%}
across + {{ j * across }}u
{%- endif %}
{%- endmacro %}

{# Stores `arrayI_J` times `factorI` into the own rows of `array`. #}
{% macro store(array, factor, side) %}
{% for i in range(tall) %}
    {
        let row = base + down * {{ tall }}u + {{ i }}u;
        if (row < {{ side.count }}) {
            let begin = (row * {{ side.heads }} + {{ side.head }}) * {{ head_quads }}u + across;
{% for j in range(quads) %}
{% set sum = array ~ i ~ "_" ~ j %}
{% if (j + 1) * across > head_quads %}
            if (across < {{ head_quads - j * across }}u) {
                {{ array }}[begin + {{ j * across }}u] = {{ sum }} * {{ factor }}{{ i }};
            }
{% else %}
            {{ array }}[begin + {{ j * across }}u] = {{ sum }} * {{ factor }}{{ i }};
{% endif %}
{% endfor %}
        }
    }
{% endfor %}
{% endmacro %}

{# A zero for every vec4 that a thread sums. #}
{% macro zeros(sum) %}
{% for i in range(tall) %}
{% for j in range(quads) %}
    var {{ sum }}{{ i }}_{{ j }} = vec4<f32>(0.0);
{% endfor %}
{% endfor %}
{% endmacro %}

{# Declares `visibleI`: which of this thread's four rows of the other side's tile own row I sees.
   Its range is read again for every tile, because some GPUs lack the registers to keep it. #}
{% macro visible(side, other) %}
        let others = vec4<u32>({{ other.row }} + 4u * across) + vec4<u32>(0u, 1u, 2u, 3u);
{% for i in range(tall) %}
        let own{{ i }} = min(base + down * {{ tall }}u + {{ i }}u, {{ side.count }} - 1u);
        let seen{{ i }} = {{ side.ranges }}[own{{ i }}];
        let visible{{ i }} =
            (others >= vec4<u32>(seen{{ i }}.x)) & (others < vec4<u32>(seen{{ i }}.y));
{% endfor %}
{% endmacro %}
