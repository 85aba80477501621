"""Random MoE checkpoints, written by Python's own safetensors package, and their fp64 reference.

Nothing here shares code with the C++ side: the layouts, the routers and the feed-forward are
written out again in numpy, so that the tests compare two independent readings of the formats.
"""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

STORED_TYPES = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FP8_BLOCK = 128
FP8_MAX = 448.0


@dataclasses.dataclass(frozen=True)
class Spec:
    """What to write. `first_moe_layer` dense layers come before the ones with experts."""

    layout: str = "mixtral"  # mixtral, qwen3_moe, deepseek_v3
    dtype: str = "fp32"  # fp32, fp16, bf16; fp8 for deepseek_v3
    hidden: int = 64
    intermediate: int = 96
    experts: int = 8
    topk: int = 2
    num_moe_layers: int = 2
    first_moe_layer: int = 0
    shards: int = 1
    renormalise: bool = True
    groups: int = 1
    topk_groups: int = 1
    scaling: float = 1.0
    router: bool = True
    seed: int = 1


@dataclasses.dataclass
class Layer:
    gate: np.ndarray  # [E, I, H] fp64
    up: np.ndarray  # [E, I, H]
    down: np.ndarray  # [E, H, I]
    router: np.ndarray | None = None  # [E, H]
    bias: np.ndarray | None = None  # [E]


def _sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def _dequantise(values, scales):
    rows, cols = values.shape
    wide = np.repeat(np.repeat(scales, FP8_BLOCK, axis=0), FP8_BLOCK, axis=1)[:rows, :cols]
    return values.astype(np.float64) * wide.astype(np.float64)


def _quantise(weight):
    rows, cols = weight.shape
    blocks_r, blocks_c = -(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK)
    scales = np.empty((blocks_r, blocks_c), np.float32)
    values = np.empty(weight.shape, FP8)
    for r in range(blocks_r):
        for c in range(blocks_c):
            block = np.s_[
                r * FP8_BLOCK : (r + 1) * FP8_BLOCK, c * FP8_BLOCK : (c + 1) * FP8_BLOCK
            ]
            scale = np.float32(np.abs(weight[block]).max() / FP8_MAX)
            scales[r, c] = scale
            values[block] = (weight[block] / scale).astype(FP8)
    return values, scales


class Checkpoint:
    """A checkpoint directory together with what the served model must compute."""

    def __init__(self, path, spec, layers):
        self.path = pathlib.Path(path)
        self.spec = spec
        self.layers = layers  # {layer number: Layer}

    @property
    def name(self):
        return self.path.name

    @property
    def first_layer(self):
        return min(self.layers)

    def ffn(self, hidden, ids, weights, layer=None):
        """The weighted sum of the experts' outputs, [T, H] fp64; an id of -1 is no expert."""
        layer = self.layers[self.first_layer if layer is None else layer]
        hidden = np.asarray(hidden).astype(np.float64)
        out = np.zeros_like(hidden)
        for expert in np.unique(ids[ids >= 0]):
            token, slot = np.nonzero(ids == expert)
            x = hidden[token]
            gate = x @ layer.gate[expert].T
            act = gate * _sigmoid(gate) * (x @ layer.up[expert].T)
            rows = act @ layer.down[expert].T
            np.add.at(out, token, rows * weights[token, slot].astype(np.float64)[:, None])
        return out

    def route(self, hidden, layer=None):
        """The router's choice: ids [T, K] and weights [T, K], best first, and the margin [T]."""
        spec = self.spec
        layer = self.layers[self.first_layer if layer is None else layer]
        logits = np.asarray(hidden).astype(np.float64) @ layer.router.T
        if spec.layout == "deepseek_v3":
            scores = _sigmoid(logits)
            choice = scores + layer.bias
            grouped = choice.reshape(len(choice), spec.groups, -1)
            group_score = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
            order = np.argsort(-group_score, axis=1)
            margin = _margin(group_score, spec.topk_groups)
            masked = np.full_like(grouped, -np.inf)
            for token, groups in enumerate(order[:, : spec.topk_groups]):
                masked[token, groups] = grouped[token, groups]
            choice = masked.reshape(choice.shape)
            margin = np.minimum(margin, _margin(choice, spec.topk))
        else:
            exps = np.exp(logits - logits.max(axis=1, keepdims=True))
            scores = exps / exps.sum(axis=1, keepdims=True)
            choice = scores
            margin = _margin(choice, spec.topk)
        ids = np.argsort(-choice, axis=1)[:, : spec.topk]
        weights = np.take_along_axis(scores, ids, axis=1)
        if spec.renormalise:
            weights = weights / weights.sum(axis=1, keepdims=True)
        return ids.astype(np.int32), weights * spec.scaling, margin

    def served(self, hidden, layer=None):
        """What a request without ids must get."""
        ids, weights, _ = self.route(hidden, layer)
        return self.ffn(hidden, ids, weights, layer)

    def tokens_away_from_ties(self, rng, num_tokens, dtype=np.float32, layer=None):
        """Random tokens whose routing does not hang on the last bits of a score."""
        kept = []
        while len(kept) < num_tokens:
            batch = rng.standard_normal((64, self.spec.hidden)).astype(dtype)
            _, _, margin = self.route(batch, layer)
            kept.extend(batch[margin > 1e-4])
        return np.stack(kept[:num_tokens])


