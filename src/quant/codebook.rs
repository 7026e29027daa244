use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// A 4-bit format. This crate quantizes to the first three, which parse as `nf4`, `fp4`, `int4`;
/// the others are read from GGUF files.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Format {
    /// NormalFloat of the QLoRA paper (Dettmers et al., 2023, appendix E), as in bitsandbytes.
    Nf4,
    /// The 4-bit float of bitsandbytes: sign, 2 exponent bits, 1 mantissa bit.
    Fp4,
    /// Signed integers -7..=7 in two's complement, scale `absmax / 7`, as in entrenar's QLoRA
    /// layer.
    Int4,
    /// ggml's `(code - 8) * scale` in blocks of 32.
    Q4_0,
    /// ggml's `code * scale + min` in blocks of 32.
    Q4_1,
    /// ggml's `code * scale + min` in blocks of 32; eight blocks share a scale for their 6-bit
    /// scales and minima.
    Q4K,
    /// ggml's nonlinear codes in blocks of 32.
    Iq4Nl,
    /// The same codes in blocks of 32; eight blocks share a scale for their 6-bit scales.
    Iq4Xs,
    /// The OCP microscaling format: E2M1 floats in blocks of 32 that share a power of two. As in
    /// ggml, a scale here is half of the file's, and the codebook holds doubled values.
    Mxfp4,
}

impl Format {
    /// The formats that weights can be quantized to.
    pub(crate) const QUANTIZERS: [Format; 3] = [Format::Nf4, Format::Fp4, Format::Int4];

    /// The 16 values of the format's codes, before scaling.
    pub fn codebook(self) -> Codebook {
        match self {
            Format::Nf4 => Codebook::NF4,
            Format::Fp4 => Codebook::FP4,
            Format::Int4 => Codebook::INT4,
            Format::Q4_0 => Codebook(std::array::from_fn(|code| code as f32 - 8.0)),
            Format::Q4_1 | Format::Q4K => Codebook(std::array::from_fn(|code| code as f32)),
            Format::Iq4Nl | Format::Iq4Xs => Codebook::IQ4_NL,
            Format::Mxfp4 => Codebook::MXFP4,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Format::Nf4 => "nf4",
            Format::Fp4 => "fp4",
            Format::Int4 => "int4",
            Format::Q4_0 => "q4_0",
            Format::Q4_1 => "q4_1",
            Format::Q4K => "q4_k",
            Format::Iq4Nl => "iq4_nl",
            Format::Iq4Xs => "iq4_xs",
            Format::Mxfp4 => "mxfp4",
        })
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let named = Format::QUANTIZERS.into_iter().find(|format| format.to_string() == s);
        named.ok_or_else(|| Error::invalid("format", "name", format!("{s:?}"), "expected nf4, fp4 or int4"))
    }
}

/// The 16 values of a 4-bit format; the index is the code (a nibble).
#[derive(Clone, PartialEq, Debug)]
pub struct Codebook(pub [f32; 16]);

impl Codebook {
    /// NF4, ascending. The values equal those of bitsandbytes to the bit.
    pub(crate) const NF4: Codebook = Codebook([
        -1.0,
        -0.696_192_8,
        -0.525_073_05,
        -0.394_917_5,
        -0.284_441_38,
        -0.184_773_43,
        -0.091_050_036,
        0.0,
        0.079_580_3,
        0.160_930_2,
        0.246_112_3,
        0.337_915_24,
        0.440_709_83,
        0.562_617,
        0.722_956_84,
        1.0,
    ]);

    /// FP4: `[0, 0.0625, 8, 12, 4, 6, 2, 3] / 12`, then the same values negated. Code 8 is `+0.0`,
    /// as in the tables that bitsandbytes writes.
    pub(crate) const FP4: Codebook = Codebook([
        0.0,
        0.0625 / 12.0,
        8.0 / 12.0,
        1.0,
        4.0 / 12.0,
        6.0 / 12.0,
        2.0 / 12.0,
        3.0 / 12.0,
        0.0,
        -0.0625 / 12.0,
        -8.0 / 12.0,
        -1.0,
        -4.0 / 12.0,
        -6.0 / 12.0,
        -2.0 / 12.0,
        -3.0 / 12.0,
    ]);

    /// Two's-complement nibbles. The quantizer never emits -8.
    pub(crate) const INT4: Codebook =
        Codebook([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0]);

    /// The nonlinear codes of ggml's IQ4_NL and IQ4_XS.
    pub(crate) const IQ4_NL: Codebook = Codebook([
        -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
    ]);

    /// E2M1 floats, doubled; code 8 is `+0.0`, as in ggml.
    pub(crate) const MXFP4: Codebook =
        Codebook([0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for format in Format::QUANTIZERS {
            assert_eq!(format.to_string().parse::<Format>().unwrap(), format);
        }
        assert_eq!(
            "NF4".parse::<Format>().unwrap_err().to_string(),
            "format: name is \"NF4\"; expected nf4, fp4 or int4"
        );
        assert_eq!(
            "q4_0".parse::<Format>().unwrap_err().to_string(),
            "format: name is \"q4_0\"; expected nf4, fp4 or int4"
        );
    }

    #[test]
    fn nf4_bits() {
        // Bits of the `quant_map` that bitsandbytes writes.
        let expected = [
            0xbf80_0000_u32,
            0xbf32_39b1,
            0xbf06_6b30,
            0xbeca_32a0,
            0xbe91_a24d,
            0xbe3d_353f,
            0xbdba_7871,
            0x0000_0000,
            0x3da2_faff,
            0x3e24_cae3,
            0x3e7c_04dd,
            0x3ead_033a,
            0x3ee1_a4b8,
            0x3f10_07ab,
            0x3f39_13b3,
            0x3f80_0000,
        ];
        assert_eq!(Codebook::NF4.0.map(f32::to_bits), expected);
    }
}
