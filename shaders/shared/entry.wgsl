{# Entry points. Import this file, and write the kernel's body as the block of a call. #}

{% set subgroup_builtins = {
    "subgroup": "subgroup_id",
    "subgroups": "num_subgroups",
    "subgroup_size": "subgroup_size",
    "lane": "subgroup_invocation_id",
} %}

{# The block is the body of the entry point. Workgroups are counted by `group`; the host splits long
   dispatches, folds wide ones into y, and rounds up, so the body ends where `group >= p.groups`. A
   thread is number `thread` of its workgroup. `also` names more builtins that the block uses. #}
{% macro main(threads, also=[]) %}
@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
{% for name in also %}
    @builtin({{ subgroup_builtins[name] }}) {{ name }}: u32,
{% endfor %}
) {
    let group = p.first_group + workgroup.y * count.x + workgroup.x;
{{ caller() }}
}
{% endmacro %}

{# The block is what a thread of a workgroup does. #}
{% macro each_group(threads, also=[]) %}
{% set body = caller %}
{% call main(threads, also) %}
    if (group >= p.groups) {
        return;
    }
{{ body() }}
{% endcall %}
{% endmacro %}

{# The block is what the invocation for value `i` does. It checks that there is such a value,
   because the last workgroup may go past the end. #}
{% macro each_value(threads) %}
{% set body = caller %}
{% call each_group(threads) %}
    let i = group * {{ threads }}u + thread;
{{ body() }}
{% endcall %}
{% endmacro %}

{# The block handles four values, those from 4i on; `Params` holds `quads`. Buffers end at whole
   quads, so the last one is always read and written whole. #}
{% macro each_quad(threads) %}
{% set body = caller %}
{% call each_value(threads) %}
    if (i >= p.quads) {
        return;
    }
{{ body() }}
{% endcall %}
{% endmacro %}
