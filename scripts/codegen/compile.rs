//! Compiles variants of kernels like wgpu does (same device features, same SPIR-V, same stage
//! flags), and reads the result from the driver's compiler through
//! VK_KHR_pipeline_executable_properties. Nothing is run.

use std::collections::BTreeMap;
use std::error::Error;
use std::ffi::{CStr, c_char};

use ash::vk;
use qlora_wgpu::registry::{Kernel, compose};
use qlora_wgpu::wgpu::{self, Features, hal, naga};

use crate::variants::{Variant, number};

/// A compiled variant, as the driver describes it.
pub struct Compiled {
    /// Threads per subgroup.
    pub subgroup: u32,
    pub statistics: BTreeMap<String, f64>,
    /// Representations of the program by name; the last one is machine code.
    pub texts: Vec<(String, String)>,
}

/// The only device of a driver, created like in the program.
pub struct Driver {
    /// Names of the GPU and its driver.
    pub name: String,
    features: Features,
    subgroup_sizes: [u32; 2],
    cooperative_edges: Vec<u32>,
    immediates: bool,
    robust: bool,
    device: ash::Device,
    executables: ash::khr::pipeline_executable_properties::Device,
    // Owners that keep `device` alive.
    _opened: hal::OpenDevice<hal::api::Vulkan>,
    _instance: wgpu::Instance,
}

