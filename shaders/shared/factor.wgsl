
// The power of two that brings a largest value into [2^13, 2^14), where f16 is most exact and a product with others of its
// kind, or with W (near 2^8), stays far from overflow in f32. 2^126 for zeros and subnormals, which a driver may flush.
fn factor_of(largest: f32) -> f32 {
    // Biased exponents: that of the largest value, and that of the factor, kept within the normal numbers.
    let exponent = i32(bitcast<u32>(largest) >> 23u) & 255;
    return bitcast<f32>(u32(clamp(127 + 13 + 127 - exponent, 1, 253)) << 23u);
}
