#!/bin/sh
# Makes cli/assets/tiny-glossary from the f32 model that was pretrained: linear layers in NF4 with double-quantized scales, the rest
# in f16. Usage: tiny_glossary.sh FOLDER, which holds config.json, model.safetensors and tokenizer.json. Needs python3 (without packages).
set -eu

source=$1
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
out=$root/cli/assets/tiny-glossary
staging=$(mktemp -d)
trap 'rm -rf "$staging"' EXIT
trap 'exit 1' HUP INT TERM
mkdir -p "$out"

python3 - "$source" "$staging/f16.safetensors" "$out/config.json" <<'EOF'
import json, struct, sys

source, weights, config = sys.argv[1:]
with open(f"{source}/model.safetensors", "rb") as file:
    (size,) = struct.unpack("<Q", file.read(8))
    header, data = json.loads(file.read(size)), file.read()
header.pop("__metadata__", None)
out = bytearray()
for name, tensor in header.items():
    assert tensor["dtype"] == "F32", name
    start, end = tensor["data_offsets"]
    count = (end - start) // 4
    at = len(out)
    out += struct.pack(f"<{count}e", *struct.unpack(f"<{count}f", data[start:end]))
    tensor.update(dtype="F16", data_offsets=[at, len(out)])
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
with open(weights, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text + out)

with open(f"{source}/config.json") as file:
    keys = json.load(file)
keys["dtype"] = "float16"
keys["quantization_config"] = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float16",
    "bnb_4bit_quant_storage": "uint8",
}
with open(config, "w") as file:
    json.dump(keys, file, indent=2)
    file.write("\n")
EOF
"${CARGO:-cargo}" run --quiet --manifest-path "$root/Cargo.toml" --bin qlora -- quantize "$staging/f16.safetensors" \
    "$out/model.safetensors" --format nf4 --double-quant --include '_proj\.weight$' --force
cat "$source/tokenizer.json" >"$out/tokenizer.json"