def _margin(scores, k):
    if k >= scores.shape[1]:
        return np.full(len(scores), np.inf)
    ordered = -np.sort(-scores, axis=1)
    return ordered[:, k - 1] - ordered[:, k]


def _config(spec):
    common = {
        "hidden_size": spec.hidden,
        "hidden_act": "silu",
        "num_experts_per_tok": spec.topk,
        "num_hidden_layers": spec.first_moe_layer + spec.num_moe_layers,
        "torch_dtype": {"fp32": "float32", "fp16": "float16"}.get(spec.dtype, "bfloat16"),
    }
    if spec.layout == "mixtral":
        return common | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "intermediate_size": spec.intermediate,
            "num_local_experts": spec.experts,
        }
    if spec.layout == "qwen3_moe":
        return common | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "intermediate_size": 4 * spec.intermediate,
            "moe_intermediate_size": spec.intermediate,
            "num_experts": spec.experts,
            "norm_topk_prob": spec.renormalise,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(spec.first_moe_layer)),
        }
    config = common | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "intermediate_size": 4 * spec.intermediate,
        "moe_intermediate_size": spec.intermediate,
        "n_routed_experts": spec.experts,
        "n_shared_experts": 1,
        "first_k_dense_replace": spec.first_moe_layer,
        "moe_layer_freq": 1,
        "n_group": spec.groups,
        "topk_group": spec.topk_groups,
        "norm_topk_prob": spec.renormalise,
        "routed_scaling_factor": spec.scaling,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    if spec.dtype == "fp8":
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
    return config


def _names(spec, layer):
    """Prefix of the experts, names of (gate, up, down), and the router's prefix."""
    if spec.layout == "mixtral":
        block = f"model.layers.{layer}.block_sparse_moe"
        return block, ("w1", "w3", "w2"), f"{block}.gate"
    block = f"model.layers.{layer}.mlp"
    return block, ("gate_proj", "up_proj", "down_proj"), f"{block}.gate"


def build(spec):
    """Returns (tensors as they are stored, layers in fp64)."""
    rng = np.random.default_rng(spec.seed)
    stored_type = STORED_TYPES.get(spec.dtype, STORED_TYPES["bf16"])
    tensors = {}
    layers = {}

    def add(name, shape, quantised):
        weight = rng.standard_normal(shape) / np.sqrt(shape[-1])
        if quantised:
            values, scales = _quantise(weight)
            tensors[name] = values
            tensors[f"{name}_scale_inv"] = scales
            return _dequantise(values, scales)
        tensors[name] = weight.astype(stored_type)
        return tensors[name].astype(np.float64)

    # What belongs to the caller must be skipped, wherever it lies in the file.
    add("model.embed_tokens.weight", (16, spec.hidden), False)
    for dense in range(spec.first_moe_layer):
        add(f"model.layers.{dense}.mlp.gate_proj.weight", (16, spec.hidden), False)
    for number in range(spec.first_moe_layer, spec.first_moe_layer + spec.num_moe_layers):
        block, names, router = _names(spec, number)
        add(f"model.layers.{number}.self_attn.q_proj.weight", (8, spec.hidden), False)
        if spec.layout == "deepseek_v3":
            add(f"{block}.shared_experts.gate_proj.weight", (8, spec.hidden), False)
        shapes = [(spec.intermediate, spec.hidden)] * 2 + [(spec.hidden, spec.intermediate)]
        parts = [[], [], []]
        for expert in range(spec.experts):
            for part, name, shape in zip(parts, names, shapes):
                full = f"{block}.experts.{expert}.{name}.weight"
                part.append(add(full, shape, spec.dtype == "fp8"))
        layer = Layer(*(np.stack(part) for part in parts))
        if spec.router:
            layer.router = add(f"{router}.weight", (spec.experts, spec.hidden), False)
            if spec.layout == "deepseek_v3":
                bias = rng.uniform(-1.2, 0.2, spec.experts).astype(np.float32)
                tensors[f"{router}.e_score_correction_bias"] = bias
                layer.bias = bias.astype(np.float64)
        layers[number] = layer
    return tensors, layers


def write(directory, spec):
    """Writes the checkpoint into `directory`, which is created; returns a Checkpoint."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True)
    tensors, layers = build(spec)
    (directory / "config.json").write_text(json.dumps(_config(spec), indent=2))
    if spec.shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return Checkpoint(directory, spec, layers)
    names = sorted(tensors)
    weight_map = {}
    for shard in range(spec.shards):
        # Dealt in turn, so that one expert's tensors lie in different files.
        part = names[shard :: spec.shards]
        file = f"model-{shard + 1:05d}-of-{spec.shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": weight_map,
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return Checkpoint(directory, spec, layers)


def relative_error(got, want):
    """Relative L2 error over the whole batch, in fp64."""
    got = np.asarray(got).astype(np.float64)
    want = np.asarray(want).astype(np.float64)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-300))
