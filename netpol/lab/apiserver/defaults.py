"""What the API server fills in for the kinds that the lab serves, and cluster IPs and node ports.

Owns defaults and allocation. Refuses nothing but addresses that cannot be had; checks stand in
`validate.py`.
"""

from collections.abc import Callable, Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any

from netpol.lab.apiserver.errors import Cause, Obj
from netpol.lab.apiserver.resources import Resource

# kube-apiserver's --service-node-port-range.
NODE_PORTS = range(30000, 32768)
_MAX_PROBES = 1 << 16  # addresses tried before a service range counts as full


def apply(resource: Resource, obj: Obj, old: Obj | None) -> Obj:
    """Return the object with the defaults of its kind filled in; the argument is consumed."""
    filler = _FILLERS.get(resource.key)
    if filler is not None:
        filler(obj, old)
    if resource.custom and resource.schema:
        _fill_schema(obj, resource.schema)
    return obj


def _section(obj: Obj, name: str) -> Obj:
    section = obj.get(name)
    if not isinstance(section, dict):
        section = obj[name] = {}
    return section


def _items(section: Obj, name: str) -> Iterator[Obj]:
    for item in section.get(name) or ():
        if isinstance(item, dict):
            yield item


def _namespace(obj: Obj, old: Obj | None) -> None:
    meta = obj["metadata"]
    meta["labels"] = dict(meta.get("labels") or {}) | {"kubernetes.io/metadata.name": meta["name"]}
    if old is None:
        _section(obj, "spec").setdefault("finalizers", ["kubernetes"])
    _section(obj, "status").setdefault("phase", "Active")


def _pod(obj: Obj, old: Obj | None) -> None:
    _pod_spec(_section(obj, "spec"))
    spec = obj["spec"]
    if old is None:
        spec.setdefault("serviceAccountName", spec.get("serviceAccount") or "default")
        spec.setdefault("serviceAccount", spec["serviceAccountName"])
    status = _section(obj, "status")
    status.setdefault("phase", "Pending")
    status.setdefault("qosClass", _qos_class(spec))


def _pod_spec(spec: Obj) -> None:
    spec.setdefault("restartPolicy", "Always")
    spec.setdefault("dnsPolicy", "ClusterFirst")
    spec.setdefault("terminationGracePeriodSeconds", 30)
    spec.setdefault("schedulerName", "default-scheduler")
    spec.setdefault("securityContext", {})
    spec.setdefault("enableServiceLinks", True)
    for group in ("initContainers", "containers"):
        for container in _items(spec, group):
            image = str(container.get("image") or "")
            latest = ":" not in image.rpartition("/")[2] or image.endswith(":latest")
            container.setdefault("imagePullPolicy", "Always" if latest else "IfNotPresent")
            container.setdefault("terminationMessagePath", "/dev/termination-log")
            container.setdefault("terminationMessagePolicy", "File")
            container.setdefault("resources", {})
            for port in _items(container, "ports"):
                port.setdefault("protocol", "TCP")
                if spec.get("hostNetwork"):
                    port.setdefault("hostPort", port.get("containerPort"))


def _qos_class(spec: Obj) -> str:
    kinds = set()
    for container in _items(spec, "containers"):
        resources = container.get("resources") or {}
        limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
        if not limits and not requests:
            kinds.add("BestEffort")
        elif set(limits) >= {"cpu", "memory"} and (not requests or requests == limits):
            kinds.add("Guaranteed")
        else:
            kinds.add("Burstable")
    return kinds.pop() if len(kinds) == 1 else "Burstable" if kinds else "BestEffort"


