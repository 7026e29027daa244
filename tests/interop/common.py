"""What the checks share: the model of the tests, the qlora command, and how results are compared and told."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "cli" / "assets"
GOLDEN = ROOT / "tests/golden/model"
VOCABULARY = 128
"""Of the models in GOLDEN."""

LOGITS = 1e-4
"""The largest difference of logits between two programs that compute in f32; logits themselves are around 1."""

warnings.filterwarnings("ignore", category=FutureWarning)
disable_progress_bar()
torch.set_num_threads(2)
torch.set_grad_enabled(False)


def work():
    """A folder of the calling check, empty."""
    folder = Path(sys.argv[1]) / Path(sys.argv[0]).stem
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def qlora(*arguments, folder=None):
    """Runs `qlora` in a folder; returns what it prints."""
    command = [os.environ["QLORA"], *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def write_ids(path, rows, length, seed):
    """Training data of token ids."""
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, (rows, length))
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))


def our_logits(folder, *arguments):
    """Token ids, and the logits that `qlora eval` with these arguments has for them."""
    data = folder / "eval.jsonl"
    write_ids(data, rows=4, length=24, seed=1)
    qlora("eval", "--data", data, "--dump-logits", folder / "logits.safetensors", "--device", "cpu", *arguments)
    dumped = load_file(folder / "logits.safetensors")
    return dumped["input_ids"], dumped["logits"]


def quantized(folder, name, *arguments, **config):
    """A model directory: the llama of the tests as `qlora quantize` with these arguments writes it, and its config.json.

    The output head stays dense, as transformers has it. `config` goes to the key `quantization_config`.
    """
    out = folder / name
    out.mkdir()
    source = GOLDEN / "llama"
    qlora("quantize", source / "model.safetensors", out / "model.safetensors", "--include", r"_proj\.weight$", *arguments)
    keys = json.loads((source / "config.json").read_text())
    keys["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        **config,
    }
    (out / "config.json").write_text(json.dumps(keys, indent=2))
    return out


def dequantized(folder, quantized):
    """The same directory with its weights as f32, by `qlora dequantize`."""
    out = folder / f"{quantized.name}-f32"
    out.mkdir()
    qlora("dequantize", quantized / "model.safetensors", out / "model.safetensors")
    keys = json.loads((quantized / "config.json").read_text())
    del keys["quantization_config"]
    (out / "config.json").write_text(json.dumps(keys, indent=2))
    return out


def exact(model):
    """Makes bitsandbytes compute with the scales as they are.

    Where the CPU has AVX-512 with bf16, it otherwise packs 4-bit weights anew for inference, with scales rounded to bf16.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def difference(ours, theirs, limit=LOGITS):
    """The largest difference; ends the check if it is over the limit, or if the shapes differ."""
    if ours.shape != theirs.shape:
        sys.exit(f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}")
    found = (ours.float() - theirs.float()).abs().max().item()
    if not found <= limit:
        sys.exit(f"differs by {found:.3g}, more than {limit:.3g}")
    return found


def equal(ours, theirs, what):
    """Ends the check if two tensors are not the same to the bit."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        sys.exit(f"{what}: {ours.dtype} {tuple(ours.shape)} and {theirs.dtype} {tuple(theirs.shape)}")
    if ours.contiguous().numpy().tobytes() != theirs.contiguous().numpy().tobytes():
        sys.exit(f"{what}: differs")


def digest(path, header=False):
    """The start of the SHA-256 of a file, or of the header of a safetensors file. cli/tests/cli/interop_files.rs pins these."""
    data = path.read_bytes()
    if header:
        data = data[8 : 8 + int.from_bytes(data[:8], "little")]
    return hashlib.sha256(data).hexdigest()[:16]


def check(condition, message):
    """Ends the check with a message if something does not hold."""
    if not condition:
        sys.exit(message)


def versions(*packages):
    """Prints what is compared."""
    found = [f"{package} {version(package)}" for package in packages]
    print(", ".join([qlora("--version").strip(), *found]))
