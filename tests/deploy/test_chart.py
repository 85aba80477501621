"""The chart, rendered for several sets of values: valid objects that fit each other."""

import re

import helm_python
import helm_python.chart
import kubernetes_validate
import pytest
import yaml

import chart

OLDEST = "1.29"  # Chart.yaml's kubeVersion.
NEWEST = "1.37"
# Their schemas are their operators', not Kubernetes'.
CUSTOM = {"ServiceMonitor", "PrometheusRule", "LeaderWorkerSet"}
TLS = {
    "tls": {
        "enabled": True,
        "secretName": "coordinator",
        "workerSecretName": "worker",
        "operatorSecretName": "operator",
    }
}
NCCL = {"backend": "nccl", "gpu": {"allocation": "dra"}}


@pytest.fixture(scope="module", params=chart.VALUE_SETS)
def value_set(request):
    return request.param


@pytest.fixture(scope="module")
def rendered(value_set):
    return chart.render(chart.values(value_set))


def validate(manifest):
    # Shared claims are the one thing that the oldest version does not know.
    text = yaml.safe_dump(manifest)
    new = manifest["kind"] == "ResourceClaimTemplate" or "resourceClaimTemplateName" in text
    for version in [NEWEST] if new else [OLDEST, NEWEST]:
        assert kubernetes_validate.validate(manifest, version, strict=True) == version


def test_there_are_at_least_four_value_sets():
    assert len(chart.VALUE_SETS) >= 4
    assert chart.load().metadata["kubeVersion"] == f">={OLDEST}.0-0"


def test_helm_finds_nothing_to_complain_about(value_set):
    report = helm_python.chart.lint(chart.CHART_DIR, chart.values(value_set), strict=True)
    assert report["total_charts_linted"] == 1
    assert report["errors"] == []
    assert [m for m in report["messages"] if m["severity"] > 1] == []


def test_every_object_is_valid_for_kubernetes(rendered):
    names = [(o["kind"], o["metadata"]["name"]) for o in rendered.objects]
    assert len(names) == len(set(names))
    for each in rendered.objects:
        if each["kind"] not in CUSTOM:
            validate(each)
    # The pods inside of custom resources.
    validate({"apiVersion": "v1", "kind": "PodTemplate", "template": rendered.workers()})


def test_a_field_that_kubernetes_does_not_know_would_be_found(rendered):
    broken = rendered.one("Deployment")
    template = chart.merged(broken["spec"]["template"], {"spec": {"gracePeriod": 3}})
    broken = chart.merged(broken, {"spec": {"template": template}})
    with pytest.raises(kubernetes_validate.ValidationError, match="gracePeriod"):
        validate(broken)


def test_selectors_select_the_pods_they_mean(rendered):
    pods = {name: pod["metadata"]["labels"] for name, pod in rendered.pods().items()}

    def selected(selector):
        return {name for name, labels in pods.items() if chart.selects(selector, labels)}

    services = {s["metadata"]["name"]: s["spec"] for s in rendered.of("Service")}
    for name, spec in services.items():
        meant = "worker" if name.endswith("-workers") else "coordinator"
        assert selected(spec["selector"]) == {meant}, name
    for each in rendered.of("PodDisruptionBudget") + rendered.of("NetworkPolicy"):
        spec = each["spec"]
        selector = spec.get("selector", spec.get("podSelector"))["matchLabels"]
        assert len(selected(selector)) == 1, each["metadata"]["name"]
    assert selected(rendered.one("Deployment")["spec"]["selector"]["matchLabels"]) == {
        "coordinator"
    }
    for each in rendered.of("StatefulSet"):
        assert selected(each["spec"]["selector"]["matchLabels"]) == {"worker"}
        assert each["spec"]["serviceName"] in services


