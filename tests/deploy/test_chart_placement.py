"""Where the chart's pods run, how they are reached and how long they have to stop: what the values
say of it arrives."""

import pytest

import chart


@pytest.fixture(scope="module", params=chart.VALUE_SETS)
def rendered(request):
    return chart.render(chart.values(request.param))


def test_grace_periods_fit_the_drain():
    for drain_ms, least in ((0, 1), (10000, 11), (30500, 32)):
        changes = chart.merged(chart.values("cpu"), {"coordinator": {"drainTimeoutMs": drain_ms}})
        rendered = chart.render(changes)
        pod = rendered.coordinator()["spec"]
        assert chart.flag(pod["containers"][0], "--drain-timeout-ms") == str(drain_ms)
        assert least <= pod["terminationGracePeriodSeconds"] <= least + 15
    for leave_ms, least in ((0, 1), (15000, 31), (30500, 62)):
        changes = chart.merged(chart.values("cpu"), {"workers": {"leaveTimeoutMs": leave_ms}})
        pod = chart.render(changes).workers()["spec"]
        assert {chart.flag(c, "--leave-timeout-ms") for c in pod["containers"]} == {str(leave_ms)}
        # It waits so long for the coordinator, and then again for its own batches.
        assert least <= pod["terminationGracePeriodSeconds"] <= least + 15


def test_every_port_listens_where_pods_are_reached():
    for host in ("0.0.0.0", "[::]"):
        rendered = chart.render(chart.merged(chart.values("tls"), {"listenHost": host}))
        for pod in (rendered.coordinator(), rendered.workers()):
            for container in pod["spec"]["containers"]:
                addresses = [a.partition("=")[2] for a in container["args"] if "listen=" in a]
                assert addresses
                assert {a.rpartition(":")[0] for a in addresses} == {host}


def test_no_affinity_at_all_leaves_the_rule_that_pods_never_share_a_node():
    values = chart.merged(chart.values("cpu"), {"workers": {"affinity": None}})
    anti = chart.render(values).workers()["spec"]["affinity"]["podAntiAffinity"]
    assert anti["requiredDuringSchedulingIgnoredDuringExecution"]


def test_further_affinity_stands_beside_the_rule_that_pods_never_share_a_node(rendered):
    anti = rendered.workers()["spec"]["affinity"]["podAntiAffinity"]
    rules = anti["requiredDuringSchedulingIgnoredDuringExecution"]
    own = [r for r in rules if r["labelSelector"]["matchLabels"].get("app.kubernetes.io/name")]
    assert [r["topologyKey"] for r in own] == ["kubernetes.io/hostname"]
    labels = rendered.workers()["metadata"]["labels"]
    assert chart.selects(own[0]["labelSelector"]["matchLabels"], labels)
    given = chart.render(chart.values("tls")).workers()["spec"]["affinity"]
    assert given["nodeAffinity"] == chart.values("tls")["workers"]["affinity"]["nodeAffinity"]
    rules = given["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert len(rules) == 2 and rules[0]["labelSelector"] == {"matchLabels": {"noisy": "true"}}


def test_image_is_named_by_its_digest_where_there_is_one():
    digest = "sha256:" + 64 * "a"
    for image, name in (
        ({"repository": "r/epserve", "tag": "1"}, "r/epserve:1"),
        ({"repository": "r/epserve", "tag": "1", "digest": digest}, f"r/epserve@{digest}"),
    ):
        rendered = chart.render(chart.merged(chart.values("cpu"), {"image": image}))
        for pod in rendered.pods().values():
            assert {container["image"] for container in pod["spec"]["containers"]} == {name}


def test_what_is_said_of_the_front_door_is_said_of_no_other_service():
    services = chart.render(chart.values("tls")).of("Service")
    by_type = {s["metadata"]["name"]: s["spec"] for s in services}
    (front,) = [s for s in by_type.values() if s.get("type") == "LoadBalancer"]
    assert front["externalTrafficPolicy"] == "Local"
    assert front["loadBalancerClass"] == "example.com/balancer"
    assert front["loadBalancerSourceRanges"] == ["192.0.2.0/24"]
    assert len([s for s in by_type.values() if "externalTrafficPolicy" in s]) == 1


def test_coordinator_has_the_environment_that_it_is_given():
    (given,) = chart.render(chart.values("tls")).coordinator()["spec"]["containers"]
    assert given["env"] == [{"name": "GRPC_VERBOSITY", "value": "error"}]
    (bare,) = chart.render(chart.values("cpu")).coordinator()["spec"]["containers"]
    assert "env" not in bare


def test_workers_are_replaced_as_told():
    for name, strategy in (("cpu", "RollingUpdate"), ("tls", "OnDelete")):
        spec = chart.render(chart.values(name)).one("StatefulSet")["spec"]
        assert spec["updateStrategy"] == {"type": strategy}


def test_cuda_shared_memory_takes_the_hosts_namespaces_for_workers_alone():
    off = chart.render(chart.merged(chart.values("gpu"), {"cudaSharedMemory": {"enabled": False}}))
    for rendered, on in ((chart.render(chart.values("gpu")), True), (off, False)):
        for name, pod in rendered.pods().items():
            shared = {pod["spec"].get("hostIPC", False), pod["spec"].get("hostPID", False)}
            assert shared == {on and name == "worker"}, name
        (coordinator,) = rendered.coordinator()["spec"]["containers"]
        assert ("--allow-client-shm" in coordinator["args"]) is on
