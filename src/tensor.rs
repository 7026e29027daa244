//! f32 tensors on a device, with conversions from and to slices and `ndarray` arrays.

use std::ops::Range;
use std::sync::Arc;

use ndarray::{Array2, ArrayBase, Data, Dimension};

use crate::device::ledger::{Part, no_values};
use crate::device::{Buffer, Cpu, Device, Gpu, HostBuffer};
use crate::error::{Error, Result};

/// A row-major f32 tensor. Clones share the values; operations make new tensors.
#[derive(Clone, Debug)]
pub struct Tensor {
    shape: Vec<usize>,
    storage: Storage,
}

#[derive(Clone)]
pub(crate) enum Storage {
    Cpu(Cpu, Arc<HostBuffer>),
    Gpu(Gpu, Buffer),
    /// On a planned CPU: a size without values. A planned GPU has buffers like a real one.
    Planned(Cpu, Arc<HostBuffer>),
}

impl std::fmt::Debug for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Storage::Cpu(..) => write!(f, "cpu"),
            Storage::Gpu(gpu, _) => write!(f, "{}", gpu.name()),
            Storage::Planned(..) => write!(f, "planned cpu"),
        }
    }
}

impl Tensor {
    /// Copies values to a device.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of `values` doesn't match `shape`; [`Error::TooLarge`] and
    /// [`Error::OutOfMemory`] from the device.
    pub fn from_slice(device: &Device, shape: &[usize], values: &[f32]) -> Result<Tensor> {
        let len = element_count(shape)?;
        if len != values.len() {
            return Err(Error::shape("tensor", "number of values", format!("{len} for {shape:?}"), values.len()));
        }
        let storage = match device {
            Device::Cpu(_) if device.is_planned() => return Tensor::zeros(device, shape),
            Device::Cpu(cpu) => Storage::Cpu(cpu.clone(), Arc::new(cpu.adopt(values)?)),
            Device::Gpu(gpu) => Storage::Gpu(gpu.clone(), gpu.upload("tensor", bytemuck::cast_slice(values))?),
        };
        Ok(Tensor { shape: shape.to_vec(), storage })
    }

    /// Like [`Tensor::from_slice`]. The values aren't computed for a planned device.
    pub(crate) fn from_values(device: &Device, shape: &[usize], values: impl FnOnce() -> Vec<f32>) -> Result<Tensor> {
        if device.is_planned() {
            return Tensor::zeros(device, shape);
        }
        Tensor::from_slice(device, shape, &values())
    }

    /// A tensor of zeros.
    pub fn zeros(device: &Device, shape: &[usize]) -> Result<Tensor> {
        match device {
            Device::Cpu(cpu) if device.is_planned() => Tensor::planned(cpu, shape),
            Device::Cpu(cpu) => {
                let len = element_count(shape)?;
                Ok(Tensor::from_host(cpu, shape, cpu.zeros(len)?))
            }
            Device::Gpu(gpu) => {
                let bytes = element_count(shape)? as u64 * 4;
                Ok(Tensor::from_buffer(gpu, shape, gpu.zeroed("zeros", bytes)?))
            }
        }
    }

    /// Copies an array to a device, in row-major order whatever the array's layout.
    pub fn from_array<S: Data<Elem = f32>, D: Dimension>(device: &Device, array: &ArrayBase<S, D>) -> Result<Tensor> {
        let standard = array.as_standard_layout();
        match standard.as_slice() {
            Some(values) => Tensor::from_slice(device, array.shape(), values),
            None => Tensor::from_slice(device, array.shape(), &standard.iter().copied().collect::<Vec<_>>()),
        }
    }

    pub(crate) fn from_host(cpu: &Cpu, shape: &[usize], values: HostBuffer) -> Tensor {
        Tensor { shape: shape.to_vec(), storage: Storage::Cpu(cpu.clone(), Arc::new(values)) }
    }

