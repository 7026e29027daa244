//! exp for the CPU device, in a form that compilers vectorize. The standard library's needs a call
//! per value.

/// e^x within 2 ulp for x in -87.3..88; 0 below, the value at 88 above. NaN stays NaN.
///
/// e^x = 2^n e^r with |r| <= ln(2) / 2 and e^r by a polynomial (Cephes, `expf`).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding this rounds to an integer, which is then in the lowest bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    // ln(2) in two parts. The first has few enough bits that n * LN2_HIGH is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const LEAST: f32 = -87.3;
    let is_zero = x < LEAST;
    let x = x.clamp(LEAST, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut y = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        y = y * r + coefficient;
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    if is_zero { 0.0 } else { (y * r * r + r + 1.0) * power }
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn within_two_ulp_of_the_true_value() {
        for i in -87_000..=88_000 {
            let x = i as f32 / 1000.0;
            let wanted = f64::from(x).exp();
            let off = (f64::from(exp(x)) - wanted).abs() / wanted;
            assert!(off <= 2.0 * f64::from(f32::EPSILON), "exp({x}) is off by {off:e}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!((exp(f32::NEG_INFINITY), exp(-1e4)), (0.0, 0.0));
        assert!(exp(f32::INFINITY).is_finite() && exp(f32::NAN).is_nan());
    }
}
