"""What a wrong request gets: the code, and a message that names what is wrong and the limit."""

import re

import grpc
import ml_dtypes
import numpy as np
import pytest

import protos
from checkpoints import relative_error
from infer import add_input, infer, make_request, random_batch

MAX_TOKENS = 128
INPUTS = ("hidden_states", "topk_ids", "topk_weights")
INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster):
    limit = ["--max-batch-tokens", MAX_TOKENS]
    options = dict(coordinator_args=limit, worker_args=limit)
    served = checkpoint(hidden=64, experts=8, topk=2)
    with start_cluster(served, workers=2, **options) as running:
        yield running


@pytest.fixture(scope="module")
def cluster_without_router(checkpoint, start_cluster):
    with start_cluster(checkpoint(router=False), workers=2) as running:
        yield running


@pytest.fixture(autouse=True)
def still_serves(request):
    """Whatever a test sent, the service is up afterwards and answers right."""
    yield
    if "cluster" in request.fixturenames:
        running = request.getfixturevalue("cluster")
        batch = random_batch(running.checkpoint.spec, np.random.default_rng(0), 4)
        assert relative_error(infer(running, *batch), running.checkpoint.ffn(*batch)) <= 1e-5


def good(rng, num_tokens=6):
    hidden = rng.standard_normal((num_tokens, 64)).astype(np.float32)
    ids = np.stack([rng.permutation(8)[:2] for _ in range(num_tokens)]).astype(np.int32)
    weights = rng.uniform(0.1, 1, (num_tokens, 2)).astype(np.float32)
    return {"hidden_states": hidden, "topk_ids": ids, "topk_weights": weights}


def build(cluster, tensors, raw=True):
    request = protos.inference.ModelInferRequest(model_name=cluster.checkpoint.name)
    for name, array in tensors.items():
        add_input(request, name, array, raw)
    return request


def refused(cluster, request, code, *words):
    """The call fails with `code`, and the message holds each of `words` as a word of its own."""
    with pytest.raises(grpc.RpcError) as caught:
        cluster.front_door.ModelInfer(request, timeout=20)
    message = caught.value.details()
    assert caught.value.code() == code, message
    for word in words:
        pattern = rf"(?<![\w.-]){re.escape(str(word))}(?![\w])"
        assert re.search(pattern, message), f"{word!r} is not in: {message}"
    return message


@pytest.mark.parametrize("value", [8, 9, -2, 2**31 - 1, -(2**31)])
def test_id_out_of_range_is_refused_with_row_value_and_limit(cluster, rng, value):
    tensors = good(rng)
    tensors["topk_ids"][4, 1] = value
    refused(cluster, build(cluster, tensors), INVALID, "topk_ids", 4, value, 8)


@pytest.mark.parametrize("value", [8, 2**40, 2**32, -(2**32) + 1])
def test_64_bit_id_out_of_range_is_refused_and_not_wrapped(cluster, rng, value):
    tensors = good(rng)
    tensors["topk_ids"] = tensors["topk_ids"].astype(np.int64)
    tensors["topk_ids"][3, 0] = value
    refused(cluster, build(cluster, tensors), INVALID, "topk_ids", 3, value, 8)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_weight_that_is_not_finite_is_refused_with_its_row(cluster, rng, value):
    tensors = good(rng)
    tensors["topk_weights"][5, 0] = value
    refused(cluster, build(cluster, tensors), INVALID, "topk_weights", 5)


@pytest.mark.parametrize("value", [8, -7])
def test_typed_id_out_of_range_is_refused(cluster, rng, value):
    tensors = good(rng)
    tensors["topk_ids"][2, 1] = value
    refused(cluster, build(cluster, tensors, raw=False), INVALID, "topk_ids", 2, value, 8)


@pytest.mark.parametrize("width", [63, 65, 1])
def test_wrong_hidden_size_is_refused_with_both_sizes(cluster, rng, width):
    tensors = good(rng)
    tensors["hidden_states"] = np.ones((6, width), np.float32)
    refused(cluster, build(cluster, tensors), INVALID, "hidden_states", width, 64)


