//! Compute pipelines, compiled once per kernel variant, and their bind groups.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::buffer::Buffer;
use super::lanes;
use super::raw::{MAX_PARAMS_BYTES, Raw};
use super::shader::{Access, Defines, Kernel, compose};
use super::variables::checks;
use crate::error::{Error, Result};
use crate::hash::QuickState;

/// Maximum storage buffers of a kernel.
const MAX_BINDINGS: usize = 16;
/// After this many new bind groups of a pipeline, those that weren't used meanwhile are dropped.
const MAX_BIND_GROUPS: usize = 2048;

/// A compiled variant of a kernel.
pub(super) struct Pipeline {
    pub(super) raw: wgpu::ComputePipeline,
    kernel: &'static str,
    defines: Defines,
    layout: wgpu::BindGroupLayout,
    label: String,
    bind_groups: Mutex<BindGroups>,
}

/// All pipelines of a device, by kernel name and variant.
#[derive(Default)]
pub(super) struct Pipelines {
    compiled: Mutex<HashMap<&'static str, Variants, QuickState>>,
    trail: Mutex<Trail>,
}

type Variants = HashMap<Defines, Arc<Pipeline>, QuickState>;

/// Bind groups by the ids of their buffers: recently used ones, and older ones.
#[derive(Default)]
struct BindGroups {
    young: ByIds,
    old: ByIds,
}

/// Ids of a kernel's buffers, padded with 0. The fixed size keeps keys inside the map.
type Ids = [u32; MAX_BINDINGS];

fn ids(buffers: &[&Buffer]) -> Ids {
    let mut ids = [0; MAX_BINDINGS];
    ids.iter_mut().zip(buffers).for_each(|(id, buffer)| *id = buffer.id());
    ids
}

/// Pipeline and bind group of a dispatch.
#[derive(Clone)]
pub(super) struct Bound {
    pub(super) pipeline: Arc<Pipeline>,
    pub(super) group: wgpu::BindGroup,
}

/// Bindings of the dispatches since the last read, in order. A training step, or a token, binds
/// the same as the one before, so the next dispatch finds its bindings here without a map lookup.
#[derive(Default)]
struct Trail {
    /// `None` for a dispatch whose buffers are gone.
    steps: Vec<Option<(Ids, Bound)>>,
    /// Position of the next dispatch.
    at: usize,
}

/// Maximum dispatches in a trail; later ones are looked up.
const MAX_TRAIL: usize = 1 << 14;
type ByIds = HashMap<Ids, wgpu::BindGroup, QuickState>;

impl BindGroups {
    fn get(&mut self, ids: &Ids) -> Option<wgpu::BindGroup> {
        if let Some(group) = self.young.get(ids) {
            return Some(group.clone());
        }
        let group = self.old.remove(ids)?;
        self.insert(*ids, group.clone());
        Some(group)
    }

    fn insert(&mut self, ids: Ids, group: wgpu::BindGroup) {
        if self.young.len() >= MAX_BIND_GROUPS {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(ids, group);
    }
}

impl Pipelines {
    /// Returns the bindings of this dispatch, if the same one was here last time.
    pub(super) fn expected(&self, kernel: &Kernel, defines: &Defines, buffers: &[&Buffer]) -> Option<Bound> {
        let trail = &mut *self.trail();
        let (ids, bound) = trail.steps.get(trail.at)?.as_ref()?;
        let pipeline = &*bound.pipeline;
        // Kernel names are unique.
        let same = std::ptr::eq(pipeline.kernel, kernel.name)
            && buffers.iter().zip(ids).all(|(buffer, id)| buffer.id() == *id)
            && pipeline.defines == *defines;
        same.then(|| {
            trail.at += 1;
            bound.clone()
        })
    }

    /// Remembers the bindings of a dispatch that was not expected.
    pub(super) fn note(&self, buffers: &[&Buffer], bound: &Bound) {
        let trail = &mut *self.trail();
        let step = Some((ids(buffers), bound.clone()));
        if let Some(place) = trail.steps.get_mut(trail.at) {
            *place = step;
        } else if trail.steps.len() < MAX_TRAIL {
            trail.steps.push(step);
        } else {
            return;
        }
        trail.at += 1;
    }

    /// Starts again: the next dispatch is the first of the trail.
    pub(super) fn restart_trail(&self) {
        self.trail().at = 0;
    }

    fn trail(&self) -> MutexGuard<'_, Trail> {
        self.trail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the pipeline of this variant; compiles it on first use.
    pub(super) fn get(&self, raw: &Raw, kernel: &'static Kernel, defines: &Defines) -> Result<Arc<Pipeline>> {
        // Held while compiling, so that two threads that want the same variant compile it once.
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        let variants = compiled.entry(kernel.name).or_default();
        if let Some(pipeline) = variants.get(defines) {
            return Ok(pipeline.clone());
        }
        let pipeline = Arc::new(Pipeline::compile(raw, kernel, defines)?);
        variants.insert(defines.clone(), pipeline.clone());
        Ok(pipeline)
    }

    /// Number of variants compiled so far.
    pub(super) fn len(&self) -> usize {
        self.compiled.lock().unwrap_or_else(PoisonError::into_inner).values().map(HashMap::len).sum()
    }

