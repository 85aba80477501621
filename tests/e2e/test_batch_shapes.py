"""Odd but ordinary batches: none of them is an error, all of them are right."""

import threading

import numpy as np
import pytest

from checkpoints import relative_error
from infer import infer, make_request, output_of, random_batch

WORKERS = 4


@pytest.fixture(scope="module", params=[0, 50], ids=["sleeping", "busy-polling"])
def cluster(request, checkpoint, start_cluster):
    arguments = ["--busy-poll-us", request.param]
    # 10 experts over 4 workers: 3, 3, 2, 2 or the like.
    with start_cluster(
        checkpoint(experts=10, topk=3),
        workers=WORKERS,
        coordinator_args=arguments,
        worker_args=arguments,
    ) as running:
        yield running


def check(cluster, hidden, ids, weights, **options):
    got = infer(cluster, hidden, ids, weights, **options)
    assert relative_error(got, cluster.checkpoint.ffn(hidden, ids, weights)) <= 1e-5
    return got


@pytest.mark.parametrize("routed", [True, False], ids=["client-routed", "served-router"])
def test_no_tokens_get_an_empty_answer(cluster, rng, routed):
    hidden, ids, weights = random_batch(cluster.checkpoint.spec, rng, 0)
    got = infer(cluster, hidden, ids, weights) if routed else infer(cluster, hidden)
    assert got.shape == (0, cluster.checkpoint.spec.hidden)


# Up to 64 rows are one worker's; more are divided, some workers having one more than others.
@pytest.mark.parametrize("num_tokens", [*range(1, 10), *range(62, 72), 97])
def test_few_tokens_and_tokens_that_do_not_divide_evenly_are_right(cluster, rng, num_tokens):
    check(cluster, *random_batch(cluster.checkpoint.spec, rng, num_tokens))


@pytest.mark.parametrize("num_tokens", [1, 3, 5, 63, 66, 71])
def test_so_many_tokens_are_right_with_the_served_router(cluster, rng, num_tokens):
    hidden = cluster.checkpoint.tokens_away_from_ties(rng, num_tokens)
    assert relative_error(infer(cluster, hidden), cluster.checkpoint.served(hidden)) <= 1e-5


@pytest.mark.parametrize("expert", [0, 4, 9])
def test_all_tokens_on_one_expert_are_right(cluster, rng, expert):
    hidden, ids, weights = random_batch(cluster.checkpoint.spec, rng, 96)
    ids[:] = -1
    ids[:, 1] = expert
    check(cluster, hidden, ids, weights)


def test_one_expert_named_twice_in_a_row_counts_twice(cluster, rng):
    hidden, ids, weights = random_batch(cluster.checkpoint.spec, rng, 81)
    ids[:, 2] = ids[:, 0]
    check(cluster, hidden, ids, weights)


def test_one_expert_in_every_place_of_every_row_is_right(cluster, rng):
    hidden, ids, weights = random_batch(cluster.checkpoint.spec, rng, 97)
    ids[:] = 7
    check(cluster, hidden, ids, weights)


def test_rows_without_any_expert_come_back_as_zeros(cluster, rng):
    hidden, ids, weights = random_batch(cluster.checkpoint.spec, rng, 76)
    ids[[0, 5, 75]] = -1
    ids[3, 1] = -1
    got = check(cluster, hidden, ids, weights)
    assert not got[[0, 5, 75]].any()


def test_batch_without_any_expert_comes_back_as_zeros(cluster, rng):
    hidden, ids, weights = random_batch(cluster.checkpoint.spec, rng, 76)
    ids[:] = -1
    assert not infer(cluster, hidden, ids, weights).any()


def test_weights_of_zero_and_below_are_applied_as_they_are(cluster, rng):
    hidden, ids, weights = random_batch(cluster.checkpoint.spec, rng, 76)
    weights[::2] *= -1
    weights[1] = 0
    got = check(cluster, hidden, ids, weights)
    assert not got[1].any()


def test_ids_of_64_bit_are_taken(cluster, rng):
    check(cluster, *random_batch(cluster.checkpoint.spec, rng, 9, id_type=np.int64))


def test_as_many_tokens_as_a_batch_may_hold_are_right(cluster, rng):
    check(cluster, *random_batch(cluster.checkpoint.spec, rng, 4096))


@pytest.mark.parametrize("topk", [1, 16])
def test_smallest_and_largest_topk_are_right(checkpoint, start_cluster, rng, topk):
    served = checkpoint(layout="qwen3_moe", experts=18, topk=topk)
    with start_cluster(served, workers=3) as cluster:
        check(cluster, *random_batch(served.spec, rng, 87))
        hidden = served.tokens_away_from_ties(rng, 87)
        assert relative_error(infer(cluster, hidden), served.served(hidden)) <= 1e-5


def test_more_workers_than_experts_leave_some_without_any(checkpoint, start_cluster, rng):
    with start_cluster(checkpoint(experts=3, topk=2), workers=4) as cluster:
        check(cluster, *random_batch(cluster.checkpoint.spec, rng, 85))


def test_more_workers_than_cores_serve(checkpoint, start_cluster, rng):
    with start_cluster(checkpoint(experts=16, topk=4), workers=6) as cluster:
        for _ in range(20):
            check(cluster, *random_batch(cluster.checkpoint.spec, rng, 96))


def test_one_worker_alone_serves(checkpoint, start_cluster, rng):
    with start_cluster(checkpoint(), workers=1) as cluster:
        check(cluster, *random_batch(cluster.checkpoint.spec, rng, 104))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
def test_poison_in_one_token_touches_only_that_token(cluster, rng, poison):
    hidden, ids, weights = random_batch(cluster.checkpoint.spec, rng, 96)
    clean = infer(cluster, hidden, ids, weights)
    poisoned = hidden.copy()
    poisoned[5, 3] = poison
    got = infer(cluster, poisoned, ids, weights)
    assert not np.isfinite(got[5]).all()
    others = np.arange(96) != 5
    assert np.array_equal(got[others], clean[others])
    # Nothing of it stays behind in a buffer, either.
    assert np.array_equal(infer(cluster, hidden, ids, weights), clean)


def test_same_request_gives_the_same_bits_every_time(cluster, rng):
    batch = random_batch(cluster.checkpoint.spec, rng, 114)
    first = infer(cluster, *batch).tobytes()
    assert all(infer(cluster, *batch).tobytes() == first for _ in range(20))


def test_same_request_gives_the_same_bits_among_others(cluster, rng):
    spec = cluster.checkpoint.spec
    batches = [random_batch(spec, rng, size) for size in (114, 7, 120, 33)]
    alone = [infer(cluster, *batch).tobytes() for batch in batches]
    answers = [[] for _ in batches]

    def ask(batch, into):
        request = make_request(cluster.checkpoint.name, *batch)
        for _ in range(25):
            response = cluster.front_door.ModelInfer(request, timeout=30)
            into.append(output_of(response).tobytes())

    threads = [threading.Thread(target=ask, args=pair) for pair in zip(batches, answers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, got in zip(alone, answers):
        assert got == [expected] * 25
