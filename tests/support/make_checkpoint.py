"""Writes a small MoE checkpoint with Python's own safetensors package, and what it holds.

    make_checkpoint.py LAYOUT DTYPE SHARDS DIRECTORY

LAYOUT is mixtral, qwen3_moe or deepseek_v3; DTYPE is fp32, fp16, bf16 or fp8 (deepseek_v3).
Beside the checkpoint goes expected.bin: fp32 values in the order layer, expert, (gate, up, down),
and after each layer's experts its router's gate and, for deepseek_v3, its correction bias. The
values are decoded from the stored bits by the formats' definitions written out below, so that
nothing is shared with the code under test.
"""

import json
import pathlib
import sys

import numpy as np
import safetensors

HIDDEN, INTERMEDIATE, EXPERTS, TOPK, MOE_LAYERS = 160, 144, 4, 2, 2
BLOCK = 128


def decode_fp8(bits):
    """OCP e4m3fn: bias 7, no infinity, 0x7f and 0xff are NaN."""
    sign = np.where(bits & 0x80, -1.0, 1.0)
    exponent = ((bits >> 3) & 0xF).astype(np.int32)
    mantissa = (bits & 0x7).astype(np.float64)
    value = np.where(
        exponent == 0, mantissa * 2.0**-9, (1.0 + mantissa / 8.0) * 2.0 ** (exponent - 7.0)
    )
    return (sign * value).astype(np.float32)


class Writer:
    def __init__(self, rng):
        self.rng = rng
        self.tensors = {}  # name: (dtype, array of its bits)
        self.expected = []

    def store(self, name, dtype, array):
        self.tensors[name] = (dtype, np.ascontiguousarray(array))

    def weight(self, name, dtype, shape):
        """Stores a random weight; returns what it decodes to."""
        values = (self.rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        if dtype == "fp32":
            self.store(name, "float32", values)
            return values
        if dtype == "fp16":
            self.store(name, "float16", values.astype(np.float16))
            return values.astype(np.float16).astype(np.float32)
        if dtype == "bf16":
            bits = (values.view(np.uint32) >> 16).astype(np.uint16)
            self.store(name, "bfloat16", bits)
            return (bits.astype(np.uint32) << 16).view(np.float32)
        bits = self.rng.integers(0, 256, shape).astype(np.uint8)
        bits[(bits & 0x7F) == 0x7F] = 0x7E
        self.store(name, "float8_e4m3fn", bits)
        blocks = (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
        scales = self.rng.uniform(1e-5, 1e-3, blocks).astype(np.float32)
        self.store(f"{name}_scale_inv", "float32", scales)
        rows = np.arange(shape[0]) // BLOCK
        cols = np.arange(shape[1]) // BLOCK
        return decode_fp8(bits) * scales[np.ix_(rows, cols)]


def save(tensors, path, metadata):
    """safetensors.serialize_file on raw bits, for types that numpy does not have."""
    if hasattr(safetensors, "TensorSpec"):  # 0.8 and later take the bits by address.
        specs = {
            name: safetensors.TensorSpec(
                dtype=dtype,
                shape=list(array.shape),
                data_ptr=array.ctypes.data,
                data_len=array.nbytes,
            )
            for name, (dtype, array) in tensors.items()
        }
    else:
        specs = {
            name: {"dtype": dtype, "shape": list(array.shape), "data": array.tobytes()}
            for name, (dtype, array) in tensors.items()
        }
    safetensors.serialize_file(specs, str(path), metadata)


def config_of(layout, dtype, first):
    config = {
        "hidden_size": HIDDEN,
        "num_experts_per_tok": TOPK,
        "num_hidden_layers": first + MOE_LAYERS,
        "hidden_act": "silu",
        "model_type": layout,
    }
    if layout == "mixtral":
        return config | {"intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS}
    config |= {"intermediate_size": 999, "moe_intermediate_size": INTERMEDIATE}
    if layout == "qwen3_moe":
        return config | {
            "num_experts": EXPERTS,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(first)),
        }
    config |= {
        "n_routed_experts": EXPERTS,
        "first_k_dense_replace": first,
        "moe_layer_freq": 1,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 1,
    }
    if dtype == "fp8":
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        }
    return config


def main(layout, dtype, shards, directory):
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    first = 0 if layout == "mixtral" else 1
    wide = "bf16" if dtype == "fp8" else dtype
    writer = Writer(np.random.default_rng(7))
    writer.weight("model.embed_tokens.weight", wide, (5, HIDDEN))
    for layer in range(first, first + MOE_LAYERS):
        block = "block_sparse_moe" if layout == "mixtral" else "mlp"
        prefix = f"model.layers.{layer}.{block}"
        names = ("w1", "w3", "w2")
        if layout != "mixtral":
            names = ("gate_proj", "up_proj", "down_proj")
        for expert in range(EXPERTS):
            for name, shape in zip(
                names, [(INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
            ):
                full = f"{prefix}.experts.{expert}.{name}.weight"
                writer.expected.append(writer.weight(full, dtype, shape))
        gate = writer.weight(f"{prefix}.gate.weight", wide, (EXPERTS, HIDDEN))
        writer.expected.append(gate)
        if layout == "deepseek_v3":
            bias = writer.weight(f"{prefix}.gate.e_score_correction_bias", "fp32", (EXPERTS,))
            writer.expected.append(bias)

    (directory / "config.json").write_text(json.dumps(config_of(layout, dtype, first), indent=2))
    with open(directory / "expected.bin", "wb") as out:
        for values in writer.expected:
            out.write(np.ascontiguousarray(values, dtype=np.float32).tobytes())
    names = sorted(writer.tensors)
    if shards == 1:
        save(writer.tensors, directory / "model.safetensors", None)
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: writer.tensors[name] for name in names[shard::shards]}
        save(part, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