def test_workers_come_through_a_service_that_does_not_wait_for_them(rendered):
    (coordinator,) = rendered.coordinator()["spec"]["containers"]
    control = rendered.one("Service", "-control")
    assert control["spec"]["publishNotReadyAddresses"] is True
    ports = {p["name"]: p["port"] for p in control["spec"]["ports"]}
    for worker in rendered.workers()["spec"]["containers"]:
        address = f"{control['metadata']['name']}:{ports['grpc']}"
        assert chart.flag(worker, "--coordinator") == address
    assert chart.flag(coordinator, "--listen").endswith(f":{ports['grpc']}")
    # Callers are kept away until the service is ready.
    front = rendered.one("Service", chart.flag(coordinator, "--cluster-id"))
    assert "publishNotReadyAddresses" not in front["spec"]
    (verify,) = rendered.verify()["spec"]["containers"]
    assert chart.flag(verify, "--server") == f"{front['metadata']['name']}:{ports['grpc']}"


def test_coordinator_and_workers_agree(value_set, rendered):
    given = chart.load().merge_values(chart.values(value_set))
    workers = rendered.workers()["spec"]["containers"]
    assert len(workers) == given["workers"]["perPod"]
    (coordinator,) = rendered.coordinator()["spec"]["containers"]
    ranks = given["workers"]["pods"] * len(workers) - given["workers"]["standbys"]
    assert chart.flag(coordinator, "--workers") == str(ranks)
    for name in ("--cluster-id", "--max-batch-tokens", "--slots"):
        assert {chart.flag(w, name) for w in workers} == {chart.flag(coordinator, name)}, name
    assert [chart.flag(w, "--worker-id") for w in workers] == [
        f"$(POD_NAME)-w{i}" for i in range(len(workers))
    ]
    assert {chart.flag(w, "--backend") for w in workers} == {given["backend"]}


PROBES = {"startupProbe": "liveness", "readinessProbe": "readiness", "livenessProbe": "liveness"}


def test_probes_ask_what_the_programs_answer(value_set, rendered):
    (coordinator,) = rendered.coordinator()["spec"]["containers"]
    workers = rendered.workers()["spec"]["containers"]
    asked = {container["name"]: "--health-listen" for container in workers}
    # Health checks of a coordinator without TLS come to the port of everything else.
    asked["coordinator"] = "--health-listen" if "tls" in value_set else "--listen"
    ports = []
    for container in [coordinator, *workers]:
        listens = chart.flag(container, asked[container["name"]])
        port = int(listens.rpartition(":")[2])
        assert {kind: container[kind]["grpc"]["service"] for kind in PROBES} == PROBES
        assert {container[kind]["grpc"]["port"] for kind in PROBES} == {port}
        assert port in [each["containerPort"] for each in container["ports"]]
        ports += [port] if container in workers else []
    assert len(set(ports)) == len(workers)  # A pod's containers share its ports.


def readme_flags(program):
    """The flags in a table of the README."""
    text = (chart.ROOT / "README.md").read_text()
    section = re.split(rf"(?m)^### .*\b{program}\b.*$", text)[1].split("\n#")[0]
    cells = re.findall(r"(?m)^\|([^|]*)\|", section)
    return set(re.findall(r"--[a-z][a-z0-9-]*", " ".join(cells)))


def test_programs_know_their_flags(rendered):
    tables = {"coordinator": "epserve-coordinator", "worker": "epserve-worker", "test": "verify"}
    for name, pod in rendered.pods().items():
        known = readme_flags(tables[name])
        assert len(known) > 5
        for container in pod["spec"]["containers"]:
            given = {word.partition("=")[0] for word in container["args"] if word[0] == "-"}
            assert given - known == set()


def test_long_names_stay_within_limits():
    rendered = chart.render(chart.values("cpu"), name="r" * 53)
    for each in rendered.objects:
        limit = 52 if each["kind"] == "StatefulSet" else 63
        assert len(each["metadata"]["name"]) <= limit, each["metadata"]["name"]
    # A worker's id: its pod's name, which is its set's and an ordinal, and its number.
    workers = rendered.one("StatefulSet")["metadata"]["name"]
    assert len(f"{workers}-0-99-w63") <= 64