@pytest.mark.parametrize("topk", [1, 3])
def test_wrong_topk_is_refused_with_both_sizes(cluster, rng, topk):
    tensors = good(rng)
    tensors["topk_ids"] = np.zeros((6, topk), np.int32)
    tensors["topk_weights"] = np.ones((6, topk), np.float32)
    refused(cluster, build(cluster, tensors), INVALID, topk, 2)


@pytest.mark.parametrize("name", ["topk_ids", "topk_weights"])
def test_unequal_numbers_of_rows_are_refused_with_both(cluster, rng, name):
    tensors = good(rng)
    tensors[name] = tensors[name][:5]
    refused(cluster, build(cluster, tensors), INVALID, name, 5, 6)


@pytest.mark.parametrize("shape", [(384,), (6, 64, 1), (3, 2, 64)], ids=str)
def test_wrong_number_of_dimensions_is_refused(cluster, rng, shape):
    tensors = good(rng)
    tensors["hidden_states"] = np.ones(shape, np.float32)
    refused(cluster, build(cluster, tensors), INVALID, "hidden_states")


@pytest.mark.parametrize("shape", [[-1, 64], [2**62, 64], [2**58, 64], [6, -64]], ids=str)
def test_shape_no_tensor_can_have_is_refused(cluster, rng, shape):
    request = build(cluster, good(rng))
    request.inputs[0].shape[:] = shape
    refused(cluster, request, INVALID, "hidden_states")


@pytest.mark.parametrize(
    "name, dtype, got, expected",
    [
        ("hidden_states", np.float64, "FP64", "FP32"),
        ("hidden_states", np.int32, "INT32", "BF16"),
        ("topk_ids", np.float32, "FP32", "INT32"),
        ("topk_weights", ml_dtypes.bfloat16, "BF16", "FP32"),
        ("topk_weights", np.float64, "FP64", "FP32"),
    ],
)
def test_wrong_datatype_is_refused_with_expected_and_got(cluster, rng, name, dtype, got, expected):
    tensors = good(rng)
    tensors[name] = tensors[name].astype(dtype)
    refused(cluster, build(cluster, tensors), INVALID, name, got, expected)


def test_unknown_datatype_is_refused_with_its_name(cluster, rng):
    request = build(cluster, good(rng))
    request.inputs[0].datatype = "FP4"
    refused(cluster, request, INVALID, "hidden_states", "FP4")


@pytest.mark.parametrize("missing", ["hidden_states", "topk_ids", "topk_weights"])
def test_missing_tensor_is_refused_with_its_name(cluster, rng, missing):
    tensors = good(rng)
    del tensors[missing]
    refused(cluster, build(cluster, tensors), INVALID, missing)


def test_request_without_any_tensor_is_refused(cluster):
    refused(cluster, build(cluster, {}), INVALID, "hidden_states")


def test_surplus_tensor_is_refused_with_its_name(cluster, rng):
    tensors = good(rng) | {"attention_mask": np.ones((6, 1), np.int32)}
    refused(cluster, build(cluster, tensors), INVALID, "attention_mask")


def test_tensor_given_twice_is_refused_with_its_name(cluster, rng):
    request = build(cluster, good(rng))
    add_input(request, "topk_ids", good(rng)["topk_ids"])
    refused(cluster, request, INVALID, "topk_ids")


@pytest.mark.parametrize("index, name", list(enumerate(INPUTS)))
@pytest.mark.parametrize("change", [-1, 1, -4, 4])
def test_byte_size_off_is_refused_with_expected_and_got(cluster, rng, index, name, change):
    request = build(cluster, good(rng))
    size = len(request.raw_input_contents[index])
    data = request.raw_input_contents[index] + b"\0" * 8
    request.raw_input_contents[index] = data[: size + change]
    refused(cluster, request, INVALID, name, size, size + change)


def test_surplus_raw_contents_are_refused(cluster, rng):
    request = build(cluster, good(rng))
    request.raw_input_contents.append(b"1234")
    refused(cluster, request, INVALID, "raw_input_contents", 4, 3)


def test_too_few_raw_contents_are_refused(cluster, rng):
    request = build(cluster, good(rng))
    del request.raw_input_contents[2]
    refused(cluster, request, INVALID, 2, 3)