    /// A tensor on a planned CPU.
    pub(crate) fn planned(cpu: &Cpu, shape: &[usize]) -> Result<Tensor> {
        let reserved = cpu.reserve(element_count(shape)?);
        Ok(Tensor { shape: shape.to_vec(), storage: Storage::Planned(cpu.clone(), Arc::new(reserved)) })
    }

    pub(crate) fn from_buffer(gpu: &Gpu, shape: &[usize], buffer: Buffer) -> Tensor {
        Tensor { shape: shape.to_vec(), storage: Storage::Gpu(gpu.clone(), buffer) }
    }

    /// Allocates a tensor that a kernel will write; contents are unspecified.
    pub(crate) fn uninit(gpu: &Gpu, what: &str, shape: &[usize]) -> Result<Tensor> {
        let bytes = element_count(shape)? as u64 * 4;
        Ok(Tensor::from_buffer(gpu, shape, gpu.alloc(what, bytes)?))
    }

    /// Sizes of the dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The device that holds the values.
    pub fn device(&self) -> Device {
        match &self.storage {
            Storage::Cpu(cpu, _) | Storage::Planned(cpu, _) => Device::Cpu(cpu.clone()),
            Storage::Gpu(gpu, _) => Device::Gpu(gpu.clone()),
        }
    }

    pub(crate) fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Bytes that the values take on the device.
    pub(crate) fn resident_bytes(&self) -> u64 {
        match &self.storage {
            Storage::Cpu(..) | Storage::Planned(..) => self.len() as u64 * 4,
            Storage::Gpu(_, buffer) => buffer.resident_bytes(),
        }
    }

    /// The host values, for CPU kernels. An error if the values are on a GPU.
    pub(crate) fn host(&self, op: &'static str) -> Result<&[f32]> {
        match &self.storage {
            Storage::Cpu(_, values) => Ok(values),
            Storage::Gpu(gpu, _) => Err(Error::DeviceMismatch { op, left: "cpu".into(), right: gpu.name().to_owned() }),
            Storage::Planned(..) => Err(no_values("cpu")),
        }
    }

    /// On a planned device, counts the tensor's memory for this use from now on.
    pub(crate) fn count_as(&self, part: Part) {
        let charge = match &self.storage {
            Storage::Cpu(_, values) | Storage::Planned(_, values) => values.charge(),
            Storage::Gpu(_, buffer) => buffer.charge(),
        };
        if let Some(charge) = charge {
            charge.move_to(part);
        }
    }

    /// The GPU buffer, for kernels on `gpu`. An error if the values are elsewhere.
    pub(crate) fn buffer(&self, gpu: &Gpu, op: &'static str) -> Result<&Buffer> {
        match &self.storage {
            Storage::Gpu(home, buffer) if home.is(gpu) => Ok(buffer),
            _ => Err(Error::DeviceMismatch { op, left: gpu.name().to_owned(), right: self.device().name().to_owned() }),
        }
    }

    /// Returns the same shared values under another shape with as many values.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of values differs.
    pub fn reshape(&self, shape: &[usize]) -> Result<Tensor> {
        if element_count(shape)? != self.len() {
            let (expected, got) = (format!("{} values", self.len()), format!("{shape:?}"));
            return Err(Error::shape("reshape", "new shape", expected, got));
        }
        Ok(Tensor { shape: shape.to_vec(), storage: self.storage.clone() })
    }

    /// Copies a range of rows (of the first dimension). The range of all rows shares the values
    /// instead.
    ///
    /// # Errors
    /// [`Error::Shape`] if the range is out of bounds.
    pub fn rows(&self, rows: Range<usize>) -> Result<Tensor> {
        let values = self.row_values("rows", &rows)?;
        if rows.len() == self.shape[0] {
            return Ok(self.clone());
        }
        let mut shape = self.shape.clone();
        shape[0] = rows.len();
        match &self.storage {
            Storage::Cpu(cpu, host) => Ok(Tensor::from_host(cpu, &shape, cpu.adopt(&host[values])?)),
            Storage::Gpu(gpu, buffer) => {
                let copy = Tensor::uninit(gpu, "rows", &shape)?;
                gpu.copy(buffer, 4 * values.start as u64, copy.buffer(gpu, "rows")?, 0, 4 * values.len() as u64)?;
                Ok(copy)
            }
            Storage::Planned(cpu, _) => Tensor::planned(cpu, &shape),
        }
    }