def test_identities_are_apart_under_tls():
    rendered = chart.render(chart.values("tls"))
    secrets = {}
    for name, pod in rendered.pods().items():
        (volume,) = [v for v in pod["spec"]["volumes"] if v["name"] == "tls"]
        secrets[name] = volume["secret"]["secretName"]
        for container in pod["spec"]["containers"]:
            assert {chart.flag(container, f) for f in ("--tls-cert", "--tls-key", "--tls-ca")} == {
                f"/etc/epserve/tls/{file}" for file in ("tls.crt", "tls.key", "ca.crt")
            }
            assert "--insecure" not in container["args"]
    assert secrets == {
        "coordinator": "epserve-coordinator-tls",
        "worker": "epserve-worker-tls",
        "test": "epserve-operator-tls",
    }
    (coordinator,) = rendered.coordinator()["spec"]["containers"]
    assert "--plaintext-metrics" not in coordinator["args"]
    plain = chart.render(chart.values("cpu"))
    assert "tls" not in str([pod["spec"] for pod in plain.pods().values()])
    assert "--insecure" in plain.coordinator()["spec"]["containers"][0]["args"]
    assert "plaintext" in plain.notes


def test_each_part_sees_its_own_shared_secret():
    rendered = chart.render(chart.values("secrets"))
    keys = {}
    for name, pod in rendered.pods().items():
        (volume,) = [v for v in pod["spec"]["volumes"] if v["name"] == "shared-secret"]
        (item,) = volume["secret"]["items"]
        keys[name] = item["key"]
        flag = "--secrets-file" if name == "coordinator" else "--secret-file"
        for container in pod["spec"]["containers"]:
            (mount,) = [m for m in container["volumeMounts"] if m["name"] == volume["name"]]
            assert chart.flag(container, flag) == f"{mount['mountPath']}/{item['path']}"
    assert keys == {"coordinator": "secrets", "worker": "worker", "test": "operator"}
    (coordinator,) = rendered.coordinator()["spec"]["containers"]
    assert "--insecure" not in coordinator["args"]


@pytest.mark.parametrize(
    "name, changes, limit",
    [("cpu", {}, None), ("gpu", {}, "0.01"), ("gpu", {"test": {"maxError": 0.06}}, "0.06")],
    ids=str,
)
def test_verify_allows_the_backends_error(name, changes, limit):
    rendered = chart.render(chart.merged(chart.values(name), changes))
    assert chart.flag(rendered.verify()["spec"]["containers"][0], "--max-error") == limit


def test_gpus_of_a_pod_are_seen_by_all_of_its_containers():
    shared = chart.render(chart.values("gpu"))
    pod = shared.workers()["spec"]
    claim = shared.one("ResourceClaimTemplate")
    (request,) = claim["spec"]["spec"]["devices"]["requests"]
    assert request["exactly"]["count"] == len(pod["containers"]) == 8
    (named,) = pod["resourceClaims"]
    assert named["resourceClaimTemplateName"] == claim["metadata"]["name"]
    assert all(c["resources"]["claims"] == [{"name": named["name"]}] for c in pod["containers"])
    assert [chart.flag(c, "--device") for c in pod["containers"]] == [str(i) for i in range(8)]

    pod = chart.render(chart.values("nodes")).workers()["spec"]
    limits = [c["resources"]["limits"].get("nvidia.com/gpu") for c in pod["containers"]]
    assert limits == [4] + 3 * [None]
    env = [{e["name"]: e.get("value") for e in c["env"]} for c in pod["containers"]]
    assert [e.get("NVIDIA_VISIBLE_DEVICES") for e in env] == [None] + 3 * ["all"]
    assert pod["runtimeClassName"] == "nvidia"


