//! `Y[m, n] = X[m, n] * c[n] (+ D[m, n] or d[n])`, or `X[m, n] / c[n]`: applies DoRA's factors to
//! activations and gradients.

use rayon::prelude::*;

use crate::device::{Buffer, Defines, Dispatch, Gpu};
use crate::error::{Error, Result};
use crate::kernels::{expect_shape, kernel, params};
use crate::tensor::{Storage, Tensor};

const OP: &str = "scale_columns";

params! {
    struct ScaleColumnsParams {
        first_group: u32,
        groups: u32,
        /// Values of X.
        len: u32,
        /// N.
        columns: u32,
        /// Stride from one row of D to the next, in values; 0: all rows share one.
        add_stride: u32,
    }
}

kernel! {
    KERNEL = "scale_columns" in "elementwise/scale_columns.wgsl", ScaleColumnsParams, [x: Read, c: Read, d: Read, y: Write],
    variants: |_| vec![defines(false, false), defines(true, false), defines(false, true)],
    twin: tests::twin,
}

/// Computes X * c + D on the device of `x`, in its shape. Rows of `x` are as long as `c`; `plus`
/// has the shape of `x` or of `c`.
///
/// # Errors
/// [`Error::Shape`], [`Error::DeviceMismatch`], and device errors.
pub fn scale_columns(x: &Tensor, c: &Tensor, plus: Option<&Tensor>) -> Result<Tensor> {
    run(x, c, plus, false)
}

/// Computes X / c on the device of `x`, in its shape.
///
/// # Errors
/// Like [`scale_columns`].
pub fn divide_columns(x: &Tensor, c: &Tensor) -> Result<Tensor> {
    run(x, c, None, true)
}

fn run(x: &Tensor, c: &Tensor, plus: Option<&Tensor>, divide: bool) -> Result<Tensor> {
    let n = c.len();
    expect_shape(OP, "c", c, &[n])?;
    if x.shape().last() != Some(&n) {
        let (expected, got) = (format!("rows of {n} values, as in c"), format!("{:?}", x.shape()));
        return Err(Error::shape(OP, "X", expected, got));
    }
    let of_row = plus.is_some_and(|plus| plus.shape() != x.shape());
    if let Some(plus) = plus {
        expect_shape(OP, "D", plus, if of_row { c.shape() } else { x.shape() })?;
        x.device().same(&plus.device(), OP)?;
    }
    x.device().same(&c.device(), OP)?;
    match x.storage() {
        Storage::Cpu(cpu, values) => {
            let mut y = cpu.zeros(values.len())?;
            let plus = plus.map(|plus| plus.host(OP)).transpose()?;
            on_cpu(values, c.host(OP)?, plus, of_row, divide, &mut y);
            Ok(Tensor::from_host(cpu, x.shape(), y))
        }
        Storage::Gpu(gpu, x_buffer) => {
            let y = Tensor::uninit(gpu, "scaled", x.shape())?;
            let d = plus.map_or(gpu.unused(), |plus| plus.buffer(gpu, OP))?;
            let buffers = [x_buffer, c.buffer(gpu, OP)?, d, y.buffer(gpu, OP)?];
            let add_stride = if of_row { 0 } else { n as u32 };
            let params =
                ScaleColumnsParams { len: x.len() as u32, columns: n as u32, add_stride, ..Default::default() };
            dispatch(gpu, &buffers, &params, plus.is_some(), divide)?;
            Ok(y)
        }
        Storage::Planned(cpu, _) => Tensor::planned(cpu, x.shape()),
    }
}

/// Approximate number of values per task on the CPU.
const CPU_VALUES: usize = 1 << 14;

fn on_cpu(x: &[f32], c: &[f32], plus: Option<&[f32]>, of_row: bool, divide: bool, y: &mut [f32]) {
    let n = c.len();
    if n == 0 {
        return;
    }
    let rows = (CPU_VALUES / n).max(1);
    y.par_chunks_mut(rows * n).enumerate().for_each(|(task, y)| {
        for (row, y) in (task * rows..).zip(y.chunks_exact_mut(n)) {
            let scaled = y.iter_mut().zip(x[row * n..].iter().zip(c));
            if divide {
                scaled.for_each(|(y, (x, c))| *y = x / c);
            } else {
                scaled.for_each(|(y, (x, c))| *y = x * c);
            }
            if let Some(plus) = plus {
                let plus = if of_row { plus } else { &plus[row * n..] };
                y.iter_mut().zip(plus).for_each(|(y, plus)| *y += plus);
            }
        }
    });
}