    /// Overwrites rows from `first` on with `rows`. If that replaces all rows, shares the values
    /// of `rows`.
    pub(crate) fn set_rows(&mut self, first: usize, rows: &Tensor) -> Result<()> {
        const OP: &str = "set_rows";
        if rows.shape.is_empty() || rows.shape[1..] != self.shape[1..] {
            let (expected, got) = (format!("rows of {:?}", self.shape), format!("{:?}", rows.shape));
            return Err(Error::shape(OP, "rows", expected, got));
        }
        self.device().same(&rows.device(), OP)?;
        let values = self.row_values(OP, &(first..first + rows.shape[0]))?;
        if rows.shape == self.shape {
            *self = rows.clone();
            return Ok(());
        }
        self.unshare()?;
        match &self.storage {
            Storage::Cpu(..) => self.host_mut(OP)?[values].copy_from_slice(rows.host(OP)?),
            Storage::Gpu(gpu, buffer) => {
                gpu.copy(rows.buffer(gpu, OP)?, 0, buffer, 4 * values.start as u64, 4 * values.len() as u64)?;
            }
            Storage::Planned(..) => {}
        }
        Ok(())
    }

    /// The range of values that these rows occupy.
    fn row_values(&self, op: &'static str, rows: &Range<usize>) -> Result<Range<usize>> {
        match self.shape[..] {
            [count, ref row @ ..] if rows.start <= rows.end && rows.end <= count => {
                let len = row.iter().product::<usize>();
                Ok(rows.start * len..rows.end * len)
            }
            _ => {
                let (expected, got) = (format!("rows of {:?}", self.shape), format!("{rows:?}"));
                Err(Error::shape(op, "rows", expected, got))
            }
        }
    }

    /// Makes this the only tensor with its values, so that a kernel can update it in place. Copies
    /// them if they are shared.
    pub(crate) fn unshare(&mut self) -> Result<()> {
        match &mut self.storage {
            Storage::Cpu(cpu, values) => {
                if Arc::get_mut(values).is_none() {
                    *values = Arc::new(cpu.adopt(values)?);
                }
            }
            Storage::Gpu(gpu, buffer) => {
                if buffer.is_shared() {
                    *buffer = gpu.copy_of("tensor", buffer)?;
                }
            }
            Storage::Planned(cpu, reserved) => {
                if Arc::get_mut(reserved).is_none() {
                    *reserved = Arc::new(cpu.reserve(self.shape.iter().product()));
                }
            }
        }
        Ok(())
    }

    /// The host values, for updates in place. Tensors that shared them keep the old values.
    pub(crate) fn host_mut(&mut self, op: &'static str) -> Result<&mut [f32]> {
        self.unshare()?;
        match &mut self.storage {
            Storage::Cpu(_, values) => match Arc::get_mut(values) {
                Some(values) => Ok(values),
                None => Err(Error::invalid(
                    op,
                    "the tensor",
                    "shared again while it was updated",
                    "only one thread may update it",
                )),
            },
            Storage::Gpu(gpu, _) => Err(Error::DeviceMismatch { op, left: "cpu".into(), right: gpu.name().to_owned() }),
            Storage::Planned(..) => Err(no_values("cpu")),
        }
    }

    /// Where the values are: equal for live tensors if and only if they share them.
    #[cfg(test)]
    pub(crate) fn place(&self) -> usize {
        match &self.storage {
            Storage::Cpu(_, values) | Storage::Planned(_, values) => Arc::as_ptr(values).addr(),
            Storage::Gpu(_, buffer) => buffer.id() as usize,
        }
    }