def test_host_workers_share_one_dev_shm(rendered):
    pod = rendered.workers()["spec"]
    (volume,) = [v for v in pod["volumes"] if v["name"] == "shm"]
    assert volume["emptyDir"]["medium"] == "Memory"
    for container in pod["containers"]:
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"checkpoint": {"existingClaim": ""}}, "checkpoint"),
        ({"checkpoint": {"hostPath": "/models"}}, "checkpoint"),
        ({"checkpoint": {"subPath": "/absolute"}}, "subPath"),
        ({"workers": {"pods": 2}}, "pods"),
        ({"workers": {"perPod": 0}}, "perPod"),
        ({"workers": {"perPod": 65}}, "perPod"),
        ({"workers": {"leaderWorkerSet": {"enabled": True}}}, "enabled"),
        ({"workers": {"extraArgs": ["-x"]}}, "extraArgs"),
        ({"cudaSharedMemory": {"enabled": True}}, "backend"),
        ({**NCCL, "cudaSharedMemory": {"enabled": True}, "workers": {"pods": 2}}, "pods"),
        ({"listenHost": "::"}, "listenHost"),
        ({"image": {"digest": "sha256:abc"}}, "digest"),
        ({"service": {"externalTrafficPolicy": "Local"}}, "externalTrafficPolicy"),
        ({"service": {"type": "NodePort", "loadBalancerClass": "x"}}, "loadBalancerClass"),
        ({"workers": {"updateStrategy": "Recreate"}}, "updateStrategy"),
        ({"workers": {"leaveTimeoutMs": -1}}, "leaveTimeoutMs"),
        ({"workers": {"leaveTimeoutMs": None}}, "leaveTimeoutMs"),
        ({"workers": {"updateStrategy": None}}, "updateStrategy"),
        ({"listenHost": None}, "listenHost"),
        ({"backend": "mpi"}, "backend"),
        ({"backend": "cuda"}, "allocation"),
        ({"backend": "cuda", "gpu": {"allocation": "dra"}, "workers": {"perPod": 9}}, "perPod"),
        ({"tls": {"enabled": True}}, "secretName"),
        ({"tls": {**TLS["tls"], "workerSecretName": ""}}, "workerSecretName"),
        ({"tls": {**TLS["tls"], "operatorSecretName": ""}}, "operatorSecretName"),
        ({**TLS, "sharedSecrets": {"secretName": "secrets"}}, "sharedSecrets/secretName"),
        ({"fullnameOverride": "123"}, "fullnameOverride"),
        ({"fullnameOverride": "a: b"}, "fullnameOverride"),
        ({"nameOverride": "Mix"}, "nameOverride"),
        ({"model": {"name": "mix\n  injected: true"}}, "model"),
        ({"checkpoint": {"existingClaim": "models #1"}}, "existingClaim"),
        ({"checkpoint": {"subPath": "a\nb"}}, "subPath"),
        ({"sharedSecrets": {"secretName": "a, key: b"}}, "secretName"),
        ({"serviceAccount": {"name": "a\nb"}}, "serviceAccount"),
        ({"workers": {"podLabels": {"app.kubernetes.io/component": "test"}}}, "podLabels"),
        ({"coordinator": {"podLabels": {"app.kubernetes.io/instance": "x"}}}, "podLabels"),
        ({"monitoring": {"serviceMonitor": {"labels": {"helm.sh/chart": "x"}}}}, "labels"),
        ({"slots": 17}, "slots"),
        ({"workers": {"extraArgs": ["--comm-blocks 24"]}}, "extraArgs"),
        ({"coordinator": {"leaseMs": "1s"}}, "leaseMs"),
        ({"workers": {"replicas": 3}}, "replicas"),
        ({"worker": {}}, "worker"),
    ],
    ids=str,
)
def test_schema_refuses(changes, named):
    with pytest.raises(helm_python.HelmError, match=named):
        chart.render(chart.merged(chart.values("cpu"), changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"workers": {"standbys": 4}}, "workers.standbys 4 leaves no rank"),
        ({"maxBatchTokens": 7}, "maxBatchTokens 7 is below 8"),
        ({"coordinator": {"metricsPort": 8001}}, "metricsPort 8001 is coordinator.port too"),
        ({**TLS, "coordinator": {"healthPort": 8001}}, "healthPort 8001 is coordinator.port too"),
        ({**TLS, "coordinator": {"healthPort": 8002}}, "healthPort 8002 .*metricsPort too"),
        ({"coordinator": {"extraArgs": ["--slots=3"]}}, "coordinator.extraArgs has --slots,"),
        ({"coordinator": {"extraArgs": ["--tls-ca=/x"]}}, "coordinator.extraArgs has --tls-ca,"),
        ({"workers": {"extraArgs": ["--slots=3"]}}, "workers.extraArgs has --slots,"),
        ({"workers": {"extraArgs": ["--device=1"]}}, "workers.extraArgs has --device,"),
        ({**NCCL, "workers": {"pods": 2, "perPod": 8}}, "16 ranks, above the 8 of backend nccl"),
        ({**NCCL, "workers": {"pods": 9, "perPod": 1}}, "9 ranks, above the 8 of backend nccl"),
    ],
    ids=str,
)
def test_templates_refuse_what_the_coordinator_would(changes, message):
    with pytest.raises(helm_python.HelmError, match=message):
        chart.render(chart.merged(chart.values("cpu"), changes))


