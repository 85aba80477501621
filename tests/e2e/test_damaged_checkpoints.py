"""A damaged checkpoint: every program that reads it says which file and tensor, and ends."""

import json
import shutil
import struct

import pytest

import checkpoints
from cluster import run_program, unique_cluster_id

FILE = "model.safetensors"
SHARD = "model-00002-of-00003.safetensors"
TENSOR = "model.layers.1.block_sparse_moe.experts.5.w2.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    single = checkpoints.write(root / "single", checkpoints.Spec())
    sharded = checkpoints.write(root / "sharded", checkpoints.Spec(shards=3))
    return {"single": single.path, "sharded": sharded.path}


def read(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path, header, body):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def edit_tensor(directory, change):
    header, body = read(directory / FILE)
    change(header[TENSOR], header)
    write(directory / FILE, header, body)


def truncated(directory):
    data = (directory / FILE).read_bytes()
    (directory / FILE).write_bytes(data[:-100])


def cut_within_the_header(directory):
    (directory / FILE).write_bytes((directory / FILE).read_bytes()[:200])


def empty(directory):
    (directory / FILE).write_bytes(b"")


def header_longer_than_the_file(directory):
    data = (directory / FILE).read_bytes()
    (directory / FILE).write_bytes(struct.pack("<Q", 2**40) + data[8:])


def header_length_that_wraps(directory):
    data = (directory / FILE).read_bytes()
    (directory / FILE).write_bytes(struct.pack("<Q", 2**64 - 4) + data[8:])


def header_that_is_no_json(directory):
    data = bytearray((directory / FILE).read_bytes())
    data[8:12] = b"!!!!"
    (directory / FILE).write_bytes(data)


def overlapping_offsets(directory):
    def change(entry, header):
        other = header[TENSOR.replace("experts.5", "experts.4")]["data_offsets"]
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        entry["data_offsets"] = [other[0] + 4, other[0] + 4 + size]

    edit_tensor(directory, change)


def offsets_past_the_end(directory):
    def change(entry, _):
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        entry["data_offsets"] = [2**40, 2**40 + size]

    edit_tensor(directory, change)


def offsets_that_wrap(directory):
    edit_tensor(directory, lambda entry, _: entry.update(data_offsets=[2**64 - 8, 24568]))


def offsets_in_the_wrong_order(directory):
    edit_tensor(directory, lambda entry, _: entry["data_offsets"].reverse())


def wrong_dtype(directory):
    def change(entry, _):
        entry["dtype"] = "I32"

    edit_tensor(directory, change)


def wrong_shape(directory):
    edit_tensor(directory, lambda entry, _: entry["shape"].reverse())


def shape_larger_than_its_bytes(directory):
    edit_tensor(directory, lambda entry, _: entry.update(shape=[64, 97]))


def shape_that_wraps(directory):
    edit_tensor(directory, lambda entry, _: entry.update(shape=[2**33, 2**33]))


def missing_tensor(directory):
    # Under another name, so that its bytes still belong to something.
    edit_tensor(directory, lambda _, header: header.update({"other": header.pop(TENSOR)}))


def bytes_that_belong_to_no_tensor(directory):
    edit_tensor(directory, lambda _, header: header.pop(TENSOR))


def missing_file(directory):
    (directory / FILE).unlink()


def missing_shard(directory):
    (directory / SHARD).unlink()


def edit_index(directory, change):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def shard_name_that_leaves_the_directory(directory):
    shutil.copy(directory / SHARD, directory.parent / "outside.safetensors")
    edit_index(directory, lambda names: names.update({TENSOR: "../outside.safetensors"}))


def shard_name_that_is_absolute(directory):
    outside = directory.parent / "absolute.safetensors"
    shutil.copy(directory / SHARD, outside)
    edit_index(directory, lambda names: names.update({TENSOR: str(outside)}))


def index_that_names_the_wrong_shard(directory):
    def change(names):
        names[TENSOR] = next(file for file in names.values() if file != names[TENSOR])

    edit_index(directory, change)


def index_without_the_tensor(directory):
    edit_index(directory, lambda names: names.pop(TENSOR))


def missing_config(directory):
    (directory / "config.json").unlink()


def config_that_is_no_json(directory):
    (directory / "config.json").write_text("{")