    /// Returns the values; waits for the device.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        match &self.storage {
            Storage::Cpu(_, values) => Ok(values.to_vec()),
            Storage::Gpu(gpu, buffer) => Ok(from_bytes(&gpu.read(buffer, self.len() as u64 * 4)?)),
            Storage::Planned(..) => Err(no_values("cpu")),
        }
    }

    /// Like [`Tensor::to_vec`], without blocking the thread while the device works.
    pub async fn to_vec_async(&self) -> Result<Vec<f32>> {
        match &self.storage {
            Storage::Cpu(_, values) => Ok(values.to_vec()),
            Storage::Gpu(gpu, buffer) => Ok(from_bytes(&gpu.read_async(buffer, self.len() as u64 * 4).await?)),
            Storage::Planned(..) => Err(no_values("cpu")),
        }
    }

    /// Returns a 2-D tensor as an array.
    pub fn to_array2(&self) -> Result<Array2<f32>> {
        let wrong = |got| Error::shape("to_array2", "shape", "[rows, columns]", got);
        let [rows, cols] = self.shape[..] else { return Err(wrong(format!("{:?}", self.shape))) };
        Array2::from_shape_vec((rows, cols), self.to_vec()?).map_err(|error| wrong(error.to_string()))
    }

    /// Copies the tensor to another device; on the same device, returns a clone.
    pub fn to_device(&self, device: &Device) -> Result<Tensor> {
        if self.device().is(device) {
            return Ok(self.clone());
        }
        Tensor::from_slice(device, &self.shape, &self.to_vec()?)
    }
}

/// Copies `bytes` as f32 values, because they may be unaligned.
pub(crate) fn from_bytes(bytes: &[u8]) -> Vec<f32> {
    bytemuck::pod_collect_to_vec(bytes)
}

/// Number of values in a tensor of this shape.
///
/// # Errors
/// [`Error::Invalid`] for 2^32 - 1 or more.
pub(crate) fn element_count(shape: &[usize]) -> Result<usize> {
    let count = shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size));
    // Kernels index with u32.
    count
        .filter(|&count| count < u32::MAX as usize)
        .ok_or_else(|| Error::invalid("tensor", "shape", format!("{shape:?}"), "a tensor has fewer than 2^32 values"))
}

#[cfg(test)]
mod tests {
    use ndarray::arr2;

    use super::*;
    use crate::device::ledger::{Ledger, Tally};
    use crate::indices::Indices;
    use crate::kernels::elementwise::add::add;
    use crate::testing;

    #[test]
    fn values_come_back_from_every_device() {
        for device in testing::devices() {
            let values: Vec<f32> = (0..1001).map(|i| i as f32 * 0.5 - 100.0).collect();
            let tensor = Tensor::from_slice(&device, &[7, 143], &values).unwrap();
            assert_eq!(tensor.to_vec().unwrap(), values, "{device:?}");
            assert_eq!(pollster::block_on(tensor.to_vec_async()).unwrap(), values, "{device:?}");
            assert_eq!(tensor.to_device(&Device::cpu()).unwrap().to_vec().unwrap(), values);
            assert!(Tensor::zeros(&device, &[3, 5]).unwrap().to_vec().unwrap().iter().all(|&value| value == 0.0));
        }
    }

