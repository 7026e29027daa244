// factor[m] = the power of two that brings the largest |X[m, :]| into [2^13, 2^14). {{ team }}
// threads own a row.
//
// Floor: the 4 M K bytes of X over the bandwidth.

{% import "shared/entry.wgsl" as entry %}

{% include "rows/shared/row_largest.wgsl" %}

{% call entry.each_group(threads) %}
    let own = group * {{ threads // team }}u + thread / {{ team }}u;
    let lane = thread % {{ team }}u;
    let largest = largest_of(min(own, p.rows - 1u), lane, thread);
    if (lane == 0u && own < p.rows) {
        factor[own] = factor_of(largest);
    }
{% endcall %}
