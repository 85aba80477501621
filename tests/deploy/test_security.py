"""What the chart's pods may do, and who may reach them."""

import pytest

import chart

# Of the restricted Pod Security Standard: the kinds of volumes that it allows.
RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def restricted_violations(spec):
    """What the restricted Pod Security Standard forbids of a pod."""
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    for volume in spec.get("volumes", []):
        found += [f"volume {k}" for k in volume if k != "name" and k not in RESTRICTED_VOLUMES]
    pod = spec.get("securityContext", {})
    for container in spec["containers"] + spec.get("initContainers", []):
        name, own = container["name"], container.get("securityContext", {})
        context = {**pod, **own}
        if own.get("privileged"):
            found.append(f"{name} privileged")
        if own.get("allowPrivilegeEscalation") is not False:
            found.append(f"{name} allowPrivilegeEscalation")
        if context.get("runAsNonRoot") is not True or context.get("runAsUser") == 0:
            found.append(f"{name} runAsNonRoot")
        if context.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            found.append(f"{name} seccompProfile")
        capabilities = own.get("capabilities", {})
        if "ALL" not in capabilities.get("drop", []):
            found.append(f"{name} capabilities")
        if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            found.append(f"{name} added capabilities")
        found += [f"{name} hostPort" for port in container.get("ports", []) if "hostPort" in port]
    return found


@pytest.mark.parametrize("value_set", chart.VALUE_SETS)
def test_pods_pass_the_restricted_standard_but_for_what_the_values_say(value_set):
    given = chart.values(value_set)
    allowed = ["volume hostPath"] if given["checkpoint"].get("hostPath") else []
    for name, pod in chart.render(given).pods().items():
        shares = name == "worker" and given.get("cudaSharedMemory", {}).get("enabled")
        namespaces = ["hostPID", "hostIPC"] if shares else []
        assert restricted_violations(pod["spec"]) == namespaces + allowed, name


@pytest.mark.parametrize(
    "changes, violation",
    [
        ({"securityContext": {"capabilities": {"drop": ["NET_RAW"]}}}, "capabilities"),
        ({"securityContext": {"allowPrivilegeEscalation": True}}, "allowPrivilegeEscalation"),
        ({"podSecurityContext": {"runAsUser": 0}}, "runAsNonRoot"),
        ({"podSecurityContext": {"seccompProfile": {"type": "Unconfined"}}}, "seccompProfile"),
    ],
    ids=str,
)
def test_a_lowered_guard_would_be_found(changes, violation):
    rendered = chart.render(chart.merged(chart.values("cpu"), changes))
    for pod in rendered.pods().values():
        found = restricted_violations(pod["spec"])
        assert found and all(violation in each for each in found)


@pytest.mark.parametrize("value_set", chart.VALUE_SETS)
def test_nothing_is_written_but_shared_memory_and_no_token_is_mounted(value_set):
    for pod in chart.render(chart.values(value_set)).pods().values():
        assert pod["spec"]["automountServiceAccountToken"] is False
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            writable = [m for m in container["volumeMounts"] if not m.get("readOnly")]
            assert {m["mountPath"] for m in writable} <= {"/dev/shm"}
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"]["cpu"]


class Policies:
    """Which labelled pods the network policies let speak to each other, and at which ports."""

    def __init__(self, rendered):
        self.policies = [p["spec"] for p in rendered.of("NetworkPolicy")]

    @staticmethod
    def peer_matches(peer, labels, namespace):
        if "namespaceSelector" in peer:
            # The tests' namespaces have their names' label alone.
            wanted = peer["namespaceSelector"].get("matchLabels", {})
            if not chart.selects(wanted, {"kubernetes.io/metadata.name": namespace}):
                return False
        elif namespace != chart.NAMESPACE:
            return False
        selector = peer.get("podSelector", {})
        return chart.selects(selector.get("matchLabels", {}), labels) and all(
            expression["operator"] == "In" and labels.get(expression["key"]) in expression["values"]
            for expression in selector.get("matchExpressions", [])
        )

    def allows(self, direction, own, other, port, namespace=chart.NAMESPACE):
        types = {"ingress": "Ingress", "egress": "Egress"}
        for policy in self.policies:
            if types[direction] not in policy["policyTypes"]:
                continue
            if not chart.selects(policy["podSelector"]["matchLabels"], own):
                continue
            return any(
                ("ports" not in rule or port in [p["port"] for p in rule["ports"]])
                and any(
                    self.peer_matches(peer, other, namespace)
                    for peer in rule.get("from", rule.get("to", [{}]))
                )
                for rule in policy[direction]
            )
        return True  # No policy is about this pod.


@pytest.mark.parametrize("value_set", ["cpu", "gpu", "nodes"])
def test_network_policies_let_in_who_is_meant_and_nobody_else(value_set):
    rendered = chart.render(chart.values(value_set))
    policies = Policies(rendered)
    pods = {name: pod["metadata"]["labels"] for name, pod in rendered.pods().items()}
    coordinator, worker = pods["coordinator"], pods["worker"]
    frontend, stranger = {"epserve-client": "true"}, {"app": "stranger"}
    for allowed in (worker, pods["test"], frontend):
        assert policies.allows("ingress", coordinator, allowed, 8001)
        assert not policies.allows("ingress", coordinator, allowed, 8002)
    assert not policies.allows("ingress", coordinator, stranger, 8001)
    assert not policies.allows("ingress", coordinator, frontend, 8001, namespace="other")
    assert policies.allows("ingress", coordinator, stranger, 8002, namespace="monitoring")
    assert not policies.allows("ingress", coordinator, stranger, 8001, namespace="monitoring")
    another = {**worker, "app.kubernetes.io/instance": "another"}
    assert not policies.allows("ingress", coordinator, another, 8001)

    assert policies.allows("egress", worker, coordinator, 8001)
    assert policies.allows("egress", worker, stranger, 53)
    assert not policies.allows("egress", worker, stranger, 443)
    assert not policies.allows("egress", coordinator, stranger, 443)
    # NCCL picks its ports; without it workers dial nobody but the coordinator.
    among_workers = value_set == "nodes"
    assert policies.allows("ingress", worker, worker, 40000) is among_workers
    assert policies.allows("egress", worker, worker, 40000) is among_workers
    assert not policies.allows("ingress", worker, frontend, 40000)


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort", "LoadBalancer"])
def test_notes_warn_of_callers_from_outside_whom_the_policy_keeps_out(kind):
    warning = f"No caller from outside the cluster gets through the {kind}"

    def notes(**policy):
        changes = {"service": {"type": kind}, "networkPolicy": policy}
        return chart.render(chart.merged(chart.values("cpu"), changes)).notes

    assert (warning in notes()) is (kind != "ClusterIP")
    assert warning not in notes(enabled=False)
    assert warning not in notes(frontends=[{"ipBlock": {"cidr": "192.0.2.0/24"}}])