    #[test]
    fn arrays_of_any_layout_go_in_row_major() {
        let array = arr2(&[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]);
        let tensor = Tensor::from_array(&Device::cpu(), &array.t()).unwrap();
        assert_eq!(tensor.shape(), [3, 2]);
        assert_eq!(tensor.to_vec().unwrap(), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        assert_eq!(tensor.to_array2().unwrap(), array.t());
    }

    #[test]
    fn an_update_in_place_leaves_tensors_that_shared_the_values_alone() {
        for device in testing::devices() {
            let first = Tensor::from_slice(&device, &[2, 3], &[1.0; 6]).unwrap();
            let mut second = first.reshape(&[3, 2]).unwrap();
            assert_eq!((first.place(), second.shape()), (second.place(), &[3, 2][..]));
            second.unshare().unwrap();
            assert_ne!(first.place(), second.place());
            let place = second.place();
            second.unshare().unwrap();
            assert_eq!(second.place(), place, "it is alone already");
            assert_eq!(second.to_vec().unwrap(), [1.0; 6]);
            assert_eq!(
                first.reshape(&[4, 2]).unwrap_err().to_string(),
                "reshape: new shape: expected 6 values, got [4, 2]"
            );
        }
        let mut tensor = Tensor::zeros(&Device::cpu(), &[2]).unwrap();
        let before = tensor.clone();
        tensor.host_mut("test").unwrap()[1] = 5.0;
        assert_eq!((before.to_vec().unwrap(), tensor.to_vec().unwrap()), (vec![0.0; 2], vec![0.0, 5.0]));
    }

    #[test]
    fn a_planned_tensor_has_a_size_but_no_values() {
        for device in testing::devices() {
            let ledger = Ledger::new(Part::Activations);
            let planned = device.planned(&ledger);
            let first = Tensor::from_slice(&planned, &[5, 3], &[1.0; 15]).unwrap();
            let mut second = first.clone();
            second.unshare().unwrap();
            second.count_as(Part::Gradients);
            assert_eq!(second.rows(1..3).unwrap().shape(), [2, 3], "{device:?}");
            let Tally { most, .. } = ledger.tally();
            assert_eq!((most.activations, most.gradients), (512, 256), "before it moved, it counted there");
            assert_ne!(first.place(), second.place());
            assert!(first.to_vec().is_err() && first.to_device(&device).is_err());
            let indices = Indices::from_slice(&planned, &[1, 2]).unwrap();
            assert!(indices.len() == 2 && indices.to_vec().is_err());
            assert!(add(&first, &Tensor::zeros(&device, &[5, 3]).unwrap()).is_err(), "not the real device");
            assert!(add(&first, &second).unwrap().device().is(&planned));
        }
    }

    #[test]
    fn rows_are_copied_out_and_in() {
        for device in testing::devices() {
            let values: Vec<f32> = (0..15).map(|i| i as f32).collect();
            let all = Tensor::from_slice(&device, &[5, 3], &values).unwrap();
            let middle = all.rows(1..3).unwrap();
            assert_eq!((middle.shape(), middle.to_vec().unwrap()), (&[2, 3][..], values[3..9].to_vec()));
            assert_eq!(all.rows(0..5).unwrap().place(), all.place());
            assert!(all.rows(2..2).unwrap().is_empty());
            let mut other = all.clone();
            other.set_rows(3, &middle).unwrap();
            assert_eq!(other.to_vec().unwrap(), [&values[..9], &values[3..9]].concat());
            assert_eq!(all.to_vec().unwrap(), values);
            other.set_rows(0, &all).unwrap();
            assert_eq!(other.place(), all.place());
            assert_eq!(all.rows(4..6).unwrap_err().to_string(), "rows: rows: expected rows of [5, 3], got 4..6");
            assert_eq!(
                other.set_rows(4, &middle).unwrap_err().to_string(),
                "set_rows: rows: expected rows of [5, 3], got 4..6"
            );
            assert_eq!(
                other.set_rows(0, &middle.reshape(&[3, 2]).unwrap()).unwrap_err().to_string(),
                "set_rows: rows: expected rows of [5, 3], got [3, 2]"
            );
        }
    }

    #[test]
    fn a_wrong_count_is_an_error_that_says_both() {
        let error = Tensor::from_slice(&Device::cpu(), &[2, 3], &[0.0; 5]).unwrap_err().to_string();
        assert_eq!(error, "tensor: number of values: expected 6 for [2, 3], got 5");
        assert_eq!(
            Tensor::zeros(&Device::cpu(), &[1 << 20, 1 << 20]).unwrap_err().to_string(),
            "tensor: shape is [1048576, 1048576]; a tensor has fewer than 2^32 values"
        );
    }
}
