//! Layouts of the cooperative-matrix kernels of [`attention`](crate::kernels::attention), chosen
//! for a head size and a device; `shaders/attention/shared/coop_strips.wgsl`.

use super::pack::{TILE, wide};
use crate::device::{Cooperative, Defines, Gpu, Tier};
use crate::kernels::qmatmul::coop::NVIDIA;
use crate::kernels::qmatmul::tile::has_room;

/// One of the three kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    Forward,
    Dq,
    Dkv,
}

impl Pass {
    /// Workgroup memory for single values of rows, in bytes.
    fn values_of_rows(self, own: u32, other: u32) -> u32 {
        match self {
            Pass::Forward => 4 * own + 32,
            Pass::Dq => 16,
            Pass::Dkv => 20 * other + 16,
        }
    }
}

/// Layout of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Form {
    pub cooperative: Cooperative,
    head_dim: usize,
    /// Strips of 16 own rows each, shared out to the workgroup's four subgroups. With fewer than
    /// four strips, two subgroups share a strip and split the head's values.
    strips: u32,
    staged: Option<Staged>,
}

/// Operands are loaded from workgroup memory instead of buffers.
#[derive(Clone, Copy, Debug)]
struct Staged {
    /// Values of the other rows' heads that are copied at a time.
    slice: u32,
    /// Planes of the own rows kept in registers.
    kept: u32,
    /// Further planes of the own rows, held in workgroup memory.
    held: u32,
}

impl Form {
    /// Chooses the form for a device. AMD's GPUs load whole rows of matrices from buffers;
    /// NVIDIA's compiler turns these into loads of single values. Software drivers take minutes to
    /// compile the staged form of a large head.
    pub fn of(pass: Pass, gpu: &Gpu, cooperative: Cooperative, head_dim: usize) -> Form {
        let staged = if cooperative.vectors && gpu.info().vendor == NVIDIA {
            Form::staged(pass, cooperative, head_dim, |bytes| has_room(gpu, 4 * cooperative.lanes, bytes))
        } else {
            None
        };
        staged.unwrap_or(Form::from_buffers(cooperative, head_dim))
    }

    fn from_buffers(cooperative: Cooperative, head_dim: usize) -> Form {
        let strips = if wide(head_dim) <= 80 { 4 } else { 2 };
        Form { cooperative, head_dim, strips, staged: None }
    }

    /// The staged form, if its workgroup memory `fits`. A thread has 168 registers when three
    /// workgroups share an NVIDIA processor. So less of a larger head is kept in registers, least
    /// where slices are not powers of two; and for heads over 64, two subgroups share the
    /// gradients.
    fn staged(pass: Pass, cooperative: Cooperative, head_dim: usize, fits: impl Fn(u32) -> bool) -> Option<Form> {
        let wide = wide(head_dim) as u32;
        let (strips, slice, kept, held) = match (pass, wide) {
            (Pass::Forward, ..=80) => (4, wide, 2, 0),
            (Pass::Forward, _) => (2, wide.div_ceil(32) * 16, 1, 1),
            (Pass::Dq, ..=64) => (4, wide, 3, 0),
            (Pass::Dkv, ..=64) => (4, wide, 2, 1),
            (Pass::Dq, 128) => (2, 32, 1, 2),
            (Pass::Dq | Pass::Dkv, _) => (2, 32, 0, 2),
        };
        let form = Form { cooperative, head_dim, strips, staged: Some(Staged { slice, kept, held }) };
        fits(form.bytes(pass)).then_some(form)
    }

    /// Bytes of workgroup memory of the staged form.
    fn bytes(self, pass: Pass) -> u32 {
        let Some(Staged { slice, held, .. }) = self.staged else { return 0 };
        let (own, other) = (self.own_rows() as u32, 128 / self.strips);
        let own_plane = own * (wide(self.head_dim) as u32 + 8);
        let copied = own_plane.max(2 * other * (slice + 8));
        4 * own * (other + 4)
            + 2 * own * (other + 8)
            + 2 * (copied + held * own_plane)
            + pass.values_of_rows(own, other)
    }

    /// Rows that a workgroup owns.
    pub fn own_rows(self) -> usize {
        TILE * self.strips as usize
    }

    /// Text constants of the kernel.
    pub fn defines(self) -> Defines {
        let defines = self
            .cooperative
            .defines(Defines::new())
            .with("head_dim", self.head_dim as u32)
            .with("wide", wide(self.head_dim) as u32)
            .with("strips", self.strips)
            .with("staged", self.staged.is_some());
        match self.staged {
            Some(Staged { slice, kept, held }) => defines.with("slice", slice).with("kept", kept).with("held", held),
            None => defines,
        }
    }