def _service(obj: Obj, _old: Obj | None) -> None:
    spec = _section(obj, "spec")
    spec.setdefault("type", "ClusterIP")
    spec.setdefault("sessionAffinity", "None")
    if spec["sessionAffinity"] == "ClientIP":
        client = _section(_section(spec, "sessionAffinityConfig"), "clientIP")
        client.setdefault("timeoutSeconds", 10800)
    if spec["type"] != "ExternalName":
        spec.setdefault("internalTrafficPolicy", "Cluster")
    if spec["type"] in ("NodePort", "LoadBalancer"):
        spec.setdefault("externalTrafficPolicy", "Cluster")
    if spec["type"] == "LoadBalancer":
        spec.setdefault("allocateLoadBalancerNodePorts", True)
    for port in _items(spec, "ports"):
        port.setdefault("protocol", "TCP")
        if port.get("targetPort") in (None, "", 0):
            port["targetPort"] = port.get("port")
    _section(obj, "status").setdefault("loadBalancer", {})


def _endpoint_slice(obj: Obj, _old: Obj | None) -> None:
    obj.setdefault("endpoints", [])
    obj.setdefault("ports", [])
    for port in _items(obj, "ports"):
        port.setdefault("protocol", "TCP")
        port.setdefault("name", "")


def _network_policy(obj: Obj, _old: Obj | None) -> None:
    spec = _section(obj, "spec")
    if spec.get("podSelector") is None:
        spec["podSelector"] = {}
    for direction in ("ingress", "egress"):
        if spec.get(direction) == [] or (direction in spec and spec[direction] is None):
            del spec[direction]  # an empty list is not told from an absent one on the wire
        for rule in _items(spec, direction):
            for port in _items(rule, "ports"):
                port.setdefault("protocol", "TCP")
    if not spec.get("policyTypes"):
        spec["policyTypes"] = ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]


def _node(obj: Obj, _old: Obj | None) -> None:
    spec = _section(obj, "spec")
    if spec.get("podCIDR") and not spec.get("podCIDRs"):
        spec["podCIDRs"] = [spec["podCIDR"]]
    elif spec.get("podCIDRs") and not spec.get("podCIDR"):
        spec["podCIDR"] = spec["podCIDRs"][0]
    _section(obj, "status")


def _secret(obj: Obj, _old: Obj | None) -> None:
    import base64

    obj.setdefault("type", "Opaque")
    plain = obj.pop("stringData", None) or {}
    if plain:
        data = _section(obj, "data")
        for name, text in plain.items():
            data[name] = base64.b64encode(str(text).encode()).decode()


def _workload(obj: Obj, _old: Obj | None) -> None:
    spec = _section(obj, "spec")
    _pod_spec(_section(_section(spec, "template"), "spec"))
    _section(spec["template"], "metadata")
    spec.setdefault("revisionHistoryLimit", 10)
    if obj.get("kind") == "Deployment":
        spec.setdefault("replicas", 1)
        spec.setdefault("progressDeadlineSeconds", 600)
        spec.setdefault("strategy", {"type": "RollingUpdate"})
        rolling = {"maxUnavailable": "25%", "maxSurge": "25%"}
        if spec["strategy"].get("type") == "RollingUpdate":
            spec["strategy"].setdefault("rollingUpdate", rolling)
    else:
        spec.setdefault("updateStrategy", {"type": "RollingUpdate"})
        if spec["updateStrategy"].get("type") == "RollingUpdate":
            spec["updateStrategy"].setdefault("rollingUpdate", {"maxSurge": 0, "maxUnavailable": 1})
    _section(obj, "status")


def _binding(obj: Obj, _old: Obj | None) -> None:
    role = obj.get("roleRef")
    if isinstance(role, dict):
        role.setdefault("apiGroup", "rbac.authorization.k8s.io")
    for subject in _items(obj, "subjects"):
        kind = subject.get("kind")
        subject.setdefault(
            "apiGroup", "" if kind == "ServiceAccount" else "rbac.authorization.k8s.io"
        )
        if not subject["apiGroup"]:
            del subject["apiGroup"]


def _crd(obj: Obj, _old: Obj | None) -> None:
    spec = _section(obj, "spec")
    names = _section(spec, "names")
    kind = str(names.get("kind") or "")
    names.setdefault("singular", kind.lower())
    names.setdefault("listKind", f"{kind}List")
    spec.setdefault("conversion", {"strategy": "None"})
    at = obj["metadata"]["creationTimestamp"]
    conditions = [
        {
            "type": name,
            "status": "True",
            "lastTransitionTime": at,
            "reason": reason,
            "message": message,
        }
        for name, reason, message in (
            ("NamesAccepted", "NoConflicts", "no conflicts found"),
            ("Established", "InitialNamesAccepted", "the initial names have been accepted"),
        )
    ]
    versions = [one for one in _items(spec, "versions") if one.get("storage")]
    obj["status"] = {
        "conditions": conditions,
        "acceptedNames": dict(names),
        "storedVersions": [one.get("name") for one in versions],
    }


