"""llama.cpp's product with a 4-bit matrix, as a peer of `qlora bench --against`.

Runs llama.cpp's own `test-backend-ops perf`, here the one on PATH:

    qlora bench --device cpu --m 1,8,512 --n 4096 --k 14336 --against "python3 benches/peers/llama_cpp.py"

Cases are read from standard input, a line of JSON each, and times answered; see cli/src/measurements/peer.rs. Its product has no adapter,
whatever the case's rank: --rank 0 compares like with like. On a CPU it computes with activations rounded to 8 bits, and with
weights as the file has them, not in the order for SIMD that llama.cpp brings them into when it loads a model. What the program has
no case for is skipped: in llama.cpp 0.7.0 it has N = 4096, K = 14336 and M = 1, 2, 3, 4, 5, 8 and 512.

Each run of it gives a mean of at least a second; the times answered are the least and the median of up to three.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time

RUNS = 3
# After so many seconds there is no further run.
ENOUGH = 20.0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="CPU", help="as test-backend-ops names it: CPU, Vulkan0, CUDA0")
    parser.add_argument("--type", default="q4_0", help="of the matrix: q4_0, iq4_nl, q4_K")
    parser.add_argument("--release", default="", help="llama.cpp's version, which the program does not say")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="test-backend-ops, with what starts it")
    options = parser.parse_args()
    options.program = options.program or ["test-backend-ops"]
    return options


def perf(options, *rest):
    command = [*options.program, "perf", "-b", options.backend, "-o", "MUL_MAT", *rest]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"llama_cpp.py: {options.program[0]} does not start ({error.strerror}); scripts/peers.sh sets llama.cpp up")
    if done.returncode != 0:
        sys.exit(f"llama_cpp.py: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def describe(options):
    """The backend's device; ends the program where there is none."""
    listed = perf(options, "-p", "no such case")
    backends = re.findall(r"^Backend \d+/\d+: (\S+)\n(?:  Device description: (.*))?", listed, re.M)
    for name, description in backends:
        if name == options.backend:
            return description.strip()
    found = ", ".join(name for name, _ in backends) or "none"
    sys.exit(f"llama_cpp.py: llama.cpp has no backend {options.backend}; it has: {found}")


def rows(sql):
    """Results as --output sql has them: a dictionary each."""
    for names, values in re.findall(r"^INSERT INTO test_backend_ops \((.*?)\) VALUES \((.*)\);$", sql, re.M):
        yield dict(zip(names.split(", "), re.findall(r"'((?:[^']|'')*)'", values)))


def answer(options, case):
    if case["op"] != "forward":
        return {"skipped": f"test-backend-ops times a product forward, no {case['op']}"}
    # Rows of the weight are its m, tokens its n.
    shape = f"m={case['n']},n={case['m']},k={case['k']}"
    pattern = rf"^type_a={options.type},type_b=f32,{shape},bs=\[1,1\],nr=\[1,1\],per=\[0,1,2,3\]"
    times, start = [], time.monotonic()
    while not times or (len(times) < RUNS and time.monotonic() - start < ENOUGH):
        found = list(rows(perf(options, "-p", pattern, "--output", "sql")))
        if not found:
            return {"skipped": f"test-backend-ops has no case of {options.type} with {shape}"}
        if found[0]["supported"] != "1":
            return {"skipped": f"{options.backend} has no product of {options.type} with {shape}"}
        times.append(float(found[0]["time_us"]) / 1e3)
    return {"ms_min": min(times), "ms_median": statistics.median(times)}


def main():
    options = arguments()
    device = describe(options)
    where = options.backend if options.backend == "CPU" else f"{options.backend} on {device}"
    print(json.dumps({"name": f"llama.cpp {options.release}".strip() + f", {options.type}, {where}"}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(options, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
