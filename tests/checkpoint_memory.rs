//! How much of the heap it takes to quantize a checkpoint.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use half::bf16;
use qlora_wgpu::formats::checkpoint::{BaseFormat, Checkpoint};
use qlora_wgpu::formats::safetensors::{OutData, OutTensor, TensorType, write};
use qlora_wgpu::quant::QuantOptions;

/// The system's allocator, counting.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator with the arguments unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Quantizing reads the mapped file: neither f32 nor 16-bit values of a whole matrix are ever on the heap.
#[test]
fn quantizing_holds_the_packed_matrices_only() {
    const SIDE: usize = 1024;
    const MATRICES: usize = 4;
    let folder = tempfile::TempDir::new().unwrap();
    let name = |i: usize| format!("model.layers.{i}.weight");
    for (dtype, bytes) in [(TensorType::BF16, 2), (TensorType::F32, 4)] {
        let tensors = (0..MATRICES).map(|i| {
            let values = move || {
                let value = |j: usize| (j as f32 * 0.37 + i as f32).sin();
                let values = (0..SIDE * SIDE).map(value);
                Ok(match dtype {
                    TensorType::BF16 => values.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect(),
                    _ => values.flat_map(f32::to_le_bytes).collect(),
                })
            };
            OutTensor { name: name(i), dtype, shape: vec![SIDE, SIDE], data: OutData::Lazy(Box::new(values)) }
        });
        write(&folder.path().join("model.safetensors"), tensors.collect(), BTreeMap::new()).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let quantize = |i| {
            let base = BaseFormat::Quantize(QuantOptions::nf4().double_quant());
            checkpoint.matrix(&name(i), SIDE, SIDE, &base).unwrap()
        };
        // The threads of the pool start here.
        drop(quantize(0));

        let before = NOW.load(Relaxed);
        PEAK.store(before, Relaxed);
        let matrices: Vec<_> = (0..MATRICES).map(quantize).collect();
        let packed: usize = matrices.iter().map(|matrix| matrix.bytes()).sum();
        let beside = PEAK.load(Relaxed).saturating_sub(before + packed);
        let dense = SIDE * SIDE * bytes;
        assert!(packed < MATRICES * SIDE * SIDE * 9 / 16, "{packed}");
        assert!(beside < dense / 4, "{dtype}: {beside} bytes beside the packed {packed}; a matrix takes {dense}");
    }
}