/// Invocations per workgroup.
const THREADS: u32 = 64;

fn defines(add: bool, divide: bool) -> Defines {
    Defines::new().with("threads", THREADS).with("add", add).with("divide", divide)
}

fn dispatch(gpu: &Gpu, buffers: &[&Buffer], params: &ScaleColumnsParams, add: bool, divide: bool) -> Result<()> {
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(add, divide),
        buffers,
        params: bytemuck::bytes_of(params),
        groups: params.len.div_ceil(THREADS).into(),
        flops_per_group: 2 * u64::from(THREADS),
    })
}

/// The formula, for any real type; `plus` is [M, N] or `[N]`.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(x: &[T], c: &[T], plus: Option<&[T]>, divide: bool) -> Vec<T> {
    let value = |(i, &x): (usize, &T)| {
        let c = c[i % c.len()];
        let scaled = if divide { x / c } else { x * c };
        scaled + plus.map_or(T::zero(), |plus| plus[i % plus.len()])
    };
    x.iter().enumerate().map(value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::testing;
    use crate::testing::tolerances::SCALE_COLUMNS;

    pub fn twin(device: &Device) {
        for (m, n) in [(0, 3), (3, 0), (1, 1), (5, 37), (129, 300)] {
            let (x, d) = (testing::values(1, m * n, 1e-8), testing::values(2, m * n, 1e4));
            let c: Vec<f32> = testing::values(3, n, 1.0).into_iter().map(|c| c + 1.5).collect();
            let tensor = |shape: &[usize], values: &[f32]| Tensor::from_slice(device, shape, values).unwrap();
            let (x_tensor, c_tensor) = (tensor(&[m, n], &x), tensor(&[n], &c));
            let check = |what: &str, y: Tensor, plus: Option<&[f32]>, divide: bool| {
                assert_eq!(y.shape(), [m, n]);
                let form = |x: &[f64], c: &[f64], d: &[f64]| reference(x, c, plus.map(|_| d), divide);
                let (wanted, terms) = testing::with_terms([&x, &c, plus.unwrap_or(&[])], |[x, c, d]| form(x, c, d));
                let bounds = SCALE_COLUMNS.f32.bounds(&terms);
                let context = format!("{} {what} {m} x {n}", testing::name(device));
                testing::assert_close(&context, &y.to_vec().unwrap(), &wanted, &bounds);
            };
            check("x * c", scale_columns(&x_tensor, &c_tensor, None).unwrap(), None, false);
            check("x / c", divide_columns(&x_tensor, &c_tensor).unwrap(), None, true);
            let all = tensor(&[m, n], &d);
            check("x * c + D", scale_columns(&x_tensor, &c_tensor, Some(&all)).unwrap(), Some(&d), false);
            if m > 0 {
                let row = tensor(&[n], &d[..n]);
                check("x * c + d", scale_columns(&x_tensor, &c_tensor, Some(&row)).unwrap(), Some(&d[..n]), false);
            }
        }
    }

    #[test]
    fn shapes_that_disagree_are_named() {
        let zeros = |shape: &[usize]| Tensor::zeros(&Device::cpu(), shape).unwrap();
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        assert_eq!(
            message(scale_columns(&zeros(&[2, 3]), &zeros(&[2]), None)),
            "scale_columns: X: expected rows of 2 values, as in c, got [2, 3]"
        );
        assert_eq!(
            message(scale_columns(&zeros(&[2, 3]), &zeros(&[3]), Some(&zeros(&[2])))),
            "scale_columns: D: expected [3], got [2]"
        );
        assert_eq!(
            message(divide_columns(&zeros(&[2, 3]), &zeros(&[1, 3]))),
            "scale_columns: c: expected [3], got [1, 3]"
        );
    }
}
