"""Prefill batches whose tensors come as typed contents, in place of raw entries: the same bits come
back, up to the largest batch. Elements that the parser would have to put together are for small
requests alone, and are refused beyond."""

import grpc
import numpy as np
import pytest

import protos
from infer import make_request, output_of, random_batch
from raw_calls import FRONT_DOOR
from wire_bytes import field

TOKENS = 4096
HIDDEN = 2048  # The largest batch has 32 MiB.
CONTENTS, FP32_CONTENTS = 5, 6  # of an input, of its contents
INPUTS = 5


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster):
    limit = ["--max-batch-tokens", TOKENS]
    with start_cluster(
        checkpoint(hidden=HIDDEN, intermediate=16, experts=4, topk=2),
        workers=2,
        coordinator_args=limit,
        worker_args=limit,
    ) as running:
        yield running


def unary(cluster, requests):
    return [cluster.front_door.ModelInfer(each, timeout=60) for each in requests]


def stream(cluster, requests):
    replies = list(cluster.front_door.ModelStreamInfer(iter(requests), timeout=60))
    assert not any(reply.error_message for reply in replies), replies[0].error_message
    return [reply.infer_response for reply in replies]


@pytest.mark.parametrize("send", [unary, stream])
@pytest.mark.parametrize("tokens", [1100, TOKENS])
def test_large_typed_contents_get_the_same_bits_as_raw_ones(cluster, rng, send, tokens):
    batch = random_batch(cluster.checkpoint.spec, rng, tokens)
    name = cluster.checkpoint.name
    raw, typed = send(cluster, [make_request(name, *batch, raw=form) for form in (True, False)])
    assert np.any(output_of(raw))
    assert raw.raw_output_contents[0] == typed.raw_output_contents[0]


def test_more_typed_elements_than_the_largest_batch_has_are_refused(cluster, rng):
    hidden, *routing = random_batch(cluster.checkpoint.spec, rng, TOKENS)
    request = make_request(cluster.checkpoint.name, hidden, *routing, raw=False)
    request.inputs[2].contents.fp32_contents.append(1)
    with pytest.raises(grpc.RpcError) as caught:
        cluster.front_door.ModelInfer(request, timeout=60)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    limit = hidden.nbytes + routing[1].nbytes
    assert f"more than the limit of {limit} bytes of fp32_contents" in caught.value.details()


def in_parts(request, *parts):
    """The request's bytes, with the last input's contents in so many packed fields."""
    request = type(request).FromString(request.SerializeToString())
    last = request.inputs.pop()
    elements = np.array(last.contents.fp32_contents, np.float32).tobytes()
    last.ClearField("contents")
    cuts = [round(part * len(elements) / 4) * 4 for part in (0, *parts, 1)]
    packed = [elements[begin:end] for begin, end in zip(cuts, cuts[1:])]
    contents = b"".join(field(FP32_CONTENTS, each) for each in packed)
    tensor = last.SerializeToString() + field(CONTENTS, contents)
    return request.SerializeToString() + field(INPUTS, tensor)


@pytest.mark.parametrize("tokens, is_taken", [(400, True), (1100, False)])
def test_elements_in_several_fields_are_for_small_requests(cluster, rng, tokens, is_taken):
    hidden, ids, weights = random_batch(cluster.checkpoint.spec, rng, tokens)
    request = make_request(cluster.checkpoint.name, hidden, ids, weights, raw=False)
    want = output_of(cluster.front_door.ModelInfer(request, timeout=60))
    # The hidden states come last, to be rewritten.
    request.inputs.append(request.inputs.pop(0))
    with protos.insecure_channel(cluster.target) as channel:
        call = channel.unary_unary(
            FRONT_DOOR + "ModelInfer",
            lambda sent: sent,
            protos.inference.ModelInferResponse.FromString,
        )
        got = output_of(call(in_parts(request), timeout=60))
        assert np.array_equal(got, want), "one field, the last input"
        if is_taken:
            got = output_of(call(in_parts(request, 0.3, 0.5), timeout=60))
            assert np.array_equal(got, want)
            return
        with pytest.raises(grpc.RpcError) as caught:
            call(in_parts(request, 0.3), timeout=60)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "4194304 bytes of fp32_contents that are not one packed field" in caught.value.details()
