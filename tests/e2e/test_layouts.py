"""Every checkpoint layout and stored type is served within the tolerance of the fp64 reference."""

import numpy as np
import pytest

from infer import BF16, TOLERANCE, infer, random_batch
from checkpoints import relative_error

SPECS = {
    "mixtral-fp32": dict(layout="mixtral", dtype="fp32"),
    "mixtral-bf16-sharded": dict(layout="mixtral", dtype="bf16", shards=3),
    "qwen3-bf16": dict(
        layout="qwen3_moe", dtype="bf16", experts=10, topk=4, first_moe_layer=1, intermediate=80
    ),
    "qwen3-fp16-plain-softmax": dict(
        layout="qwen3_moe", dtype="fp16", experts=9, topk=3, renormalise=False, shards=2
    ),
    "deepseek-bf16": dict(
        layout="deepseek_v3", dtype="bf16", experts=16, topk=4, groups=4, topk_groups=2,
        scaling=2.5, first_moe_layer=1,
    ),
    "deepseek-fp8-sharded": dict(
        layout="deepseek_v3", dtype="fp8", hidden=192, intermediate=160, experts=16, topk=4,
        groups=4, topk_groups=2, scaling=2.5, first_moe_layer=1, shards=4,
    ),
    "deepseek-fp32-one-group": dict(
        layout="deepseek_v3", dtype="fp32", experts=8, topk=2, renormalise=False
    ),
}  # fmt: skip
REQUEST_TYPES = [np.dtype(np.float32), np.dtype(np.float16), BF16]


@pytest.fixture(scope="module", params=list(SPECS))
def cluster(request, checkpoint, start_cluster):
    with start_cluster(checkpoint(**SPECS[request.param]), workers=3) as running:
        yield running


@pytest.mark.parametrize("dtype", REQUEST_TYPES, ids=str)
def test_request_routed_by_client_matches_reference_in_every_layer(cluster, rng, dtype):
    served = cluster.checkpoint
    for layer in served.layers:
        batch = random_batch(served.spec, rng, 37, dtype)
        got = infer(cluster, *batch, layer=layer)
        assert got.dtype == dtype
        assert relative_error(got, served.ffn(*batch, layer)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", REQUEST_TYPES, ids=str)
def test_request_without_ids_is_routed_by_the_checkpoints_router(cluster, rng, dtype):
    served = cluster.checkpoint
    for layer in served.layers:
        hidden = served.tokens_away_from_ties(rng, 29, dtype, layer)
        got = infer(cluster, hidden, layer=layer)
        assert got.dtype == dtype
        assert relative_error(got, served.served(hidden, layer)) <= TOLERANCE[dtype]


def test_request_without_layer_gets_the_first_with_experts(cluster, rng):
    served = cluster.checkpoint
    batch = random_batch(served.spec, rng, 5)
    got = infer(cluster, *batch)
    assert relative_error(got, served.ffn(*batch, served.first_layer)) <= 1e-5
    assert relative_error(got, served.ffn(*batch, max(served.layers))) > 1e-2