GIB = 1 << 30


@pytest.mark.parametrize("text", ["mix #1", "a: b", "123", "true", "- {x", '"quoted" \\n', "ä"])
def test_strings_arrive_as_they_were_written(text):
    changes = {
        "model": {"name": text},
        "checkpoint": {"existingClaim": "", "hostPath": f"/srv/{text}", "subPath": text},
    }
    rendered = chart.render(chart.merged(chart.values("cpu"), changes))
    for pod, name in ((rendered.coordinator(), "--model-name"), (rendered.verify(), "--model")):
        (container,) = pod["spec"]["containers"]
        assert chart.flag(container, name) == text
    for pod in rendered.pods().values():
        (volume,) = [v for v in pod["spec"]["volumes"] if v["name"] == "checkpoint"]
        assert volume["hostPath"]["path"] == f"/srv/{text}"
        for container in pod["spec"]["containers"]:
            (mount,) = [m for m in container["volumeMounts"] if m["name"] == "checkpoint"]
            assert mount["subPath"] == text


def texts(node):
    """All that Kubernetes takes as text and yet may look like a number or a truth value."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("name", "claimName", "secretName", "serviceAccountName", "interval"):
                yield key, value
            elif key in ("priorityClassName", "labels", "matchLabels"):
                yield from value.items() if isinstance(value, dict) else [(key, value)]
            if key not in ("labels", "matchLabels"):
                yield from texts(value)
    elif isinstance(node, list):
        for each in node:
            yield from texts(each)


@pytest.mark.parametrize("name", ["123", "on", "null", "1e3", "0x1f"])
def test_names_that_look_like_something_else_stay_names(name):
    tls = {"enabled": True, "secretName": name, "workerSecretName": name}
    changes = {
        "checkpoint": {"existingClaim": name},
        "fullnameOverride": name if name.isalpha() else "experts",
        "serviceAccount": {"name": name},
        "workers": {"priorityClassName": name, "podLabels": {"team": name}},
        "coordinator": {"priorityClassName": name},
        "tls": {**tls, "operatorSecretName": name},
        "monitoring": {"serviceMonitor": {"enabled": True, "tlsSecretName": name}},
    }
    rendered = chart.render(chart.merged(chart.values("cpu"), changes), name=name)
    found = [each for o in rendered.objects for each in texts(o)]
    assert len(found) > 50
    assert [(key, value) for key, value in found if not isinstance(value, str)] == []
    secrets = chart.merged(chart.values("cpu"), {"sharedSecrets": {"secretName": name}})
    secrets = chart.merged(secrets, {"monitoring": {"serviceMonitor": {"enabled": True}}})
    found = [each for o in chart.render(secrets).objects for each in texts(o)]
    assert [(key, value) for key, value in found if not isinstance(value, str)] == []


def test_a_release_whose_name_no_service_may_have_is_refused():
    with pytest.raises(helm_python.HelmError, match='"123-epserve" is no name of a Service'):
        chart.render(chart.values("cpu"), name="123")
    chart.render(chart.merged(chart.values("cpu"), {"fullnameOverride": "experts"}), name="123")


@pytest.mark.parametrize(
    "memory, most",
    [
        ("2Gi", GIB),
        ("3G", 3 * 10**9 - GIB),
        ("1.5Gi", GIB // 2),
        ("2e9", 2 * 10**9 - GIB),
        (2 * GIB, GIB),
        (str(2 * GIB), GIB),
    ],
    ids=str,
)
def test_what_requests_hold_fits_the_coordinators_memory(memory, most):
    def rendered(held):
        coordinator = {"maxHeldBytes": held, "resources": {"limits": {"memory": memory}}}
        return chart.render(chart.merged(chart.values("cpu"), {"coordinator": coordinator}))

    (coordinator,) = rendered(most).coordinator()["spec"]["containers"]
    assert chart.flag(coordinator, "--max-held-bytes") == str(most)
    with pytest.raises(helm_python.HelmError, match=f"maxHeldBytes {most + 1} and 1 GiB .* exceed"):
        rendered(most + 1)


def test_without_a_limit_requests_may_hold_any_amount_and_a_wrong_one_is_named():
    unlimited = {"maxHeldBytes": 1 << 40, "resources": {"limits": {"memory": None}}}
    rendered = chart.render(chart.merged(chart.values("cpu"), {"coordinator": unlimited}))
    (coordinator,) = rendered.coordinator()["spec"]["containers"]
    assert chart.flag(coordinator, "--max-held-bytes") == str(1 << 40)
    for wrong in ("2GiB", "Gi"):
        changes = {"coordinator": {"resources": {"limits": {"memory": wrong}}}}
        with pytest.raises(helm_python.HelmError, match="is not a quantity of bytes"):
            chart.render(chart.merged(chart.values("cpu"), changes))


def test_further_flags_come_after_the_charts_own():
    prefixes = ["--shm-key-prefix=a #b", "--shm-key-prefix=c", "--allow-client-shm"]
    changes = {
        "coordinator": {"extraArgs": prefixes, "healthPort": 8001},  # Of no port without TLS.
        "workers": {"extraArgs": ["--busy-poll-us=5"]},
    }
    rendered = chart.render(chart.merged(chart.values("cpu"), changes))
    assert rendered.coordinator()["spec"]["containers"][0]["args"][-3:] == prefixes
    for worker in rendered.workers()["spec"]["containers"]:
        assert worker["args"][-1] == "--busy-poll-us=5"


def test_large_numbers_are_written_out():
    million = 1000000
    changes = {
        "maxBatchTokens": 16 * million,
        "coordinator": {"queueCapacity": million, "leaseMs": 2 * million},
        "test": {"batches": million, "tokens": 20 * million, "timeoutSeconds": million},
    }
    rendered = chart.render(chart.merged(chart.values("cpu"), changes))
    for pod in rendered.pods().values():
        for container in pod["spec"]["containers"]:
            assert [a for a in container["args"] if re.search(r"=[0-9.]+e[+-]?[0-9]", a)] == []
    (verify,) = rendered.verify()["spec"]["containers"]
    assert chart.flag(verify, "--batches") == chart.flag(verify, "--timeout") == "1000000"
    assert chart.flag(verify, "--tokens") == "16000000"  # A request takes no more.
    (verify,) = chart.render(chart.values("cpu")).verify()["spec"]["containers"]
    assert chart.flag(verify, "--tokens") == "16"


@pytest.mark.parametrize(
    "changes, ranks",
    [
        ({"workers": {"perPod": 64}, "maxBatchTokens": 128}, "64"),
        ({**NCCL, "workers": {"pods": 2, "perPod": 4}}, "8"),
        ({**NCCL, "workers": {"pods": 3, "perPod": 3, "standbys": 1}}, "8"),
    ],
    ids=str,
)
def test_as_many_ranks_as_the_backend_takes_are_rendered(changes, ranks):
    rendered = chart.render(chart.merged(chart.values("cpu"), changes))
    (coordinator,) = rendered.coordinator()["spec"]["containers"]
    assert chart.flag(coordinator, "--workers") == ranks
