"""What the API server refuses of Pods, Services, EndpointSlices and Nodes.

Owns the rules that users meet when they write these by hand, and what may not change later.
"""

from ipaddress import ip_address, ip_network
from typing import Any

from netpol.lab.apiserver.causes import (
    dns_label,
    dns_subdomain,
    duplicate,
    labels,
    not_allowed,
    port_name,
    port_number,
    port_or_name,
    protocol,
    required,
    unsupported,
    wrong,
)
from netpol.lab.apiserver.errors import Cause, Obj

_RESTART = ("Always", "OnFailure", "Never")
_DNS = ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None")
_SERVICE_TYPES = ("ClusterIP", "ExternalName", "LoadBalancer", "NodePort")
_POLICIES = ("Cluster", "Local")
_ADDRESS_TYPES = ("FQDN", "IPv4", "IPv6")
_ENDPOINTS_MAX = 1000
_ADDRESSES_MAX = 100
# What may change in the spec of a Pod once it is stored.
_MUTABLE = ("activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds")


def pod(obj: Obj, old: Obj | None) -> list[Cause]:
    """Return what is wrong with a Pod after defaults."""
    spec = obj["spec"]
    causes = pod_spec("spec", spec)
    if old is not None and _fixed(spec) != _fixed(old["spec"]):
        names = "`spec.containers[*].image`, `spec.initContainers[*].image`, " + ", ".join(
            f"`spec.{name}`" for name in _MUTABLE
        )
        why = f"pod updates may not change fields other than {names}"
        causes.append(not_allowed("spec", why))
    return causes


def _fixed(spec: Obj) -> Obj:
    """Return the part of a Pod's spec that may not change."""
    fixed = {name: value for name, value in spec.items() if name not in _MUTABLE}
    for group in ("containers", "initContainers"):
        if group in fixed:
            fixed[group] = [
                {name: value for name, value in one.items() if name != "image"}
                for one in fixed[group]
            ]
    fixed.pop("ephemeralContainers", None)
    return fixed


def pod_spec(where: str, spec: Obj) -> list[Cause]:
    """Return what is wrong with the spec of a Pod or of a Pod template."""
    causes = []
    if not spec.get("containers"):
        causes.append(required(f"{where}.containers"))
    if spec.get("restartPolicy") not in _RESTART:
        field = f"{where}.restartPolicy"
        causes.append(unsupported(field, spec.get("restartPolicy"), _RESTART))
    if spec.get("dnsPolicy") not in _DNS:
        causes.append(unsupported(f"{where}.dnsPolicy", spec.get("dnsPolicy"), _DNS))
    if spec.get("nodeName"):
        causes += dns_subdomain(f"{where}.nodeName", spec["nodeName"])
    names: set[str] = set()
    for group in ("containers", "initContainers"):
        for place, one in enumerate(spec.get(group) or ()):
            field = f"{where}.{group}[{place}]"
            name = one.get("name")
            if not name:
                causes.append(required(f"{field}.name"))
            elif name in names:
                causes.append(duplicate(f"{field}.name", name))
            else:
                causes += dns_label(f"{field}.name", name)
                names.add(name)
            if not one.get("image"):
                causes.append(required(f"{field}.image"))
            causes += _container_ports(f"{field}.ports", one, host=bool(spec.get("hostNetwork")))
    return causes


def _container_ports(where: str, container: Obj, *, host: bool) -> list[Cause]:
    causes = []
    names: set[str] = set()
    for place, port in enumerate(container.get("ports") or ()):
        field = f"{where}[{place}]"
        if name := port.get("name"):
            causes += port_name(f"{field}.name", name)
            if name in names:
                causes.append(duplicate(f"{field}.name", name))
            names.add(name)
        number = port.get("containerPort")
        if not number:
            causes.append(required(f"{field}.containerPort"))
        else:
            causes += port_number(f"{field}.containerPort", number)
        if port.get("hostPort"):
            causes += port_number(f"{field}.hostPort", port["hostPort"])
            if host and port["hostPort"] != number:
                why = "must match `containerPort` when `hostNetwork` is true"
                causes.append(wrong(f"{field}.hostPort", port["hostPort"], why))
        causes += protocol(f"{field}.protocol", port.get("protocol"))
    return causes


