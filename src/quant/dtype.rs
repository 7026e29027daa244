use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// The floating-point type of the original weights, which a quantized file is dequantized to.
///
/// Displays and parses like in bitsandbytes: `float32`, `float16`, `bfloat16`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Dtype {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

impl Dtype {
    /// Bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::Bf16 => "bfloat16",
        })
    }
}

impl FromStr for Dtype {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "float32" => Ok(Dtype::F32),
            "float16" => Ok(Dtype::F16),
            "bfloat16" => Ok(Dtype::Bf16),
            _ => Err(Error::invalid("dtype", "name", format!("{s:?}"), "expected float32, float16 or bfloat16")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            assert_eq!(dtype.to_string().parse::<Dtype>().unwrap(), dtype);
        }
        assert_eq!(Dtype::Bf16.to_string(), "bfloat16");
    }

    #[test]
    fn other_names_are_errors() {
        let message = "float64".parse::<Dtype>().unwrap_err().to_string();
        assert_eq!(message, "dtype: name is \"float64\"; expected float32, float16 or bfloat16");
    }
}
