"""The front door as its users' own client sees it: an unmodified tritonclient."""

import multiprocessing.shared_memory as python_shm
import os
import queue

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as triton_shm
from tritonclient.utils import InferenceServerException

from checkpoints import relative_error
from cluster import SHM_DIR
from infer import BF16, infer, make_request, output_of, random_batch

DATATYPES = {"hidden_states": "FP32", "topk_ids": "INT32", "topk_weights": "FP32"}


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster):
    with start_cluster(checkpoint(), workers=2) as running:
        yield running


@pytest.fixture(scope="module")
def shm_cluster(checkpoint, start_cluster):
    arguments = ["--allow-client-shm", "--shm-key-prefix", "e2e-"]
    with start_cluster(checkpoint(), workers=2, coordinator_args=arguments) as running:
        yield running


@pytest.fixture
def client(cluster):
    with triton.InferenceServerClient(cluster.target) as connected:
        yield connected


@pytest.fixture
def shm_client(shm_cluster):
    with triton.InferenceServerClient(shm_cluster.target) as connected:
        yield connected
        connected.unregister_system_shared_memory()


def inputs_of(tensors):
    inputs = []
    for name, array in tensors.items():
        datatype = "BF16" if array.dtype == BF16 else DATATYPES[name]
        tensor = triton.InferInput(name, array.shape, datatype)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def batch_of(cluster, rng, num_tokens=11, dtype=np.float32):
    batch = random_batch(cluster.checkpoint.spec, rng, num_tokens, dtype)
    return dict(zip(DATATYPES, batch))


def test_tritonclient_request_gets_the_reference_answer(cluster, client, rng):
    tensors = batch_of(cluster, rng)
    result = client.infer(
        cluster.checkpoint.name, inputs_of(tensors), request_id="r-7", parameters={"layer": 1}
    )
    want = cluster.checkpoint.ffn(*tensors.values(), layer=1)
    assert relative_error(result.as_numpy("hidden_states"), want) <= 1e-5
    assert result.get_response().id == "r-7"
    assert result.get_response().model_name == cluster.checkpoint.name


def test_tritonclient_bf16_request_gets_the_reference_answer(cluster, client, rng):
    tensors = batch_of(cluster, rng, dtype=BF16)
    got = client.infer(cluster.checkpoint.name, inputs_of(tensors)).as_numpy("hidden_states")
    assert relative_error(got, cluster.checkpoint.ffn(*tensors.values())) <= 1e-2


def test_tritonclient_request_without_ids_is_routed(cluster, client, rng):
    hidden = cluster.checkpoint.tokens_away_from_ties(rng, 9)
    result = client.infer(cluster.checkpoint.name, inputs_of({"hidden_states": hidden}))
    want = cluster.checkpoint.served(hidden)
    assert relative_error(result.as_numpy("hidden_states"), want) <= 1e-5


def test_requested_output_by_name_is_answered(cluster, client, rng):
    tensors = batch_of(cluster, rng)
    outputs = [triton.InferRequestedOutput("hidden_states")]
    result = client.infer(cluster.checkpoint.name, inputs_of(tensors), outputs=outputs)
    assert result.as_numpy("hidden_states").shape == tensors["hidden_states"].shape


def test_final_response_parameter_is_taken_without_another_reply(cluster, rng):
    tensors = batch_of(cluster, rng)
    request = make_request(cluster.checkpoint.name, *tensors.values())
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    response = cluster.front_door.ModelInfer(request, timeout=10)
    assert output_of(response).shape == tensors["hidden_states"].shape


def test_reply_carries_the_times_of_its_batch(cluster, rng):
    tensors = batch_of(cluster, rng)
    request = make_request(cluster.checkpoint.name, *tensors.values())
    response = cluster.front_door.ModelInfer(request, timeout=10)
    phases = ("queue", "assign", "counts", "dispatch", "ffn", "combine", "server")
    times = {phase: response.parameters[f"epserve_{phase}_us"].int64_param for phase in phases}
    assert all(time >= 0 for time in times.values()), times
    assert times["server"] >= times["ffn"] > 0
    assert response.parameters["epserve_epoch"].int64_param == cluster.status().epoch


