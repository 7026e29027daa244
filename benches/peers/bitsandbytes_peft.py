"""bitsandbytes' 4-bit layer with PEFT's LoRA on the CPU or a CUDA GPU, as a peer of `qlora bench --against`.

Needs torch, bitsandbytes, peft and transformers:

    qlora bench --device cpu --double-quant --m 1,512 --n 4096 --k 14336 --against "python benches/peers/bitsandbytes_peft.py"

Cases are read from standard input, a line of JSON each, and times answered; see cli/src/measurements/peer.rs. Tensors are f32 on the CPU,
as on the CPU device, and bf16 on a GPU, also the weights that are quantized, as those of most models are. On CPUs with AVX-512 and
bf16, bitsandbytes multiplies in bf16 without gradients; there it looks for a faster product on the Hugging Face hub, and the name
says where it has got it. Of `backward` the forward pass is not timed. QLORA_PEER_DEVICE chooses the device.
"""

import contextlib
import json
import os
import statistics
import sys
import time

import bitsandbytes as bnb
import bitsandbytes.backends.cpu.ops as cpu_ops
import peft
import torch
import transformers

DEVICE = os.environ.get("QLORA_PEER_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16
# As `qlora bench` repeats: at least, at most, and seconds after which it is enough.
RUNS = (5, 50, 2.0)


def clock():
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def repeat(run, prepare=lambda: None):
    """Times of `run` in milliseconds; what `prepare` returns is its argument, and not timed."""
    run(prepare())
    times, start = [], time.perf_counter()
    while len(times) < RUNS[0] or (len(times) < RUNS[1] and time.perf_counter() - start < RUNS[2]):
        argument = prepare()
        before = clock()
        run(argument)
        times.append((clock() - before) * 1e3)
    return {"ms_min": min(times), "ms_median": statistics.median(times)}


def linear(n, k, case):
    """A 4-bit layer [n, k] of random weights."""
    layer = bnb.nn.Linear4bit(
        k,
        n,
        bias=False,
        compute_dtype=DTYPE,
        quant_type=case["format"],
        compress_statistics=case["double_quant"],
        # Its own weight is replaced.
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(
        torch.randn(n, k, device=DEVICE, dtype=DTYPE) * 0.02,
        requires_grad=False,
        quant_type=case["format"],
        compress_statistics=case["double_quant"],
        module=layer,
    )
    return layer.to(DEVICE)


@contextlib.contextmanager
def on_device():
    """Makes tensors of DTYPE on DEVICE; a CPU takes minutes for the random weights of a large model."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            yield
    finally:
        torch.set_default_dtype(dtype)


class Holder(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.q_proj = layer

    def forward(self, x):
        return self.q_proj(x)


def layer_times(case):
    m, n, k = case["m"], case["n"], case["k"]
    model = Holder(linear(n, k, case))
    if case["rank"] > 0:
        config = peft.LoraConfig(r=case["rank"], lora_alpha=2 * case["rank"], target_modules=["q_proj"])
        model = peft.get_peft_model(model, config).to(DEVICE)
    x = torch.randn(m, k, device=DEVICE, dtype=DTYPE)
    if case["op"] == "forward":
        model.eval()
        # The repacked weights of AVX-512 machines, which round the scales, are what a user gets here.
        with torch.no_grad():
            return repeat(lambda _: model(x))
    model.train()
    x.requires_grad_()
    dy = torch.randn(m, n, device=DEVICE, dtype=DTYPE)

    def forward():
        x.grad = None
        model.zero_grad()
        return model(x)

    return repeat(lambda y: y.backward(dy), forward)


def step_times(case):
    config = transformers.LlamaConfig(
        vocab_size=case["vocabulary"],
        hidden_size=case["hidden"],
        intermediate_size=case["ffn"],
        num_hidden_layers=case["layers"],
        num_attention_heads=case["heads"],
        num_key_value_heads=case["kv_heads"],
        max_position_embeddings=max(2048, case["tokens"]),
        tie_word_embeddings=True,
        use_cache=False,
    )
    with on_device():
        model = transformers.LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear(module.out_features, module.in_features, case))
    if case["checkpoint_activations"]:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = peft.LoraConfig(r=case["rank"], lora_alpha=2 * case["rank"], target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, adapter)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(case["vocabulary"], (1, case["tokens"]), device=DEVICE)

    def step(_):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return repeat(step)


def answer(case):
    if case["format"] not in ("nf4", "fp4"):
        return {"skipped": f"bitsandbytes has no {case['format']}"}
    return step_times(case) if case["op"] == "step" else layer_times(case)


def main():
    versions = f"bitsandbytes {bnb.__version__}, PEFT {peft.__version__}, torch {torch.__version__}, {DEVICE}"
    fetched = getattr(cpu_ops, "gemm_4bit_forward_kernel", None) is not None
    name = f"{versions}, with the hub's product" if DEVICE == "cpu" and fetched else versions
    print(json.dumps({"name": name}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