def service(obj: Obj, old: Obj | None) -> list[Cause]:
    """Return what is wrong with a Service after defaults."""
    spec = obj["spec"]
    kind = spec["type"]
    causes = []
    if kind not in _SERVICE_TYPES:
        causes.append(unsupported("spec.type", kind, _SERVICE_TYPES))
    if spec["sessionAffinity"] not in ("ClientIP", "None"):
        known = ("ClientIP", "None")
        causes.append(unsupported("spec.sessionAffinity", spec["sessionAffinity"], known))
    causes += [
        unsupported(f"spec.{name}", spec[name], _POLICIES)
        for name in ("internalTrafficPolicy", "externalTrafficPolicy")
        if spec.get(name) not in (None, *_POLICIES)
    ]
    if kind == "ExternalName":
        if not spec.get("externalName"):
            causes.append(required("spec.externalName"))
    elif not spec.get("ports") and spec.get("clusterIP") != "None":
        causes.append(required("spec.ports"))
    causes += _service_ports(spec.get("ports") or ())
    causes += labels("spec.selector", spec.get("selector"))
    for place, address in enumerate(spec.get("externalIPs") or ()):
        causes += _address(f"spec.externalIPs[{place}]", address, 0)
    before = ((old or {}).get("spec") or {}).get("clusterIP")
    stays = kind != "ExternalName" and (old or {}).get("spec", {}).get("type") != "ExternalName"
    if before and stays and spec.get("clusterIP") != before:
        causes.append(
            wrong("spec.clusterIPs[0]", spec.get("clusterIPs"), "may not change once set")
        )
    return causes


def _service_ports(ports: Any) -> list[Cause]:
    causes = []
    names: set[str] = set()
    numbers: set[tuple[Any, Any]] = set()
    for place, port in enumerate(ports):
        field = f"spec.ports[{place}]"
        name = port.get("name")
        if name:
            causes += dns_label(f"{field}.name", name)
            if name in names:
                causes.append(duplicate(f"{field}.name", name))
            names.add(name)
        elif len(ports) > 1:
            causes.append(required(f"{field}.name"))
        causes += port_number(f"{field}.port", port.get("port"))
        causes += protocol(f"{field}.protocol", port.get("protocol"))
        causes += port_or_name(f"{field}.targetPort", port.get("targetPort"))
        known = (port.get("port"), port.get("protocol"))
        if known in numbers:
            causes.append(duplicate(field, {"port": known[0], "protocol": known[1]}))
        numbers.add(known)
    return causes


def endpoint_slice(obj: Obj, old: Obj | None) -> list[Cause]:
    """Return what is wrong with an EndpointSlice after defaults."""
    kind = obj.get("addressType")
    if not kind:
        return [required("addressType")]
    if kind not in _ADDRESS_TYPES:
        return [unsupported("addressType", kind, _ADDRESS_TYPES)]
    causes = []
    if old is not None and old.get("addressType") != kind:
        causes.append(wrong("addressType", kind, "field is immutable"))
    endpoints = obj["endpoints"]
    if len(endpoints) > _ENDPOINTS_MAX:
        text = f"Too many: {len(endpoints)}: must have at most {_ENDPOINTS_MAX} items"
        causes.append(Cause("endpoints", "FieldValueTooMany", text))
    for place, endpoint in enumerate(endpoints):
        field = f"endpoints[{place}].addresses"
        addresses = endpoint.get("addresses") or ()
        if not addresses:
            causes.append(required(field, "must contain at least 1 address"))
        if len(addresses) > _ADDRESSES_MAX:
            text = f"Too many: {len(addresses)}: must have at most {_ADDRESSES_MAX} items"
            causes.append(Cause(field, "FieldValueTooMany", text))
        for at, address in enumerate(addresses):
            where = f"{field}[{at}]"
            if kind == "FQDN":
                causes += dns_subdomain(where, address)
            else:
                causes += _address(where, address, int(kind[-1]))
    names: set[str] = set()
    for place, port in enumerate(obj["ports"]):
        field = f"ports[{place}]"
        name = port.get("name") or ""
        if name in names:
            causes.append(duplicate(f"{field}.name", name))
        names.add(name)
        if name:
            causes += dns_label(f"{field}.name", name)
        causes += protocol(f"{field}.protocol", port.get("protocol"))
    return causes


def node(obj: Obj, old: Obj | None) -> list[Cause]:
    """Return what is wrong with a Node after defaults."""
    spec = obj["spec"]
    causes = []
    for place, text in enumerate(spec.get("podCIDRs") or ()):
        try:
            ip_network(text)
        except ValueError:
            causes.append(wrong(f"spec.podCIDRs[{place}]", text, "must be a valid CIDR value"))
    before = ((old or {}).get("spec") or {}).get("podCIDRs")
    if before and spec.get("podCIDRs") != before:
        why = 'node updates may not change podCIDR except from "" to valid'
        causes.append(not_allowed("spec.podCIDRs", why))
    return causes


def _address(field: str, value: Any, version: int) -> list[Cause]:
    """Check an address of a family, of any for version 0."""
    try:
        found = ip_address(str(value))
    except ValueError:
        return [wrong(field, value, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::1)")]
    if version and found.version != version:
        # Of a slice; the reference server names the list here, and the address in all other cases.
        return [wrong(field.rpartition("[")[0], value, f"must be an IPv{version} address")]
    if found.is_loopback or found.is_unspecified or found.is_link_local or found.is_multicast:
        why = "may not be loopback, unspecified, link-local or multicast"
        return [wrong(field, value, why)]
    return []
