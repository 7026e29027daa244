{# Weights and gradients of scores for both backward kernels of cooperative matrices. `own` and `other` are "query" and "key", or
   the other way round; `own_count` is how many there are of the former. #}
// Of weights as f16.
const WEIGHT_FACTOR = 16384.0;

// From scores to weights{{ ", times what brings all rows of dO to one factor, `d_o_factor`" if own == "key" }}.
fn weigh(rows: Rows, own_base: u32, other_base: u32, {{ "d_o_factor: f32, " if own == "key" }}subgroup: u32, lane: u32) {
    for (var local = 16u * subgroup; local < 16u * (subgroup + 1u); local = local + 1u) {
        let {{ own }} = own_base + local;
        let seen = {{ other }}_ranges[min({{ own }}, {{ own_count }} - 1u)];
        for (var i = lane; i < 32u; i = i + {{ lanes }}u) {
            let {{ other }} = other_base + i;
            var weight = 0.0;
            if ({{ own }} < {{ own_count }} && {{ other }} >= seen.x && {{ other }} < seen.y) {
                let undo = p.scale / query_factors[rows.q + query] / key_factors[rows.k + key];
                let score = sums[local * {{ sum_stride }}u + i] * undo;
                weight = exp(score - stats[query * p.heads + rows.head].x) * WEIGHT_FACTOR;
{% if own == "key" %}
                weight = weight * (d_o_factor / query_factors[rows.d_o + query]);
{% endif %}
            }
            weights[local * {{ weight_stride }}u + i] = f16(weight);
        }
    }
}

// From dO * V^T and weights to gradients of scores: times dO's factor, times `range`, by which what weights are multiplied with is
// at most 2, and times what brings all other rows of {{ "Q" if own == "key" else "K" }} to one factor, `other_factor`.
fn grade(rows: Rows, own_base: u32, other_base: u32, range: f32, other_factor: f32, subgroup: u32, lane: u32) {
    for (var local = 16u * subgroup; local < 16u * (subgroup + 1u); local = local + 1u) {
        let {{ own }} = own_base + local;
        for (var i = lane; i < 32u; i = i + {{ lanes }}u) {
            let {{ other }} = other_base + i;
            let weight = f32(weights[local * {{ weight_stride }}u + i]);
            var d_score = 0.0;
            // Others are seen by nobody, or as good as.
            if (weight > 0.0) {
                let delta = stats[query * p.heads + rows.head].y * query_factors[rows.d_o + query];
                let d_weight = sums[local * {{ sum_stride }}u + i] / key_factors[rows.v + key];
                d_score = weight * ((d_weight - delta) * range);
                d_score = d_score * (other_factor / {{ "query_factors[rows.q + query]" if own == "key" else "key_factors[rows.k + key]" }});
            }
            weights[local * {{ weight_stride }}u + i] = f16(d_score);
        }
    }
}