impl Driver {
    /// Opens the device. Unless `robust`, it omits the bounds checks of buffers that wgpu asks
    /// for.
    pub fn open(robust: bool) -> Result<Driver, Box<dyn Error>> {
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
        let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::VULKAN));
        let adapter = adapters.into_iter().next().ok_or("Vulkan lists no adapter")?;
        let info = adapter.get_info();
        let wanted = Features::SUBGROUP
            | Features::SHADER_F16
            | Features::IMMEDIATES
            | Features::TIMESTAMP_QUERY
            | Features::TIMESTAMP_QUERY_INSIDE_ENCODERS
            | Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
        let features = adapter.features() & wanted;
        let limits = adapter.limits();
        let square = |shape: &&wgpu::CooperativeMatrixProperties| {
            let types = (shape.ab_type, shape.cr_type);
            [shape.m_size, shape.n_size] == [shape.k_size; 2]
                && types == (wgpu::CooperativeScalarType::F16, wgpu::CooperativeScalarType::F32)
        };
        let shapes = adapter.cooperative_matrix_properties();
        let cooperative_edges = shapes.iter().filter(square).map(|shape| shape.m_size).collect();
        // SAFETY: the adapter outlives this use of it.
        let hal_adapter = unsafe { adapter.as_hal::<hal::api::Vulkan>() }.ok_or("the adapter is not Vulkan's")?;
        let raw_instance = hal_adapter.shared_instance().raw_instance().clone();
        let mut information =
            vk::PhysicalDevicePipelineExecutablePropertiesFeaturesKHR::default().pipeline_executable_info(true);
        let mut robustness = vk::PhysicalDevicePipelineRobustnessFeaturesEXT::default().pipeline_robustness(true);
        let (information, robustness) = (&raw mut information, &raw mut robustness);
        let extend: Box<hal::vulkan::CreateDeviceCallback<'_>> = Box::new(|args| {
            args.extensions.push(ash::khr::pipeline_executable_properties::NAME);
            // SAFETY: both live until the device is created, and nothing else points to them.
            *args.create_info = std::mem::take(args.create_info).push_next(unsafe { &mut *information });
            if !robust {
                args.extensions.push(ash::ext::pipeline_robustness::NAME);
                // SAFETY: as above.
                *args.create_info = std::mem::take(args.create_info).push_next(unsafe { &mut *robustness });
            }
        });
        // SAFETY: the features are the GPU's own, and the drivers that this program is for have
        // the extensions.
        let opened = unsafe {
            hal_adapter.open_with_callback(features, &limits, &wgpu::MemoryHints::MemoryUsage, Some(extend))?
        };
        let device = opened.device.raw_device().clone();
        Ok(Driver {
            name: format!("{}, {} {}", info.name, info.driver, info.driver_info),
            features,
            subgroup_sizes: [info.subgroup_min_size, info.subgroup_max_size],
            cooperative_edges,
            immediates: features.contains(Features::IMMEDIATES) && limits.max_immediate_size >= 128,
            robust,
            executables: ash::khr::pipeline_executable_properties::Device::new(&raw_instance, &device),
            device,
            _opened: opened,
            _instance: instance,
        })
    }

    /// Whether the device has the cooperative matrices of the variant, in subgroups of its size,
    /// and would use its tile.
    pub fn runs(&self, variant: &Variant) -> bool {
        let [least, most] = self.subgroup_sizes;
        let edge = number(&variant.label, "edge").is_none_or(|edge| self.cooperative_edges.contains(&edge));
        // The tiles of products in src/kernels/qmatmul/coop.rs: AMD's GPUs, whose subgroups have
        // two sizes, use one buffer, and NVIDIA's large tile uses two.
        let double = variant.label.split(' ').any(|part| part == "double");
        let tile = number(&variant.label, "subgroups").is_none()
            || if least == most { double || number(&variant.label, "tile_rows") == Some(64) } else { !double };
        // There attention loads its matrices from buffers; elsewhere from workgroup memory.
        let staged = variant.label.split(' ').any(|part| part == "staged");
        let form = number(&variant.label, "strips").is_none() || staged == (least == most);
        edge && (!variant.cooperative()
            || tile && form && number(&variant.label, "lanes").is_none_or(|lanes| (least..=most).contains(&lanes)))
    }

    /// Compiles a variant.
    pub fn compile(&self, variant: &Variant) -> Result<Compiled, Box<dyn Error>> {
        let spirv = spirv(variant, self.immediates)?;
        // SAFETY: everything made here is made of valid parts, used by this thread alone, and
        // destroyed afterwards. After an error the process ends and cleans up.
        unsafe {
            let layout = self.layout(variant.kernel)?;
            let module = self.device.create_shader_module(&vk::ShaderModuleCreateInfo::default().code(&spirv), None)?;
            let pipeline = self.pipeline(variant, layout, module)?;
            let compiled = self.properties(pipeline);
            self.device.destroy_pipeline(pipeline, None);
            self.device.destroy_shader_module(module, None);
            self.device.destroy_pipeline_layout(layout, None);
            compiled
        }
    }

    unsafe fn layout(&self, kernel: &Kernel) -> Result<vk::PipelineLayout, Box<dyn Error>> {
        let binding = |(binding, kind)| {
            let binding = vk::DescriptorSetLayoutBinding::default().binding(binding).descriptor_count(1);
            binding.descriptor_type(kind).stage_flags(vk::ShaderStageFlags::COMPUTE)
        };
        let storage = kernel.bindings.iter().map(|_| vk::DescriptorType::STORAGE_BUFFER);
        // The parameters, if they are not immediates.
        let uniform = (!self.immediates).then_some(vk::DescriptorType::UNIFORM_BUFFER_DYNAMIC);
        let bindings: Vec<_> = (0..).zip(storage.chain(uniform)).map(binding).collect();
        let set = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
        let size = u32::try_from(kernel.params_bytes)?;
        let ranges = [vk::PushConstantRange::default().stage_flags(vk::ShaderStageFlags::COMPUTE).size(size)];
        let sets = [unsafe { self.device.create_descriptor_set_layout(&set, None)? }];
        let layout = vk::PipelineLayoutCreateInfo::default().set_layouts(&sets);
        let layout = layout.push_constant_ranges(if self.immediates { &ranges } else { &[] });
        Ok(unsafe { self.device.create_pipeline_layout(&layout, None)? })
    }

    unsafe fn pipeline(
        &self,
        variant: &Variant,
        layout: vk::PipelineLayout,
        module: vk::ShaderModule,
    ) -> Result<vk::Pipeline, Box<dyn Error>> {
        let mut size = vk::PipelineShaderStageRequiredSubgroupSizeCreateInfo::default();
        let mut stage = vk::PipelineShaderStageCreateInfo::default();
        stage = stage.stage(vk::ShaderStageFlags::COMPUTE).module(module).name(c"main");
        let lanes = number(&variant.label, "lanes").filter(|_| variant.cooperative());
        if let Some(lanes) = lanes.filter(|_| self.subgroup_sizes[0] != self.subgroup_sizes[1]) {
            // The program uses a pipeline only if its subgroups turn out to have the variant's
            // size. A driver that is free to choose may take another size, but only the code for
            // that size counts.
            size = size.required_subgroup_size(lanes);
            stage = stage.push_next(&mut size);
        } else if self.features.contains(Features::SUBGROUP) {
            stage = stage.flags(vk::PipelineShaderStageCreateFlags::ALLOW_VARYING_SUBGROUP_SIZE);
        }
        let off = vk::PipelineRobustnessBufferBehaviorEXT::DISABLED;
        let mut unchecked = vk::PipelineRobustnessCreateInfoEXT::default();
        unchecked = unchecked.storage_buffers(off).uniform_buffers(off).vertex_inputs(off);
        unchecked = unchecked.images(vk::PipelineRobustnessImageBehaviorEXT::DISABLED);
        if !self.robust {
            stage = stage.push_next(&mut unchecked);
        }
        let capture = vk::PipelineCreateFlags::CAPTURE_STATISTICS_KHR
            | vk::PipelineCreateFlags::CAPTURE_INTERNAL_REPRESENTATIONS_KHR;
        let create = [vk::ComputePipelineCreateInfo::default().layout(layout).stage(stage).flags(capture)];
        let made = unsafe { self.device.create_compute_pipelines(vk::PipelineCache::null(), &create, None) };
        let pipelines = made.map_err(|(_, error)| error)?;
        Ok(*pipelines.first().ok_or("the driver has made no pipeline")?)
    }

    unsafe fn properties(&self, pipeline: vk::Pipeline) -> Result<Compiled, Box<dyn Error>> {
        let handle = vk::PipelineInfoKHR::default().pipeline(pipeline);
        let executables = unsafe { self.executables.get_pipeline_executable_properties(&handle)? };
        let subgroup = executables.first().ok_or("the driver lists no program")?.subgroup_size;
        let which = vk::PipelineExecutableInfoKHR::default().pipeline(pipeline).executable_index(0);
        let mut statistics = BTreeMap::new();
        for statistic in unsafe { self.executables.get_pipeline_executable_statistics(&which)? } {
            use vk::PipelineExecutableStatisticFormatKHR as Format;
            // SAFETY: the format selects the union's member.
            let value = unsafe {
                match statistic.format {
                    Format::UINT64 => statistic.value.u64 as f64,
                    Format::INT64 => statistic.value.i64 as f64,
                    Format::FLOAT64 => statistic.value.f64,
                    _ => f64::from(statistic.value.b32),
                }
            };
            statistics.insert(text(&statistic.name), value);
        }
        Ok(Compiled { subgroup, statistics, texts: unsafe { self.texts(&which)? } })
    }

    /// By hand, because ash 0.38's helper leaves no room for the texts in its second call.
    unsafe fn texts(&self, which: &vk::PipelineExecutableInfoKHR<'_>) -> Result<Vec<(String, String)>, Box<dyn Error>> {
        let get = self.executables.fp().get_pipeline_executable_internal_representations_khr;
        let device = self.device.handle();
        let mut count = 0;
        unsafe { get(device, which, &mut count, std::ptr::null_mut()) }.result()?;
        let mut forms = vec![vk::PipelineExecutableInternalRepresentationKHR::default(); count as usize];
        // Once for the sizes, and once with room for the texts.
        unsafe { get(device, which, &mut count, forms.as_mut_ptr()) }.result()?;
        let mut buffers: Vec<Vec<u8>> = forms.iter().map(|form| vec![0; form.data_size]).collect();
        for (form, buffer) in forms.iter_mut().zip(&mut buffers) {
            form.p_data = buffer.as_mut_ptr().cast();
        }
        unsafe { get(device, which, &mut count, forms.as_mut_ptr()) }.result()?;
        let end = |buffer: &[u8]| buffer.iter().position(|byte| *byte == 0).unwrap_or(buffer.len());
        let texts = forms.iter().zip(&buffers);
        Ok(texts
            .map(|(form, buffer)| (text(&form.name), String::from_utf8_lossy(&buffer[..end(buffer)]).into()))
            .collect())
    }
}