    /// Removes and returns the bind groups of buffers that no longer exist. Dropping them frees
    /// the memory.
    pub(super) fn forget_buffers(&self, retired: &[u32]) -> Vec<wgpu::BindGroup> {
        let compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        let retired: HashSet<u32, QuickState> = retired.iter().copied().collect();
        let gone = |ids: &Ids| ids.iter().take_while(|id| **id > 0).any(|id| retired.contains(id));
        let mut forgotten = Vec::new();
        for step in &mut self.trail().steps {
            let step = step.take_if(|(ids, _)| gone(ids));
            forgotten.extend(step.map(|(_, bound)| bound.group));
        }
        for pipeline in compiled.values().flat_map(HashMap::values) {
            let groups = &mut *pipeline.bind_groups.lock().unwrap_or_else(PoisonError::into_inner);
            for groups in [&mut groups.young, &mut groups.old] {
                let groups = groups.extract_if(|ids, _| gone(ids));
                forgotten.extend(groups.map(|(_, group)| group));
            }
        }
        forgotten
    }
}

impl Pipeline {
    fn compile(raw: &Raw, kernel: &'static Kernel, defines: &Defines) -> Result<Pipeline> {
        let _span = tracing::trace_span!("compiling kernels").entered();
        let start = Instant::now();
        let label = format!("{} {}", kernel.name, defines.label());
        let immediates = raw.limits.immediates;
        if kernel.bindings.len() > MAX_BINDINGS {
            return Err(raw.error(&label, format!("a kernel has at most {MAX_BINDINGS} buffers")));
        }
        let source = compose(kernel, defines, immediates).map_err(|message| raw.error(&label, message))?;
        let storage = kernel.bindings.iter().map(|(_, access)| wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Storage { read_only: *access == Access::Read },
            has_dynamic_offset: false,
            min_binding_size: None,
        });
        let uniform = (!immediates).then_some(wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Uniform,
            has_dynamic_offset: true,
            min_binding_size: None,
        });
        let entries: Vec<_> = (0..)
            .zip(storage.chain(uniform))
            .map(|(binding, ty)| wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty,
                count: None,
            })
            .collect();
        let (compiled, layout) = raw.scoped(&label, |device| {
            let module = shader_module(device, &label, source);
            let layout = device
                .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(&label), entries: &entries });
            let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: Some(&label),
                bind_group_layouts: &[Some(&layout)],
                immediate_size: if immediates { kernel.params_bytes as u32 } else { 0 },
            });
            let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(&label),
                layout: Some(&pipeline_layout),
                module: &module,
                entry_point: Some("main"),
                compilation_options: wgpu::PipelineCompilationOptions {
                    // Every kernel writes its workgroup memory before reading it.
                    zero_initialize_workgroup_memory: false,
                    ..Default::default()
                },
                cache: None,
            });
            (pipeline, layout)
        })?;
        tracing::debug!(ms = start.elapsed().as_secs_f64() * 1e3, "compiled {label}");
        if let Some(cooperative) = raw.cooperative.filter(|_| defines.is_cooperative() && checks()) {
            let measured = lanes::measured(raw, &label, kernel, &compiled, &layout)?;
            if measured != cooperative.lanes {
                return Err(Error::Unsupported {
                    device: raw.name.clone(),
                    what: format!("{label} with subgroups of {measured} lanes, for which it was not compiled,"),
                    hint: "set QLORA_TIER=subgroup-f16 to avoid cooperative matrices".into(),
                });
            }
        }
        let (kernel, defines) = (kernel.name, defines.clone());
        Ok(Pipeline { raw: compiled, kernel, defines, layout, label, bind_groups: Mutex::default() })
    }

    /// Returns the bind group of these buffers, and of the batch's parameters if they are in a
    /// buffer; made on first use.
    pub(super) fn bind_group(
        &self,
        raw: &Raw,
        buffers: &[&Buffer],
        uniforms: Option<&wgpu::Buffer>,
    ) -> Result<wgpu::BindGroup> {
        let ids = ids(buffers);
        let mut groups = self.bind_groups.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(group) = groups.get(&ids) {
            return Ok(group);
        }
        let parameters = uniforms.map(|buffer| {
            wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                buffer,
                offset: 0,
                size: wgpu::BufferSize::new(u64::from(MAX_PARAMS_BYTES)),
            })
        });
        let resources = buffers.iter().map(|buffer| buffer.binding()).chain(parameters);
        let entries: Vec<_> =
            (0..).zip(resources).map(|(binding, resource)| wgpu::BindGroupEntry { binding, resource }).collect();
        let group = raw.scoped(&self.label, |device| {
            device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(&self.label),
                layout: &self.layout,
                entries: &entries,
            })
        })?;
        groups.insert(ids, group.clone());
        Ok(group)
    }
}

/// Debug builds keep all run-time checks in the driver's code; release builds omit them.
fn shader_module(device: &wgpu::Device, label: &str, source: String) -> wgpu::ShaderModule {
    let descriptor =
        wgpu::ShaderModuleDescriptor { label: Some(label), source: wgpu::ShaderSource::Wgsl(source.into()) };
    if cfg!(debug_assertions) {
        return device.create_shader_module(descriptor);
    }
    // SAFETY: the omitted checks guard against out-of-bounds indices, endless loops and division
    // by zero. The host validates every shape before it dispatches. Kernels clamp rows and columns
    // to the matrix, bound every loop by a parameter, and divide only by constants and non-zero
    // tile counts. The same shaders run with all checks in debug builds, where the tests compare
    // them with their CPU twins.
    unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
}
