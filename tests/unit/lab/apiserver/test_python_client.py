"""The `kubernetes` package's own client against the server: TLS, token, typed objects, watch, exec."""

import pytest
from kubernetes import client, config, watch
from kubernetes.stream import stream

from tests.unit.lab.apiserver.helpers import pod


@pytest.fixture(scope="module")
def core(kubectl):
    api = config.new_client_from_config(str(kubectl.folder / "config"))
    yield client.CoreV1Api(api)
    api.rest_client.pool_manager.clear()
    api.close()


def test_typed_objects_round_trip(core):
    made = core.create_namespaced_pod("default", pod("typed", node="n1"))
    assert made.status.phase == "Pending"
    changed = core.patch_namespaced_pod(
        "typed", "default", {"metadata": {"labels": {"app": "typed"}}}
    )
    assert changed.metadata.labels == {"app": "typed"}
    found = core.list_pod_for_all_namespaces(label_selector="app=typed", limit=1)
    assert [one.metadata.name for one in found.items] == ["typed"]
    with pytest.raises(client.ApiException) as refusal:
        core.read_namespaced_pod("nobody", "default")
    assert refusal.value.status == 404


def test_the_watch_helper_reads_the_stream(core):
    core.create_namespaced_config_map("default", {"metadata": {"name": "seen"}})
    events = watch.Watch().stream(
        core.list_namespaced_config_map, "default", resource_version="0", timeout_seconds=1
    )
    assert [(one["type"], one["object"].metadata.name) for one in events] == [("ADDED", "seen")]


def test_exec_over_the_clients_websocket(core):
    core.create_namespaced_pod("default", pod("shell", node="n1"))
    shell = stream(
        core.connect_get_namespaced_pod_exec,
        "shell",
        "default",
        command=["cat"],
        stdout=True,
        stderr=True,
        stdin=True,
        tty=False,
        _preload_content=False,
    )
    shell.write_stdin("hello\n")
    assert shell.readline_stdout(timeout=5) == "hello"
    shell.close()
