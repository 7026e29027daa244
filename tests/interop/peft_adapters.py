"""Adapters that `qlora finetune` trained, in PEFT: the same logits."""

import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common import check, dequantized, difference, digest, exact, our_logits, qlora, quantized, versions, work, write_ids

folder = work()
versions("peft", "transformers", "bitsandbytes", "torch")
nf4 = quantized(folder, "nf4", "--double-quant", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
dense = dequantized(folder, nf4)
train = folder / "train.jsonl"
write_ids(train, rows=16, length=24, seed=0)


def base(path):
    return exact(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


# Ranks and alphas of single modules come from PEFT itself: an adapter as it begins there, to go on with.
patterns = LoraConfig(
    r=4,
    lora_alpha=8,
    use_rslora=True,
    target_modules=r".*\.(q_proj|v_proj|down_proj)",
    rank_pattern={"q_proj": 6, r"layers\.1\.mlp\.down_proj": 2},
    alpha_pattern={"v_proj": 3, r"^model\.layers\.0\.mlp.*": 12},
    task_type="CAUSAL_LM",
)
torch.manual_seed(0)
get_peft_model(base(dense), patterns).save_pretrained(folder / "begun")

runs = {
    "LoRA": ["--rank", 8, "--alpha", 16],
    "LoRA, f32 base": ["--rank", 8, "--alpha", 16, "--base-format", "as-is"],
    "rsLoRA with patterns": ["--init-adapter", folder / "begun"],
    "DoRA": ["--rank", 4, "--alpha", 8, "--dora"],
}
for name, arguments in runs.items():
    model = dense if "as-is" in arguments else nf4
    adapter = folder / name.replace(" ", "-").replace(",", "")
    # The model's path is in the adapter's config: relative, for the digest.
    qlora("finetune", "--model", model.name, "--data", train, "--output", adapter, "--device", "cpu", "--max-steps", 6,
          "--lr", 0.01, "--warmup", 0, *arguments, folder=folder)
    ids, ours = our_logits(folder, "--model", model, "--adapter", adapter)

    with warnings.catch_warnings():
        # PEFT warns of keys that it misses or does not know, and goes on without them.
        warnings.filterwarnings("error", message=".*(missing|unexpected|not found).*")
        loaded = PeftModel.from_pretrained(base(dense), adapter)
    saved = load_file(adapter / "adapter_model.safetensors")
    values = {key.replace(".default", ""): value for key, value in loaded.state_dict().items() if "lora_" in key}
    values = {key.replace("magnitude_vector.weight", "magnitude_vector"): value for key, value in values.items()}
    check(values.keys() == saved.keys(), f"{name}: PEFT has other tensors")
    check(all(torch.equal(values[key], saved[key]) for key in saved), f"{name}: PEFT has other values")

    found = difference(ours, loaded(ids).logits)
    with loaded.disable_adapter():
        moved = (ours - loaded(ids).logits).abs().max().item()
    check(moved > 0.1, f"{name}: the adapter changes nothing")
    line = f"{name}: {len(saved)} tensors, logits within {found:.1e} of PEFT's; the adapter moves them by up to {moved:.2f}"
    if model is nf4:
        four_bit = exact(PeftModel.from_pretrained(base(nf4), adapter))
        line += f"; on bitsandbytes' 4-bit base within {difference(ours, four_bit(ids).logits):.1e}"
    header, config = digest(adapter / "adapter_model.safetensors", header=True), digest(adapter / "adapter_config.json")
    print(f"{line}\n    header of the tensors {header}, config {config}")
