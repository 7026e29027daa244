"""What a GPU can do by torch: a copy of its memory, and the bf16 products of the layer that `qlora bench --hardware` times.

    qlora bench --hardware --ceilings "python3 benches/peers/torch_ceilings.py"

Prints one line of JSON: name (torch's version and the GPU), copy_gb_per_s (bytes read and written), and bf16, a list with m,
forward_ms, forward_tflops, dx_ms and dx_tflops of a weight of 4096 x 14336. For CUDA, ROCm and Apple's GPUs.
"""

import json
import statistics
import sys
import time

import torch

ROWS, N, K = (1, 8, 64, 512, 2048, 4096), 4096, 14336
RUNS = 20
# Of f16, of which there are two.
COPIED = 1 << 28


def device():
    """The name that torch has for the GPU, what waits for it, and what it is."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.synchronize, torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return "mps", torch.mps.synchronize, "Apple's GPU"
    sys.exit("torch_ceilings.py: torch has no GPU")


def milliseconds(run, wait):
    """The median of repeated runs, each of so many calls that waiting does not count."""
    run()
    wait()
    start = time.perf_counter()
    run()
    wait()
    calls = max(1, min(100, int(0.02 / (time.perf_counter() - start))))
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        times.append((time.perf_counter() - start) * 1e3 / calls)
    return statistics.median(times)


def main():
    where, wait, name = device()
    source = torch.zeros(COPIED, device=where, dtype=torch.float16)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), wait)
    ceilings = {"name": f"torch {torch.__version__}, {name}", "copy_gb_per_s": 4 * COPIED / copy / 1e6, "bf16": []}
    del source, target
    weight = torch.randn(N, K, device=where, dtype=torch.bfloat16)
    for m in ROWS:
        x = torch.randn(m, K, device=where, dtype=torch.bfloat16)
        dy = torch.randn(m, N, device=where, dtype=torch.bfloat16)
        row = {"m": m}
        for product, run in {"forward": lambda: x @ weight.t(), "dx": lambda: dy @ weight}.items():
            row[f"{product}_ms"] = milliseconds(run, wait)
            row[f"{product}_tflops"] = 2 * m * N * K / row[f"{product}_ms"] / 1e9
        ceilings["bf16"].append(row)
    print(json.dumps(ceilings))


if __name__ == "__main__":
    main()
