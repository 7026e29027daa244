//! `keys[first + i] = k[i]` and `values[first + i] = v[i]`, for the rows of K and V [M, width].
//! `bench --copy` compares these copies by a kernel with the driver's copies.

use super::quads;
use crate::error::{Error, Result};
use crate::kernels::{expect_2d, expect_shape, kernel, params};
use crate::tensor::{Storage, Tensor};

const OP: &str = "append";

params! {
    struct AppendParams {
        first_group: u32,
        groups: u32,
        /// Values of K / 4.
        quads: u32,
        /// Place of the first row in the cache, in vec4.
        at: u32,
    }
}

kernel! {
    KERNEL = "append" in "elementwise/append.wgsl", AppendParams, [k: Read, v: Read, keys: Write, values: Write],
    variants: quads::variants,
    twin: tests::twin,
}

/// Overwrites the rows of `keys` and `values` [capacity, width] from `first` on with the rows of
/// `k` and `v` [M, width]. The width is a multiple of 4.
///
/// # Errors
/// [`Error::Shape`] if shapes disagree or rows don't fit, [`Error::DeviceMismatch`].
pub fn append([keys, values]: [&mut Tensor; 2], first: usize, [k, v]: [&Tensor; 2]) -> Result<()> {
    let ((capacity, width), (rows, _)) = (expect_2d(OP, "the keys", keys)?, expect_2d(OP, "K", k)?);
    expect_shape(OP, "the values", values, &[capacity, width])?;
    expect_shape(OP, "K", k, &[rows, width])?;
    expect_shape(OP, "V", v, &[rows, width])?;
    if !width.is_multiple_of(4) || first + rows > capacity {
        let got = format!("{rows} rows of width {width} from row {first} on, capacity {capacity}");
        return Err(Error::shape(OP, "K", "rows that fit, of a width divisible by 4", got));
    }
    [&*values, k, v].iter().try_for_each(|other| keys.device().same(&other.device(), OP))?;
    if let Storage::Cpu(..) = keys.storage() {
        keys.set_rows(first, k)?;
        return values.set_rows(first, v);
    }
    keys.unshare()?;
    values.unshare()?;
    let Storage::Gpu(gpu, keys) = keys.storage() else { return Ok(()) };
    let params = AppendParams { quads: quads::count(k.len()), at: quads::count(first * width), ..Default::default() };
    let buffers = [k.buffer(gpu, OP)?, v.buffer(gpu, OP)?, keys, values.buffer(gpu, OP)?];
    quads::dispatch_with(gpu, &KERNEL, &buffers, k.len(), bytemuck::bytes_of(&params))
}

/// The formula, for the keys or for the values.
#[cfg(test)]
pub(crate) fn reference<T: Copy>(cache: &[T], at: usize, rows: &[T]) -> Vec<T> {
    [&cache[..at], rows, &cache[at + rows.len()..]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::testing;

    pub fn twin(device: &Device) {
        for (capacity, width, first, rows) in [(9, 8, 2, 1), (70, 12, 3, 60), (3, 4, 0, 3), (5, 4, 5, 0)] {
            let tensor = |seed: u64, rows: usize| {
                let values = testing::values(seed, rows * width, 1.0);
                (Tensor::from_slice(device, &[rows, width], &values).unwrap(), values)
            };
            let [(mut keys, old_keys), (mut values, old_values)] = [1, 2].map(|seed| tensor(seed, capacity));
            let [(k, new_keys), (v, new_values)] = [3, 4].map(|seed| tensor(seed, rows));
            let before = keys.clone();
            append([&mut keys, &mut values], first, [&k, &v]).unwrap();
            let at = first * width;
            assert_eq!(keys.to_vec().unwrap(), reference(&old_keys, at, &new_keys), "{}", testing::name(device));
            assert_eq!(values.to_vec().unwrap(), reference(&old_values, at, &new_values));
            assert_eq!(before.to_vec().unwrap(), old_keys, "clones keep the old values");
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let zeros = |rows: usize, width: usize| Tensor::zeros(&Device::cpu(), &[rows, width]).unwrap();
        let message = |capacity: usize, width: usize, first: usize| {
            let (mut keys, mut values) = (zeros(capacity, width), zeros(capacity, width));
            append([&mut keys, &mut values], first, [&zeros(2, width), &zeros(2, width)]).unwrap_err().to_string()
        };
        assert!(message(4, 8, 3).contains("2 rows of width 8 from row 3 on, capacity 4"));
        assert!(message(4, 6, 0).contains("divisible by 4"));
    }
}
