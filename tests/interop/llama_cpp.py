"""Merged GGUF models and GGUF adapters of SmolLM2 in llama.cpp: the tokens that ours take, always the likeliest."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from common import ASSETS, check, digest, qlora, versions, work

folder = work()
MODEL = Path(os.environ["SMOLLM2"])
TOKENS = 32
PROMPTS = ["The capital of France is", "Once upon a time, there was a little girl who", "oath, n.\n"]


def llama(*arguments):
    """Runs llama-completion; returns what it prints."""
    loader = [os.environ["SID_LOADER"], "--library-path", os.environ["SID_LIBRARIES"]]
    program = Path(os.environ["SID"]) / "usr/bin/llama-completion"
    done = subprocess.run([*loader, program, *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"llama-completion {arguments}\n{done.stderr[-2000:]}")
    return done.stdout if done.stdout.strip() else done.stderr


@cache
def theirs(prompt, *arguments):
    # On the CPU; keys, values and attention in f32, as ours are. One thread: two wait for each other without end on a busy machine.
    exact = ["--device", "none", "-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", 1]
    text = llama("-no-cnv", "--no-display-prompt", "--temp", 0, "-n", TOKENS, "-p", prompt, *exact, *arguments)
    return text.replace("[end of text]", "").strip()


@cache
def ours(prompt, *arguments, tokens=TOKENS):
    return qlora("generate", "--device", "cpu", "--prompt", prompt, "--max-tokens", tokens, *arguments).strip()


def compare(name, ours_with, theirs_with, exact=True):
    """The texts must be the same; where llama.cpp rounds activations, they may part at a close call."""
    same, parted = 0, []
    for prompt in PROMPTS:
        our, their = ours(prompt, *ours_with), theirs(prompt, *theirs_with)
        if our != their and our.startswith(their):
            # llama-completion sometimes ends before it has printed the last token.
            our = ours(prompt, *ours_with, tokens=TOKENS - 1)
        check(our and (our == their or not exact), f"{name}: after {prompt!r}\nours   {our!r}\ntheirs {their!r}")
        if our == their:
            same += 1
        else:
            parted.append(len(os.path.commonprefix([our, their]).split()))
    check(same > 0, f"{name}: no text is the same")
    how = f"; others part after {', '.join(map(str, parted))} words" if parted else ""
    print(f"{name}: {same} of {len(PROMPTS)} texts of {TOKENS} tokens are the same{how}", flush=True)


print("llama.cpp", llama("--version").splitlines()[0])
versions()
# From a directory: the metadata and the tokenizer of the file are made from its config.json and tokenizer.json.
source, trained = ASSETS / "tiny-glossary", folder / "glossary-adapter"
qlora("finetune", "--model", source, "--data", ASSETS / "devil_valid.jsonl", "--output", trained, "--device", "cpu",
      "--max-steps", 8, "--lr", 0.002, "--rank", 8)
merged = folder / "glossary.gguf"
qlora("merge", "--model", source, "--adapter", trained, "--output", merged, "--dtype", "f32")
compare("merged from a directory, f32", ["--model", source, "--adapter", trained], ["-m", merged])

# An adapter that learned nothing leaves the model as it is: a file that is the same on every machine.
qlora("finetune", "--model", source, "--data", ASSETS / "devil_valid.jsonl", "--output", folder / "idle", "--device", "cpu",
      "--max-steps", 1, "--lr", 0, "--rank", 1, "--batch-size", 1, "--seq-len", 8)
idle = folder / "idle.gguf"
qlora("merge", "--model", source, "--adapter", folder / "idle", "--output", idle, "--dtype", "f32")
compare("the directory as it is, f32", ["--model", source], ["-m", idle])
print(f"    file {digest(idle)}")

# On that file adapters are exact too. rsLoRA's scale and those of single modules are folded into what is exported.
exported = folder / "glossary-adapter.gguf"
qlora("export", "--model", source, "--adapter", trained, "--output", exported)
compare("adapter, LoRA, on an f32 base", ["--model", source, "--adapter", trained], ["-m", idle, "--lora", exported])
patterned = folder / "patterned"
shutil.copytree(trained, patterned, ignore=shutil.ignore_patterns("checkpoint*"))
config = json.loads((patterned / "adapter_config.json").read_text())
config.update(use_rslora=True, alpha_pattern={"q_proj": 3, r"layers\.1\.mlp.*": 24})
(patterned / "adapter_config.json").write_text(json.dumps(config))
exported = folder / "patterned.gguf"
qlora("export", "--model", source, "--adapter", patterned, "--output", exported)
compare("adapter, rsLoRA with patterns, on an f32 base", ["--model", source, "--adapter", patterned],
        ["-m", idle, "--lora", exported])

# SmolLM2, from its GGUF file.
adapter = folder / "adapter"
qlora("finetune", "--model", MODEL, "--data", ASSETS / "devil_valid.jsonl", "--output", adapter, "--device", "cpu",
      "--max-steps", 6, "--batch-size", 4, "--seq-len", 64, "--no-packing", "--lr", 0.002, "--rank", 8, "--alpha", 16)
base, adapted = ["--model", MODEL], ["--model", MODEL, "--adapter", adapter]
changed = sum(ours(prompt, *base) != ours(prompt, *adapted) for prompt in PROMPTS)
check(changed > 0, "the adapter changes nothing")
print(f"the adapter changes {changed} of {len(PROMPTS)} texts")

for dtype in ["f32", "f16", "bf16", "q8_0", "q4_0"]:
    merged = folder / f"merged-{dtype}.gguf"
    qlora("merge", *adapted, "--output", merged, "--dtype", dtype)
    compare(f"merged, {dtype}", ["--model", merged], ["-m", merged], exact=dtype == "f32")
    if dtype == "f32":
        compare("merged, f32, and ours not merged", adapted, ["-m", merged])
    merged.unlink()

exported = folder / "smollm2-adapter.gguf"
qlora("export", "--adapter", adapter, "--model", MODEL, "--output", exported)
compare("adapter on the Q4_1 base", adapted, ["-m", MODEL, "--lora", exported], exact=False)
