"""Models that `qlora merge` wrote as directories, in transformers: our logits, and the text that ours generates."""

import os
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import ASSETS, GOLDEN, check, difference, exact, our_logits, qlora, versions, work



def compare_texts(name, source, adapter, merged, prompts):
    """Merges, and compares what transformers generates with what ours generates of the model with the adapter beside it."""
    qlora("merge", "--model", source, "--adapter", adapter, "--output", merged, "--dtype", "f32")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    check(not getattr(model, "is_quantized", False), "the merged model is still quantized")
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1]:]
        theirs = tokenizer.decode(out, skip_special_tokens=True).strip()
        ours = qlora("generate", "--model", source, "--adapter", adapter, "--device", "cpu", "--prompt", prompt,
                     "--max-tokens", 24).strip()
        check(ours == theirs, f"{name}: after {prompt!r}\nours   {ours!r}\ntheirs {theirs!r}")
        print(f"{name}, f32: after {prompt!r} both say {theirs!r}")


folder = work()
versions("transformers", "bitsandbytes", "torch")
MERGED = 2e-5
"""What merging changes: an adapter in the weights adds up in another order than one beside them."""

for adapter in ["adapter-lora", "adapter-rslora_qv", "adapter-pattern", "adapter-dora"]:
    for dtype in ["f32", "f16", "bf16"]:
        merged = folder / f"{adapter}-{dtype}"
        qlora("merge", "--model", GOLDEN / "llama", "--adapter", GOLDEN / adapter, "--output", merged, "--dtype", dtype)
        model = AutoModelForCausalLM.from_pretrained(merged)
        stored = {parameter.dtype for name, parameter in model.named_parameters() if "_proj" in name}
        check(stored == {{"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]}, f"{stored}")

        ids, ours = our_logits(folder, "--model", merged)
        theirs = model.float().eval()(ids).logits
        line = f"{adapter}, {dtype}: logits within {difference(ours, theirs):.1e} of ours on the same files"
        _, beside = our_logits(folder, "--model", GOLDEN / "llama", "--adapter", GOLDEN / adapter)
        off = (beside - theirs).abs().max().item()
        check(dtype != "f32" or off <= MERGED, f"{adapter}: merging moves logits by {off:.1e}")
        print(f"{line}, {off:.1e} of the adapter beside its base")

# Made 4-bit again.
merged = folder / "nf4"
qlora("merge", "--model", GOLDEN / "llama", "--adapter", GOLDEN / "adapter-lora", "--output", merged, "--requantize", "nf4")
model = exact(AutoModelForCausalLM.from_pretrained(merged))
check(sum(isinstance(module, Linear4bit) for module in model.modules()) == 14, "not all 14 layers are 4-bit")
ids, ours = our_logits(folder, "--model", merged)
print(f"adapter-lora, made NF4 again: logits within {difference(ours, model(ids).logits):.1e} of ours on the same files")

# A 4-bit model with a tokenizer, and an adapter trained on it.
source, adapter, merged = ASSETS / "tiny-glossary", folder / "glossary-adapter", folder / "glossary"
qlora("finetune", "--model", source, "--data", ASSETS / "devil_valid.jsonl", "--output", adapter, "--device", "cpu",
      "--max-steps", 8, "--lr", 0.002, "--rank", 8)
compare_texts("tiny-glossary", source, adapter, merged, ["oath, n.", "auctioneer, n."])

# And one whose config and tokenizer are made from the metadata of a GGUF file.
source, adapter, merged = Path(os.environ["SMOLLM2"]), folder / "smollm2-adapter", folder / "smollm2"
qlora("finetune", "--model", source, "--data", ASSETS / "devil_valid.jsonl", "--output", adapter, "--device", "cpu",
      "--max-steps", 2, "--batch-size", 1, "--seq-len", 64, "--lr", 0.002, "--rank", 4)
compare_texts("SmolLM2 from GGUF", source, adapter, merged, ["The capital of France is", "oath, n.\n"])