    /// Text constants of every variant.
    pub fn variants(pass: Pass, tier: Tier) -> Vec<Defines> {
        let mut all = Vec::new();
        for cooperative in Cooperative::ALL.into_iter().filter(|_| tier.cooperative()) {
            for head_dim in [8, 44, 64, 80, 112, 128] {
                all.push(Form::from_buffers(cooperative, head_dim));
                let staged = || Form::staged(pass, cooperative, head_dim, |bytes| bytes <= 48 << 10);
                all.extend(cooperative.vectors.then(staged).flatten());
            }
        }
        all.into_iter().map(Form::defines).collect()
    }

    /// The forms of small heads and of large heads that fit a device, the one that reads buffers
    /// first. All forms of a list give the same bits.
    #[cfg(test)]
    fn all(pass: Pass, gpu: &Gpu, cooperative: Cooperative, head_dim: usize) -> [Vec<Form>; 2] {
        let limit = if cooperative.vectors { gpu.limits().workgroup_bytes } else { 0 };
        let fits = |form: &Form| form.bytes(pass) <= limit;
        let small = Form::staged(pass, cooperative, head_dim, |bytes| bytes <= limit);
        let of_large_heads: &[(u32, u32)] = match pass {
            Pass::Forward => &[(1, 1)],
            Pass::Dq => &[(1, 2)],
            Pass::Dkv => &[(0, 2)],
        };
        let from_buffers = Form::from_buffers(cooperative, head_dim);
        let large = Form { strips: 2, ..from_buffers };
        let staged = |&(kept, held)| Form { staged: Some(Staged { slice: 16, kept, held }), ..large };
        [
            std::iter::once(from_buffers).chain(small).collect(),
            std::iter::once(large).chain(of_large_heads.iter().map(staged).filter(fits)).collect(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::kernels::attention::Attended;
    use crate::kernels::attention::backward::call::GpuCall;
    use crate::kernels::attention::backward::delta;
    use crate::kernels::attention::backward::dkv_coop;
    use crate::kernels::attention::backward::dq_coop;
    use crate::kernels::attention::coop;
    use crate::kernels::attention::pack::{Packed, cooperative};
    use crate::kernels::attention::tests::Case;
    use crate::tensor::Tensor;
    use crate::testing;

    const OP: &str = "test";

    /// Checks that `run` gives the same results for all forms of a list.
    fn same(name: &str, lists: [Vec<Form>; 2], run: impl Fn(Form) -> Vec<Tensor>) {
        let bits = |form| -> Vec<Vec<u32>> {
            let bits = |tensor: &Tensor| tensor.to_vec().unwrap().into_iter().map(f32::to_bits).collect();
            run(form).iter().map(bits).collect()
        };
        for forms in lists {
            let wanted = bits(forms[0]);
            for &form in &forms[1..] {
                assert!(bits(form) == wanted, "{name}: {form:?} and {:?} differ", forms[0]);
            }
        }
    }

    #[test]
    fn every_form_gives_the_same_bits() {
        for device in testing::gpus() {
            let Device::Gpu(gpu) = &device else { continue };
            // Larger heads take minutes to compile on software drivers.
            let head_dim = 24;
            let segments = [[1; 70].as_slice(), &[2; 30]].concat();
            let case = Case::causal([2, 1, head_dim], &segments, 100, None);
            let ([q, k, v], visibility, shape) = (case.qkv(&device), case.visibility(&device), &case.shape);
            let Some(cooperative) = cooperative(gpu, shape, &visibility) else { continue };
            let forms = |pass| Form::all(pass, gpu, cooperative, head_dim);
            let name = case.name(&device);
            let empty = |like: &Tensor| Tensor::uninit(gpu, OP, like.shape()).unwrap();
            let Attended { o, lse } = case.attend(&device);
            same(&format!("{name} forward"), forms(Pass::Forward), |form| {
                let results = [empty(&o), empty(&lse)];
                coop::dispatch(gpu, form, OP, [&q, &k, &v], shape, &visibility, results.each_ref()).unwrap();
                results.into()
            });
            let d_o = case.tensor(&device, shape.heads, &testing::values(99, case.q.len(), 1.0));
            let stats = delta::dispatch(gpu, &d_o, &o, &lse, head_dim).unwrap();
            let packed = Packed::new(gpu, OP, [&q, &k, &v], Some(&d_o), shape, &visibility).unwrap();
            let tensors = [&q, &k, &v, &d_o];
            let call = GpuCall { op: OP, gpu, tensors, stats: &stats, shape, visibility: &visibility };
            same(&format!("{name} dQ"), forms(Pass::Dq), |form| {
                let dq = empty(&q);
                dq_coop::dispatch(&call, &packed, form, &dq).unwrap();
                vec![dq]
            });
            same(&format!("{name} dK and dV"), forms(Pass::Dkv), |form| {
                let results = [empty(&k), empty(&v)];
                dkv_coop::dispatch(&call, &packed, form, results.each_ref()).unwrap();
                results.into()
            });
        }
    }
}
