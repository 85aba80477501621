"""Merging within a window, and phases triggered one by one."""

import numpy as np
import pytest

from checkpoints import relative_error
from infer import BF16, TOLERANCE, infer, make_request, output_of, random_batch

WINDOW_US = 300_000


def batches_done(cluster):
    return max(worker.batches for worker in cluster.status().workers)


def send_together(cluster, requests):
    calls = [cluster.front_door.ModelInfer.future(request, timeout=30) for request in requests]
    return [output_of(call.result()) for call in calls]


@pytest.fixture(scope="module")
def merging(checkpoint, start_cluster):
    arguments = ["--batch-window-us", WINDOW_US, "--max-batch-tokens", 64]
    options = dict(coordinator_args=arguments, worker_args=["--max-batch-tokens", 64])
    with start_cluster(checkpoint(experts=10, topk=3), workers=3, **options) as cluster:
        yield cluster


def test_requests_within_the_window_share_a_batch_and_stay_right(merging, rng):
    served = merging.checkpoint
    batches = [random_batch(served.spec, rng, size) for size in (5, 0, 1, 9, 16, 3, 2, 7)]
    before = batches_done(merging)
    answers = send_together(merging, [make_request(served.name, *b) for b in batches])
    for batch, got in zip(batches, answers):
        assert got.shape == batch[0].shape
        assert relative_error(got, served.ffn(*batch)) <= 1e-5
    merging.wait_status(lambda s: not s.batches_in_flight, 5, "no batch in flight")
    assert 1 <= batches_done(merging) - before <= 2


def test_requests_of_unlike_layer_type_or_routing_do_not_share_a_batch(merging, rng):
    served = merging.checkpoint
    plain = random_batch(served.spec, rng, 6)
    other_layer = random_batch(served.spec, rng, 6)
    other_type = random_batch(served.spec, rng, 6, BF16)
    unrouted = served.tokens_away_from_ties(rng, 6)
    requests = [
        make_request(served.name, *plain, layer=0),
        make_request(served.name, *other_layer, layer=1),
        make_request(served.name, *other_type, layer=0),
        make_request(served.name, unrouted, layer=0),
    ]
    before = batches_done(merging)
    answers = send_together(merging, requests)
    expected = [
        served.ffn(*plain, 0),
        served.ffn(*other_layer, 1),
        served.ffn(*other_type, 0),
        served.served(unrouted, 0),
    ]
    for got, want in zip(answers, expected):
        assert relative_error(got, want) <= TOLERANCE[got.dtype]
    merging.wait_status(lambda s: not s.batches_in_flight, 5, "no batch in flight")
    assert batches_done(merging) - before == 4


def test_requests_without_ids_within_the_window_stay_right(merging, rng):
    served = merging.checkpoint
    tokens = [served.tokens_away_from_ties(rng, size) for size in (5, 1, 9)]
    answers = send_together(merging, [make_request(served.name, t) for t in tokens])
    for hidden, got in zip(tokens, answers):
        assert relative_error(got, served.served(hidden)) <= 1e-5


def test_merged_batches_hold_no_more_tokens_than_the_limit(merging, rng):
    served = merging.checkpoint
    batches = [random_batch(served.spec, rng, 40) for _ in range(3)]
    before = batches_done(merging)
    answers = send_together(merging, [make_request(served.name, *b) for b in batches])
    for batch, got in zip(batches, answers):
        assert relative_error(got, served.ffn(*batch)) <= 1e-5
    merging.wait_status(lambda s: not s.batches_in_flight, 5, "no batch in flight")
    assert batches_done(merging) - before == 3


def test_poison_in_a_merged_request_touches_no_other_request(merging, rng):
    served = merging.checkpoint
    batches = [random_batch(served.spec, rng, 8) for _ in range(3)]
    batches[1][0][:] = np.nan
    answers = send_together(merging, [make_request(served.name, *b) for b in batches])
    assert np.isnan(answers[1]).all()
    for index in (0, 2):
        assert relative_error(answers[index], served.ffn(*batches[index])) <= 1e-5


@pytest.fixture(scope="module", params=["shared", "messages"])
def separate(checkpoint, start_cluster, request):
    options = dict(coordinator_args=["--trigger=separate", f"--row-transport={request.param}"])
    with start_cluster(checkpoint(experts=10, topk=3), workers=3, **options) as cluster:
        yield cluster


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 40, 100])
def test_phases_triggered_one_by_one_give_the_same_answers(separate, rng, num_tokens):
    served = separate.checkpoint
    batch = random_batch(served.spec, rng, num_tokens)
    assert relative_error(infer(separate, *batch), served.ffn(*batch)) <= 1e-5
    if num_tokens:
        hidden = served.tokens_away_from_ties(rng, num_tokens)
        assert relative_error(infer(separate, hidden), served.served(hidden)) <= 1e-5


def test_phases_triggered_one_by_one_keep_two_batches_apart(separate, rng):
    served = separate.checkpoint
    batches = [random_batch(served.spec, rng, 20) for _ in range(12)]
    answers = send_together(separate, [make_request(served.name, *b) for b in batches])
    for batch, got in zip(batches, answers):
        assert relative_error(got, served.ffn(*batch)) <= 1e-5