def test_raw_and_typed_contents_together_are_refused(cluster, rng):
    request = build(cluster, good(rng))
    request.inputs[1].contents.int_contents.extend([0] * 12)
    refused(cluster, request, INVALID, "topk_ids")


def test_typed_contents_of_the_wrong_length_are_refused(cluster, rng):
    request = build(cluster, good(rng), raw=False)
    request.inputs[2].contents.fp32_contents.append(1.0)
    refused(cluster, request, INVALID, "topk_weights", 48, 52)


def test_more_tokens_than_a_batch_holds_are_refused_with_both(cluster, rng):
    request = build(cluster, good(rng, MAX_TOKENS + 1))
    message = refused(cluster, request, INVALID, MAX_TOKENS + 1, MAX_TOKENS)
    assert "--max-batch-tokens" in message


def test_unknown_model_is_not_found_by_name(cluster, rng):
    request = build(cluster, good(rng))
    request.model_name = "another-model"
    refused(cluster, request, NOT_FOUND, "another-model")


def test_unknown_model_version_is_not_found(cluster, rng):
    request = build(cluster, good(rng))
    request.model_version = "77"
    refused(cluster, request, NOT_FOUND, "77")


@pytest.mark.parametrize("layer", [2, 77, -1, 2**62])
def test_unknown_layer_is_not_found_by_number(cluster, rng, layer):
    request = build(cluster, good(rng))
    request.parameters["layer"].int64_param = layer
    refused(cluster, request, NOT_FOUND, "layer", layer)


def test_layer_that_is_not_an_integer_is_refused(cluster, rng):
    request = build(cluster, good(rng))
    request.parameters["layer"].string_param = "0"
    refused(cluster, request, INVALID, "layer")


def test_unknown_requested_output_is_refused_with_its_name(cluster, rng):
    request = build(cluster, good(rng))
    request.outputs.add(name="logits")
    refused(cluster, request, INVALID, "logits")


def test_ids_left_out_where_no_router_is_served_are_refused(cluster_without_router, rng):
    served = cluster_without_router
    refused(served, make_request(served.checkpoint.name, good(rng)["hidden_states"]), INVALID)
    tensors = good(rng)
    got = infer(served, *tensors.values())
    assert relative_error(got, served.checkpoint.ffn(*tensors.values())) <= 1e-5


@pytest.mark.parametrize(
    "method",
    [
        "CudaSharedMemoryStatus",
        "CudaSharedMemoryRegister",
        "CudaSharedMemoryUnregister",
    ],
)
def test_cuda_memory_where_it_is_not_allowed_is_unimplemented_naming_the_flag(cluster, method):
    request = getattr(protos.inference, f"{method}Request")(name="region")
    with pytest.raises(grpc.RpcError) as caught:
        getattr(cluster.front_door, method)(request, timeout=10)
    assert caught.value.code() == UNIMPLEMENTED
    assert "--allow-client-shm" in caught.value.details()


def test_unregistering_all_cuda_regions_is_fine_because_there_are_none(cluster):
    request = protos.inference.CudaSharedMemoryUnregisterRequest(name="")
    cluster.front_door.CudaSharedMemoryUnregister(request, timeout=10)


def test_bad_request_on_a_stream_is_answered_in_its_place(cluster, rng):
    bad = build(cluster, good(rng))
    bad.id = "bad"
    bad.model_name = "another-model"
    requests = iter([build(cluster, good(rng)), bad, build(cluster, good(rng))])
    replies = list(cluster.front_door.ModelStreamInfer(requests, timeout=10))
    assert [bool(reply.error_message) for reply in replies] == [False, True, False]
    assert "another-model" in replies[1].error_message
    assert replies[1].infer_response.id == "bad"


@pytest.mark.parametrize(
    "method", ["ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"])
def test_query_for_an_unknown_model_is_not_found_by_name(cluster, method):
    request = getattr(protos.inference, f"{method}Request")(name="another-model")
    with pytest.raises(grpc.RpcError) as caught:
        getattr(cluster.front_door, method)(request, timeout=10)
    assert caught.value.code() == NOT_FOUND
    assert "another-model" in caught.value.details()
