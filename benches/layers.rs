//! A few cases of `qlora bench` through criterion: `cargo bench`. QLORA_DEVICE chooses the device;
//! by default the CPU and the best GPU, if there is one.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use qlora_wgpu::device::Device;
use qlora_wgpu::internal::bench::layer::{Case, Op};
use qlora_wgpu::quant::{QuantOptions, QuantizedMatrix};

fn layers(criterion: &mut Criterion) {
    for (name, op) in [("forward", Op::Forward), ("backward", Op::Backward)] {
        layer(criterion, name, op);
    }
}

fn layer(criterion: &mut Criterion, name: &str, op: Op) {
    let best = Device::best().expect("QLORA_DEVICE names a device");
    let mut devices = vec![Device::cpu()];
    if matches!(best, Device::Gpu(_)) {
        devices.push(best);
    }
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    for (m, n, k) in [(1, 4096, 4096), (8, 4096, 4096), (64, 4096, 4096), (256, 1536, 576)] {
        let case = Case { op, m, n, k, rank: 16, quant: QuantOptions::nf4().double_quant() };
        let operands = case.operands().expect("random weights are finite");
        group.throughput(Throughput::Elements(case.flops() as u64));
        for device in &devices {
            let prepared = operands.on(device).expect("the operands fit");
            group.bench_function(BenchmarkId::new(device.name(), format!("{m}x{n}x{k}")), |bencher| {
                bencher.iter_custom(|runs| (0..runs).map(|_| prepared.time().expect("the case runs")).sum());
            });
        }
    }
    group.finish();
}

fn quantize(criterion: &mut Criterion) {
    let (rows, cols) = (4096, 14336);
    let weight = qlora_wgpu::internal::bench::uniform(1, rows * cols, 0.05);
    let mut group = criterion.benchmark_group("quantize");
    group.sample_size(10).throughput(Throughput::Elements((rows * cols) as u64));
    for (name, options) in [("nf4", QuantOptions::nf4()), ("nf4 double", QuantOptions::nf4().double_quant())] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| QuantizedMatrix::quantize(black_box(&weight[..]).into(), rows, cols, &options));
        });
    }
    group.finish();
}

criterion_group!(benches, layers, quantize);
criterion_main!(benches);
