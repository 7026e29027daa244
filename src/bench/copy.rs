//! Measures copies of device memory: the upper bound for memory-bound kernels.

use serde::Serialize;

use super::repeat;
use crate::device::{Device, Gpu};
use crate::error::{Error, Result};
use crate::kernels::elementwise::append::append;
use crate::tensor::Tensor;

/// Columns of the copied tensors.
const WIDTH: usize = 1024;

/// Copy speed of a device.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct CopyRates {
    /// Bytes of one copy. This many are read, and this many written.
    pub bytes: u64,
    /// Copying from buffer to buffer by the driver: bytes read and written per second, in 10^9, at
    /// the median.
    pub buffer_gb_per_s: f64,
    /// The same, by a kernel of this library.
    pub kernel_gb_per_s: f64,
}

/// Times copies of `bytes`. If there isn't room for twice as much, halves the size until there is.
///
/// # Errors
/// [`Error::Unsupported`] on the CPU device; errors of allocating even a few rows.
pub fn measure_copy(device: &Device, bytes: u64) -> Result<CopyRates> {
    let Device::Gpu(gpu) = device else {
        let (what, hint) = ("timing copies of device memory".into(), "it works on GPUs only".into());
        return Err(Error::Unsupported { device: device.name().to_owned(), what, hint });
    };
    // The kernel copies two tensors at once, each bound as a whole.
    let half = (bytes / 2).min(gpu.limits().max_binding_bytes);
    let mut rows = ((half / (4 * WIDTH as u64)) as usize).max(1);
    loop {
        match measure_rows(device, gpu, rows) {
            Err(Error::OutOfMemory { .. } | Error::TooLarge { .. }) if rows > 1 => rows /= 2,
            done => return done,
        }
    }
}

fn measure_rows(device: &Device, gpu: &Gpu, rows: usize) -> Result<CopyRates> {
    let bytes = (2 * 4 * WIDTH * rows) as u64;
    let tensor = || Tensor::zeros(device, &[rows, WIDTH]);
    let (from, mut to) = ([tensor()?, tensor()?], [tensor()?, tensor()?]);
    let by_buffer = || {
        from.iter()
            .zip(&to)
            .try_for_each(|(from, to)| gpu.copy(from.buffer(gpu, "copy")?, 0, to.buffer(gpu, "copy")?, 0, bytes / 2))
    };
    let rate = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        2.0 * bytes as f64 / times[times.len() / 2] / 1e9
    };
    by_buffer()?;
    let buffer_gb_per_s = rate(repeat(|| gpu.time(by_buffer))?);
    let mut by_kernel = || {
        let [keys, values] = &mut to;
        append([keys, values], 0, [&from[0], &from[1]])
    };
    by_kernel()?;
    let kernel_gb_per_s = rate(repeat(|| gpu.time(&mut by_kernel))?);
    Ok(CopyRates { bytes, buffer_gb_per_s, kernel_gb_per_s })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_timed_on_gpus() {
        for device in crate::testing::devices() {
            match (measure_copy(&device, 1 << 16), &device) {
                (Ok(rates), Device::Gpu(_)) => {
                    assert!(
                        rates.bytes == 1 << 16 && rates.buffer_gb_per_s > 0.0 && rates.kernel_gb_per_s > 0.0,
                        "{rates:?}"
                    );
                }
                (Err(error @ Error::Unsupported { .. }), Device::Cpu(_)) => {
                    assert!(error.to_string().contains("timing copies of device memory"), "{error}");
                }
                (other, _) => panic!("{}: {other:?}", device.name()),
            }
        }
    }
}