def test_typed_contents_get_the_same_bits_as_raw_ones(cluster, rng):
    batch = batch_of(cluster, rng).values()
    assert np.array_equal(infer(cluster, *batch), infer(cluster, *batch, raw=False))


def test_typed_ids_of_64_bit_are_taken(cluster, rng):
    batch = random_batch(cluster.checkpoint.spec, rng, 5, id_type=np.int64)
    want = cluster.checkpoint.ffn(*batch)
    assert relative_error(infer(cluster, *batch, raw=False), want) <= 1e-5


def test_server_is_live_and_ready(cluster, client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(cluster.checkpoint.name)
    assert client.is_model_ready(cluster.checkpoint.name, "1")


def test_server_metadata_names_the_server_and_statistics(client):
    metadata = client.get_server_metadata()
    assert metadata.name == "epserve"
    assert metadata.version
    assert "statistics" in metadata.extensions


def test_statistics_count_requests_and_their_phases_alike(cluster, client, rng):
    def totals():
        reply = client.get_inference_statistics(cluster.checkpoint.name)
        (model,) = reply.model_stats
        assert (model.name, model.version) == (cluster.checkpoint.name, "1")
        return model.inference_stats

    before = totals()
    for _ in range(5):
        client.infer(cluster.checkpoint.name, inputs_of(batch_of(cluster, rng)))
    after = totals()
    for phase in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert getattr(after, phase).count - getattr(before, phase).count == 5, phase
    assert after.compute_infer.ns > before.compute_infer.ns


def test_streamed_requests_come_back_in_order_with_the_reference_answer(cluster, client, rng):
    batches = [batch_of(cluster, rng, num_tokens) for num_tokens in (3, 11, 0, 7)]
    replies = queue.Queue()
    client.start_stream(lambda result, error: replies.put((result, error)))
    for number, batch in enumerate(batches):
        client.async_stream_infer(cluster.checkpoint.name, inputs_of(batch),
                                  request_id=f"request-{number}")
    for number, batch in enumerate(batches):
        result, error = replies.get(timeout=30)
        assert error is None
        assert result.get_response().id == f"request-{number}"
        output = result.as_numpy("hidden_states")
        want = cluster.checkpoint.ffn(*batch.values())
        assert output.shape == want.shape
        assert output.size == 0 or relative_error(output, want) <= 1e-5
    client.stop_stream()


def test_model_metadata_describes_the_tensors(cluster, client):
    metadata = client.get_model_metadata(cluster.checkpoint.name, as_json=True)
    shapes = {t["name"]: t["shape"] for t in metadata["inputs"]}
    assert metadata["name"] == cluster.checkpoint.name
    assert metadata["versions"] == ["1"]
    assert shapes == {
        "hidden_states": ["-1", "64"],
        "topk_ids": ["-1", "2"],
        "topk_weights": ["-1", "2"],
    }
    assert [(t["name"], t["shape"]) for t in metadata["outputs"]] == [
        ("hidden_states", ["-1", "64"])
    ]


def test_model_config_has_full_shapes_and_no_batch_dimension(cluster, client):
    config = client.get_model_config(cluster.checkpoint.name).config
    assert config.name == cluster.checkpoint.name
    assert config.max_batch_size == 0
    dims = {t.name: (list(t.dims), t.optional) for t in config.input}
    assert dims == {
        "hidden_states": ([-1, 64], False),
        "topk_ids": ([-1, 2], True),
        "topk_weights": ([-1, 2], True),
    }
    assert [(t.name, list(t.dims)) for t in config.output] == [("hidden_states", [-1, 64])]
    assert not config.model_transaction_policy.decoupled


def test_repository_index_lists_the_model_as_ready(cluster, client):
    models = client.get_model_repository_index().models
    assert [(m.name, m.version, m.state) for m in models] == [
        (cluster.checkpoint.name, "1", "READY")
    ]


def test_error_reaches_tritonclient_with_code_and_message(client, cluster, rng):
    with pytest.raises(InferenceServerException) as caught:
        client.infer("another-model", inputs_of(batch_of(cluster, rng)))
    assert "NOT_FOUND" in caught.value.status()
    assert "another-model" in caught.value.message()


def test_message_beyond_the_grpc_default_of_4_mib_is_taken(checkpoint, start_cluster, rng):
    served = checkpoint(hidden=512, intermediate=16, experts=4)
    with start_cluster(served, workers=2) as cluster:
        batch = random_batch(served.spec, rng, 4096)
        assert relative_error(infer(cluster, *batch), served.ffn(*batch)) <= 1e-5


# ---- system shared memory


class Region:
    """A region as tritonclient makes it."""

    def __init__(self, name, byte_size):
        self.name = name
        self.key = f"e2e-{os.getpid()}-{name}"
        self.byte_size = byte_size
        self.handle = triton_shm.create_shared_memory_region(name, f"/{self.key}", byte_size)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        triton_shm.destroy_shared_memory_region(self.handle)


def refused(call, status, *words):
    with pytest.raises(InferenceServerException) as caught:
        call()
    assert status in caught.value.status(), caught.value
    for word in words:
        assert str(word) in caught.value.message()
    return caught.value.message()


def test_shared_memory_is_refused_with_the_flag_that_allows_it(client):
    for call in (
        lambda: client.register_system_shared_memory("r", "/e2e-x", 64),
        client.get_system_shared_memory_status,
    ):
        assert "--allow-client-shm" in refused(call, "UNIMPLEMENTED")


def test_tensors_in_shared_memory_are_read_and_written(shm_cluster, shm_client, rng):
    tensors = batch_of(shm_cluster, rng)
    sizes = {name: array.nbytes for name, array in tensors.items()}
    output_size = sizes["hidden_states"]
    with Region("in", sum(sizes.values())) as source, Region("out", output_size + 64) as target:
        triton_shm.set_shared_memory_region(source.handle, list(tensors.values()))
        for region in (source, target):
            shm_client.register_system_shared_memory(
                region.name, f"/{region.key}", region.byte_size
            )
        inputs, offset = [], 0
        for name, array in tensors.items():
            tensor = triton.InferInput(name, array.shape, DATATYPES[name])
            tensor.set_shared_memory("in", sizes[name], offset)
            offset += sizes[name]
            inputs.append(tensor)
        output = triton.InferRequestedOutput("hidden_states")
        output.set_shared_memory("out", output_size, 64)
        result = shm_client.infer(shm_cluster.checkpoint.name, inputs, outputs=[output])
        assert list(result.get_response().raw_output_contents) == [b""]
        got = triton_shm.get_contents_as_numpy(
            target.handle, np.float32, tensors["hidden_states"].shape, 64
        )
        want = shm_cluster.checkpoint.ffn(*tensors.values())
        assert relative_error(got, want) <= 1e-5


def test_inputs_partly_in_shared_memory_take_the_raw_ones_in_order(shm_cluster, shm_client, rng):
    tensors = batch_of(shm_cluster, rng)
    with Region("ids", tensors["topk_ids"].nbytes) as region:
        triton_shm.set_shared_memory_region(region.handle, [tensors["topk_ids"]])
        shm_client.register_system_shared_memory("ids", f"/{region.key}", region.byte_size)
        inputs = inputs_of(tensors)
        inputs[1].set_shared_memory("ids", region.byte_size)
        result = shm_client.infer(shm_cluster.checkpoint.name, inputs)
        want = shm_cluster.checkpoint.ffn(*tensors.values())
        assert relative_error(result.as_numpy("hidden_states"), want) <= 1e-5


def test_shared_memory_status_lists_what_is_registered(shm_client):
    with Region("listed", 256) as region:
        shm_client.register_system_shared_memory("listed", f"/{region.key}", 192, offset=64)
        regions = shm_client.get_system_shared_memory_status().regions
        assert (regions["listed"].offset, regions["listed"].byte_size) == (64, 192)
        shm_client.unregister_system_shared_memory("listed")
        assert not shm_client.get_system_shared_memory_status().regions


def test_region_registered_twice_already_exists(shm_client):
    with Region("twice", 64) as region:
        shm_client.register_system_shared_memory("twice", f"/{region.key}", 64)
        refused(
            lambda: shm_client.register_system_shared_memory("twice", f"/{region.key}", 64),
            "ALREADY_EXISTS",
        )


def test_unregistering_an_unknown_region_is_fine(shm_client):
    shm_client.unregister_system_shared_memory("never-registered")


def test_unregistered_region_is_not_found_by_name(shm_cluster, shm_client, rng):
    inputs = inputs_of(batch_of(shm_cluster, rng))
    inputs[0].set_shared_memory("nowhere", 64)
    refused(
        lambda: shm_client.infer(shm_cluster.checkpoint.name, inputs), "NOT_FOUND", "nowhere"
    )


@pytest.mark.parametrize(
    "byte_size, offset", [(2816, 1), (2816, 2**63 - 1), (2816, 2**40), (4096, 0)]
)
def test_window_past_the_region_is_refused(shm_cluster, shm_client, rng, byte_size, offset):
    tensors = batch_of(shm_cluster, rng)
    assert tensors["hidden_states"].nbytes == 2816
    with Region("small", 2816) as region:
        shm_client.register_system_shared_memory("small", f"/{region.key}", 2816)
        inputs = inputs_of(tensors)
        inputs[0].set_shared_memory("small", byte_size, offset)
        refused(lambda: shm_client.infer(shm_cluster.checkpoint.name, inputs), "INVALID_ARGUMENT")


def test_output_window_too_small_is_refused_with_needed_and_given(shm_cluster, shm_client, rng):
    tensors = batch_of(shm_cluster, rng)
    with Region("tight", 4096) as region:
        shm_client.register_system_shared_memory("tight", f"/{region.key}", 4096)
        output = triton.InferRequestedOutput("hidden_states")
        output.set_shared_memory("tight", 2815)
        refused(
            lambda: shm_client.infer(
                shm_cluster.checkpoint.name, inputs_of(tensors), outputs=[output]
            ),
            "INVALID_ARGUMENT",
            2816,
            2815,
        )


@pytest.mark.parametrize(
    "key", ["/../etc/passwd", "/other-prefix", "/e2e-a/b", "/sem.e2e", "/", "", "/e2e-no-such"]
)
def test_key_that_may_not_be_opened_is_refused_without_repeating_it(shm_client, key):
    with pytest.raises(InferenceServerException) as caught:
        shm_client.register_system_shared_memory("r", key, 64)
    assert caught.value.message()
    if len(key) > 1:
        assert key.lstrip("/") not in caught.value.message()


@pytest.mark.parametrize(
    "byte_size, offset", [(0, 0), (65, 0), (64, 1), (64, 2**64 - 32), (1, 2**63)]
)
def test_registration_past_the_object_is_refused(shm_client, byte_size, offset):
    with Region("bounds", 64) as region:
        refused(
            lambda: shm_client.register_system_shared_memory(
                "bounds", f"/{region.key}", byte_size, offset
            ),
            "INVALID_ARGUMENT",
        )


def test_region_shrunk_after_registration_leaves_the_service_alive(shm_cluster, shm_client, rng):
    tensors = batch_of(shm_cluster, rng)
    size = tensors["hidden_states"].nbytes
    block = python_shm.SharedMemory(f"e2e-{os.getpid()}-shrunk", create=True, size=size)
    try:
        shm_client.register_system_shared_memory("shrunk", f"/{block.name}", size)
        os.truncate(SHM_DIR / block.name, 0)
        inputs = inputs_of(tensors)
        inputs[0].set_shared_memory("shrunk", size)
        with pytest.raises(InferenceServerException):
            shm_client.infer(shm_cluster.checkpoint.name, inputs)
    finally:
        os.truncate(SHM_DIR / block.name, size)
        block.close()
        block.unlink()
    assert shm_cluster.coordinator.alive()
    result = shm_client.infer(shm_cluster.checkpoint.name, inputs_of(tensors))
    want = shm_cluster.checkpoint.ffn(*tensors.values())
    assert relative_error(result.as_numpy("hidden_states"), want) <= 1e-5
