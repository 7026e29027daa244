// Pairs of a head's values and their rotation angles. The including shader has `p.half`,
// `p.positions`, `cosines` and `sines`.

// Places of the two values of a pair.
fn places(pair: u32) -> vec2<u32> {
{% if interleaved %}
    // Neighbours: (2 i, 2 i + 1).
    return vec2<u32>(2u * pair, 2u * pair + 1u);
{% else %}
    // Half a head apart: (i, i + D / 2).
    let first = 2u * pair - pair % p.half;
    return vec2<u32>(first, first + p.half);
{% endif %}
}

// Cosine and sine for a pair of a token at a position; past the table's end those of the last
// position.
fn angle(pair: u32, position: u32) -> vec2<f32> {
    let at = min(position, p.positions - 1u) * p.half + pair % p.half;
    return vec2<f32>(cosines[at], sines[at]);
}

// A pair, rotated by the angle with this cosine and sine.
fn turned(a: f32, b: f32, angle: vec2<f32>) -> vec2<f32> {
    return vec2<f32>(a * angle.x - b * angle.y, b * angle.x + a * angle.y);
}
