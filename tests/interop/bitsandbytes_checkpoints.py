"""Checkpoints that `qlora quantize` wrote, in transformers with bitsandbytes: the same weights to the bit, the same logits."""

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common import check, dequantized, difference, digest, equal, exact, our_logits, quantized, versions, work

folder = work()
versions("bitsandbytes", "transformers", "torch")
for kind in ["nf4", "fp4"]:
    for double in [False, True]:
        name = kind + (" with double quantization" if double else "")
        arguments = ["--format", kind, *(["--double-quant"] if double else [])]
        path = quantized(folder, name.replace(" ", "-"), *arguments, bnb_4bit_quant_type=kind,
                         bnb_4bit_use_double_quant=double)
        model = exact(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))

        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
        check(len(layers) == 14, f"{len(layers)} layers are 4-bit, not 14")
        weights = load_file(dequantized(folder, path) / "model.safetensors")
        for layer, module in layers.items():
            # Rows here are of 64 or 192 values. Where they are no multiple of 64, bitsandbytes' AVX-512 code for the CPU takes
            # the wrong scales.
            theirs = dequantize_4bit(module.weight.data, module.weight.quant_state)
            equal(weights[f"{layer}.weight"], theirs, layer)

        ids, ours = our_logits(folder, "--model", path)
        found = difference(ours, model(ids).logits)

        # What bitsandbytes would save of the model that it loaded is what it was loaded from.
        written, saved = load_file(path / "model.safetensors"), model.state_dict()
        check(written.keys() == saved.keys(), f"its state has other tensors: {sorted(written.keys() ^ saved.keys())}")
        for key in written:
            equal(written[key], saved[key], f"{key} in its state")
        print(f"{name}: 14 layers equal to the bit, logits within {found:.1e}, all {len(saved)} tensors of the file in its state")
        print(f"    file {digest(path / 'model.safetensors')}")