fn text(raw: &[c_char]) -> String {
    let bytes: Vec<u8> = raw.iter().map(|byte| byte.cast_unsigned()).collect();
    CStr::from_bytes_until_nul(&bytes).unwrap_or_default().to_string_lossy().into_owned()
}

/// Translates the variant like wgpu does for a trusted module on Vulkan.
fn spirv(variant: &Variant, immediates: bool) -> Result<Vec<u32>, Box<dyn Error>> {
    use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy::Unchecked};
    let source = compose(variant.kernel, &variant.defines, immediates)?;
    let module = naga::front::wgsl::parse_str(&source).map_err(|error| error.emit_to_string(&source))?;
    let mut validator =
        naga::valid::Validator::new(naga::valid::ValidationFlags::all(), naga::valid::Capabilities::all());
    validator.subgroup_stages(naga::valid::ShaderStages::COMPUTE);
    validator.subgroup_operations(naga::valid::SubgroupOperationSet::all());
    let checked = validator.validate(&module).map_err(|error| error.emit_to_string(&source))?;
    let options = naga::back::spv::Options {
        lang_version: (1, 6),
        flags: naga::back::spv::WriterFlags::LABEL_VARYINGS | naga::back::spv::WriterFlags::FORCE_POINT_SIZE,
        bounds_check_policies: BoundsCheckPolicies {
            index: Unchecked,
            buffer: Unchecked,
            image_load: Unchecked,
            binding_array: Unchecked,
        },
        zero_initialize_workgroup_memory: naga::back::spv::ZeroInitializeWorkgroupMemoryMode::None,
        force_loop_bounding: false,
        emit_int_div_checks: false,
        ..Default::default()
    };
    let entry =
        naga::back::spv::PipelineOptions { shader_stage: naga::ShaderStage::Compute, entry_point: "main".into() };
    Ok(naga::back::spv::write_vec(&module, &checked, &options, Some(&entry))?)
}
