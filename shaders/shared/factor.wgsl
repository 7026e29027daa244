
// The power of two that brings a largest value into [2^13, 2^14). There f16 is most exact, and
// products with similar values, or with W (near 2^8), stay far from overflow in f32. 2^126 for
// zeros and subnormals, which a driver may flush.
fn factor_of(largest: f32) -> f32 {
    // Biased exponents of the largest value and of the factor, within the range of normal numbers.
    let exponent = i32(bitcast<u32>(largest) >> 23u) & 255;
    return bitcast<f32>(u32(clamp(127 + 13 + 127 - exponent, 1, 253)) << 23u);
}