def edit_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def unknown_architecture(directory):
    edit_config(directory, model_type="gpt2", architectures=["GPT2LMHeadModel"])


def more_experts_in_config_than_in_files(directory):
    edit_config(directory, num_local_experts=9)


def topk_beyond_the_experts(directory):
    edit_config(directory, num_experts_per_tok=9)


def hidden_size_of_zero(directory):
    edit_config(directory, hidden_size=0)


CASES = [
    ("single", truncated, [FILE]),
    ("single", cut_within_the_header, [FILE]),
    ("single", empty, [FILE]),
    ("single", header_longer_than_the_file, [FILE]),
    ("single", header_length_that_wraps, [FILE]),
    ("single", header_that_is_no_json, [FILE]),
    ("single", overlapping_offsets, [FILE, "experts."]),
    ("single", offsets_past_the_end, [FILE, TENSOR]),
    ("single", offsets_that_wrap, [FILE, TENSOR]),
    ("single", offsets_in_the_wrong_order, [FILE, TENSOR]),
    ("single", wrong_dtype, [FILE, TENSOR, "I32"]),
    ("single", wrong_shape, [FILE, TENSOR, "64", "96"]),
    ("single", shape_larger_than_its_bytes, [FILE, TENSOR]),
    ("single", shape_that_wraps, [FILE, TENSOR]),
    ("single", missing_tensor, [TENSOR]),
    ("single", bytes_that_belong_to_no_tensor, [FILE]),
    ("single", missing_file, [FILE]),
    ("sharded", missing_shard, [SHARD]),
    ("sharded", shard_name_that_leaves_the_directory, ["../outside.safetensors"]),
    ("sharded", shard_name_that_is_absolute, ["absolute.safetensors"]),
    ("sharded", index_that_names_the_wrong_shard, [TENSOR]),
    ("sharded", index_without_the_tensor, [TENSOR]),
    ("single", missing_config, ["config.json"]),
    ("single", config_that_is_no_json, ["config.json"]),
    ("single", unknown_architecture, ["config.json", "gpt2"]),
    ("single", more_experts_in_config_than_in_files, ["experts.8"]),
    ("single", topk_beyond_the_experts, ["config.json", "9"]),
    ("single", hidden_size_of_zero, ["config.json", "hidden_size"]),
]


@pytest.fixture
def damaged(request, originals, tmp_path):
    kind, damage, words = request.param
    directory = tmp_path / "model"
    shutil.copytree(originals[kind], directory)
    damage(directory)
    return directory, words


def case_name(value):
    return value[1].__name__


def check_refusal(result, words):
    assert result.returncode > 0, result
    for word in words:
        assert word in result.stderr, f"{word!r} is not in: {result.stderr}"


@pytest.mark.parametrize("damaged", CASES, ids=case_name, indirect=True)
def test_coordinator_names_file_and_tensor_and_ends(damaged, tmp_path):
    directory, words = damaged
    result = run_program(
        "epserve-coordinator",
        *("--checkpoint", directory),
        *("--cluster-id", unique_cluster_id()),
        *("--listen", "127.0.0.1:0"),
        *("--metrics-listen", "off"),
        *("--port-file", tmp_path / "port"),
        timeout_s=20,
    )
    check_refusal(result, words)
    assert not (tmp_path / "port").exists()


@pytest.mark.parametrize("damaged", CASES, ids=case_name, indirect=True)
def test_worker_names_file_and_tensor_and_ends(damaged):
    directory, words = damaged
    # Nobody listens there: the checkpoint is looked at before anything else.
    result = run_program(
        "epserve-worker",
        *("--checkpoint", directory),
        *("--cluster-id", unique_cluster_id()),
        *("--coordinator", "127.0.0.1:1"),
        timeout_s=20,
    )
    check_refusal(result, words)


def test_directory_that_is_not_there_is_named(tmp_path):
    for program, more in (
        ("epserve-coordinator", ["--listen", "127.0.0.1:0", "--metrics-listen", "off"]),
        ("epserve-worker", ["--coordinator", "127.0.0.1:1"]),
    ):
        result = run_program(
            program, "--checkpoint", tmp_path / "nowhere", *more, timeout_s=20
        )
        check_refusal(result, ["nowhere"])