def _fill_schema(value: Any, schema: Any) -> None:
    """Fill in the defaults of an openAPIV3Schema."""
    if isinstance(value, dict):
        for name, below in (schema.get("properties") or {}).items():
            if name not in value and "default" in below:
                value[name] = below["default"]
            if name in value:
                _fill_schema(value[name], below)
        more = schema.get("additionalProperties")
        if isinstance(more, dict):
            for item in value.values():
                _fill_schema(item, more)
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for item in value:
            _fill_schema(item, schema["items"])


_FILLERS: dict[str, Callable[[Obj, Obj | None], None]] = {
    "namespaces": _namespace,
    "pods": _pod,
    "services": _service,
    "endpointslices.discovery.k8s.io": _endpoint_slice,
    "networkpolicies.networking.k8s.io": _network_policy,
    "nodes": _node,
    "secrets": _secret,
    "deployments.apps": _workload,
    "daemonsets.apps": _workload,
    "rolebindings.rbac.authorization.k8s.io": _binding,
    "clusterrolebindings.rbac.authorization.k8s.io": _binding,
    "customresourcedefinitions.apiextensions.k8s.io": _crd,
}


class ServiceAddresses:
    """Cluster IPs and node ports, each of which one Service has at a time.

    Args:
        cidrs: The service ranges, at most one per family, the primary first.
    """

    def __init__(self, cidrs: tuple[str, ...]) -> None:
        self._ranges: dict[str, IPv4Network | IPv6Network] = {
            f"IPv{network.version}": network for network in map(ip_network, cidrs)
        }
        self._used: set[str] = set()
        self._ports: set[tuple[str, int]] = set()
        self._next = dict.fromkeys(self._ranges, 10)  # the first ten are for well-known Services

    def assign(self, obj: Obj, old: Obj | None) -> list[Cause]:
        """Fill in addresses and node ports; what is filled in is not taken until `hold`."""
        spec = obj["spec"]
        if old is not None:
            for name in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"):
                if name in old["spec"] and not spec.get(name) and spec["type"] != "ExternalName":
                    spec[name] = old["spec"][name]
        if spec["type"] == "ExternalName":
            return []
        causes = self._families(spec)
        if causes:
            return causes
        own = set((old or {}).get("spec", {}).get("clusterIPs") or ())
        causes = self._addresses(spec, own)
        return causes or self._node_ports(spec, old)

    def _families(self, spec: Obj) -> list[Cause]:
        spec.setdefault("ipFamilyPolicy", "SingleStack")
        families = list(spec.get("ipFamilies") or ())
        for address in spec.get("clusterIPs") or [spec.get("clusterIP")]:
            if address and address != "None" and len(families) < len(spec.get("clusterIPs") or "1"):
                family = "IPv6" if ":" in str(address) else "IPv4"
                families += [family] if family not in families else []
        if not families:
            families = [next(iter(self._ranges))]
        if spec["ipFamilyPolicy"] != "SingleStack":
            families += [one for one in self._ranges if one not in families]
        missing = [one for one in families if one not in self._ranges]
        headless = spec.get("clusterIP") == "None"
        if missing and not headless:
            text = f'Invalid value: "{missing[0]}": not configured on this cluster'
            return [Cause("spec.ipFamilies[0]", "FieldValueInvalid", text)]
        if spec["ipFamilyPolicy"] == "RequireDualStack" and len(families) < 2:
            text = (
                'Invalid value: "RequireDualStack": this cluster is not configured for dual-stack'
            )
            return [Cause("spec.ipFamilyPolicy", "FieldValueInvalid", text)]
        spec["ipFamilies"] = families
        return []

    def _addresses(self, spec: Obj, own: set[str]) -> list[Cause]:
        given = list(spec.get("clusterIPs") or ())
        if not given and spec.get("clusterIP"):
            given = [spec["clusterIP"]]
        if given and spec.get("clusterIP") and given[0] != spec["clusterIP"]:
            text = f"Invalid value: {given}: first value must match `clusterIP`"
            return [Cause("spec.clusterIPs", "FieldValueInvalid", text)]
        if given[:1] == ["None"]:
            spec["clusterIP"], spec["clusterIPs"] = "None", ["None"]
            return []
        addresses = []
        for place, family in enumerate(spec["ipFamilies"]):
            address = given[place] if place < len(given) else self._free(family)
            field = f"spec.clusterIPs[{place}]"
            if address is None:
                text = f"Internal error: the range {self._ranges[family]} is full"
                return [Cause(field, "InternalError", text)]
            try:
                inside = ip_address(address) in self._ranges[family]
            except ValueError:
                text = f'Invalid value: "{address}": must be a valid IP address'
                return [Cause(field, "FieldValueInvalid", text)]
            if not inside or (address in self._used and address not in own):
                why = "already allocated" if inside else f"not in the range {self._ranges[family]}"
                text = f'Invalid value: ["{address}"]: failed to allocate IP {address}: {why}'
                return [Cause("spec.clusterIPs", "FieldValueInvalid", text)]
            addresses.append(address)
        spec["clusterIP"], spec["clusterIPs"] = addresses[0], addresses
        return []

    def _free(self, family: str) -> str | None:
        network = self._ranges[family]
        for _ in range(min(network.num_addresses, _MAX_PROBES)):
            offset = self._next[family]
            self._next[family] = offset + 1 if offset + 2 < network.num_addresses else 1
            address = str(network[offset % network.num_addresses])
            if address not in self._used:
                return address
        return None

    def _node_ports(self, spec: Obj, old: Obj | None) -> list[Cause]:
        wanted = spec["type"] in ("NodePort", "LoadBalancer")
        wanted = wanted and spec.get("allocateLoadBalancerNodePorts", True)
        known = {
            (port.get("port"), port.get("protocol")): port.get("nodePort")
            for port in ((old or {}).get("spec") or {}).get("ports") or ()
        }
        own = {(proto, number) for (_, proto), number in known.items()}
        taken: set[tuple[str, int]] = set()
        for place, port in enumerate(_items(spec, "ports")):
            proto = port["protocol"]
            if not wanted:
                if spec["type"] == "ClusterIP":
                    port.pop("nodePort", None)
                continue
            number = port.get("nodePort") or known.get((port.get("port"), proto))
            field = f"spec.ports[{place}].nodePort"
            if not number:
                free = (n for n in NODE_PORTS if (proto, n) not in self._ports | taken)
                number = next(free, None)
            if not isinstance(number, int) or number not in NODE_PORTS:
                text = f"Invalid value: {number}: provided port is not in the valid range"
                return [Cause(field, "FieldValueInvalid", text)]
            if (proto, number) in self._ports - own or (proto, number) in taken:
                text = f"Invalid value: {number}: provided port is already allocated"
                return [Cause(field, "FieldValueInvalid", text)]
            taken.add((proto, number))
            port["nodePort"] = number
        return []

    def hold(self, obj: Obj, old: Obj | None = None) -> None:
        """Take what a stored Service has, and free what it had before."""
        if old is not None:
            self.release(old)
        spec = obj["spec"]
        self._used.update(ip for ip in spec.get("clusterIPs") or () if ip != "None")
        self._ports.update(
            (port["protocol"], port["nodePort"])
            for port in _items(spec, "ports")
            if port.get("nodePort")
        )

    def release(self, obj: Obj) -> None:
        """Free what a removed Service had."""
        spec = obj["spec"]
        self._used.difference_update(spec.get("clusterIPs") or ())
        self._ports.difference_update(
            (port["protocol"], port["nodePort"])
            for port in _items(spec, "ports")
            if port.get("nodePort")
        )
