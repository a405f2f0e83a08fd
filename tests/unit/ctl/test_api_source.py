"""The cluster by the API server: a real HTTP server, paged, with and without credentials."""

import asyncio
import base64
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from netpol.admin import relay
from netpol.admin.server import AdminServer
from netpol.ctl import api, kubeconfig
from netpol.ctl.main import main
from netpol.k8s.decode import KINDS
from netpol.k8s.errors import ApiError
from netpol.lib.errors import InputError, NoAnswerError

OBJECTS = {
    "/api/v1/namespaces": [{"metadata": {"name": "shop", "labels": {"team": "shop"}}}],
    "/api/v1/nodes": [{"metadata": {"name": "n1"}}],
    "/api/v1/pods": [
        {
            "metadata": {"name": f"p{i}", "namespace": "shop", "labels": {"app": f"a{i}"}},
            "spec": {"nodeName": "n1", "containers": [{"ports": [{"containerPort": 80}]}]},
            "status": {"phase": "Running", "podIPs": [{"ip": f"10.0.0.{i}"}]},
        }
        for i in range(1, 6)
    ]
    + [{"metadata": {"name": "broken", "namespace": "shop"}, "spec": "nonsense"}],
    "/api/v1/services": [
        {
            "metadata": {"name": "s", "namespace": "shop"},
            "spec": {
                "clusterIP": "10.96.0.1",
                "ports": [{"port": 80}],
                "externalIPs": ["192.0.2.9"],
            },
        }
    ],
    "/apis/networking.k8s.io/v1/networkpolicies": [
        {"metadata": {"name": "deny", "namespace": "shop"}, "spec": {"podSelector": {}}}
    ],
    "/apis/discovery.k8s.io/v1/endpointslices": [
        {
            "metadata": {
                "name": "s-1",
                "namespace": "shop",
                "labels": {"kubernetes.io/service-name": "s"},
            },
            "ports": [{"port": 80, "protocol": "TCP"}],
            "endpoints": [{"addresses": ["10.0.0.2"]}],
        }
    ],
}
PAGE = 2


def direct(config):
    return api.Direct(kubeconfig.named(config))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        asked = urllib.parse.parse_qs(url.query)
        self.server.seen.append((url.path, self.headers.get("Authorization")))
        if self.server.refuse:
            body, code = {"kind": "Status", "message": "pods is forbidden"}, 403
        else:
            start = int(asked.get("continue", ["0"])[0].split("/")[0])
            items = OBJECTS[url.path]
            more = f"{start + PAGE}/&=?" if start + PAGE < len(items) else ""
            body = {"items": items[start : start + PAGE], "metadata": {"continue": more}}
            code = 200
        raw = json.dumps(body).encode() if self.server.sane else b"<html>hello"
        self.send_response(code)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.seen, found.refuse, found.sane = [], False, True
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def config(server, tmp_path):
    path = tmp_path / "config"
    path.write_text(
        f"""
apiVersion: v1
kind: Config
current-context: here
contexts: [{{name: here, context: {{cluster: c, user: u, namespace: shop}}}}]
clusters: [{{name: c, cluster: {{server: "http://127.0.0.1:{server.server_port}/"}}}}]
users: [{{name: u, user: {{token: secret}}}}]
"""
    )
    return str(path)


def test_everything_is_listed_page_by_page(server, config, capsys):
    found = api.cluster(direct(config))
    assert sorted(p.name for p in found.world.pods) == ["p1", "p2", "p3", "p4", "p5"]
    assert found.node_names == ("n1",)
    assert [str(k) for k in found.external_ips.values()] == ["shop/s"]
    assert not found.headless
    assert {a for _, a in server.seen} == {"Bearer secret"}
    assert "left out" in capsys.readouterr().err


def test_commands_use_it_with_the_contexts_namespace(config, capsys):
    assert main(["explain", "pod/p1", "--to", "svc/s", "--kubeconfig", config]) == 1
    assert capsys.readouterr().out.startswith("DENY: shop/p1 -> svc/shop/s:80/TCP")
    assert main(["matrix", "--kubeconfig", config, "-o", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["pods"]) == 5


def test_a_refusal_is_one_line(server, config, capsys):
    server.refuse = True
    assert main(["matrix", "--kubeconfig", config]) == 3
    err = capsys.readouterr().err
    assert "HTTP 403" in err
    assert "pods is forbidden" in err
    assert err.count("\n") == 1


def test_what_is_no_api_server_is_said(server, config):
    server.sane = False
    with pytest.raises(ApiError):
        api.cluster(direct(config))


def test_nobody_there_is_said(config, server, tmp_path):
    text = (tmp_path / "config").read_text().replace(str(server.server_port), "1")
    (tmp_path / "config").write_text(text)
    with pytest.raises(ApiError, match="no answer"):
        api.cluster(direct(config))


@pytest.mark.parametrize(
    ("old", "new", "needle"),
    [
        ("current-context: here", "", "no current-context"),
        ("current-context: here", "current-context: there", "no context named 'there'"),
        ("cluster: c, user", "cluster: d, user", "no cluster named 'd'"),
        ('"http://', '"ftp://', "http"),
        ("apiVersion: v1", "- a", "not YAML"),
        ("token: secret", "tokenFile: nowhere", "credentials cannot be used"),
    ],
)
def test_a_kubeconfig_that_cannot_be_used_is_bad_input(config, old, new, needle):
    text = Path(config).read_text()
    Path(config).write_text(text.replace(old, new))
    with pytest.raises(InputError, match=needle):
        kubeconfig.named(config)


def test_basic_tokens_files_and_plugins(tmp_path, config):
    text = Path(config).read_text()
    (tmp_path / "t").write_text("from-file\n")
    wanted = {
        "tokenFile: t": "Bearer from-file",
        "username: a, password: b": "Basic " + base64.b64encode(b"a:b").decode(),
        'exec: {command: sh, args: [-c, \'echo "{\\"status\\": {\\"token\\": \\"plug\\"}}"\'], '
        "apiVersion: client.authentication.k8s.io/v1}": "Bearer plug",
    }
    for user, header in wanted.items():
        (tmp_path / "config").write_text(text.replace("token: secret", user))
        assert kubeconfig.named(config).headers == {"Authorization": header}


def test_a_plugin_that_fails_is_said(tmp_path, config):
    text = Path(config).read_text()
    (tmp_path / "config").write_text(text.replace("token: secret", "exec: {command: /nonexistent}"))
    with pytest.raises(NoAnswerError, match="credential plugin"):
        kubeconfig.named(config)


def test_kubeconfig_of_the_environment_may_be_several_files(monkeypatch, tmp_path, config):
    other = tmp_path / "other"
    other.write_text("current-context: here\ncontexts: []\n")
    monkeypatch.setenv("KUBECONFIG", f"/nonexistent:{other}:{config}")
    assert kubeconfig.named(None).namespace == "shop"


def test_nothing_names_a_cluster(monkeypatch, tmp_path):
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kubeconfig.named(None) is None
    with pytest.raises(NoAnswerError, match="no cluster to ask"):
        kubeconfig.found()
    assert kubeconfig.default_namespace(None) == "default"


def test_the_agent_of_the_node_lends_its_connection(server, config, tmp_path, capsys, monkeypatch):
    """Through the socket: the handler of the agent, the pages of the server, the command."""
    monkeypatch.delenv("KUBECONFIG", raising=False)
    path = str(tmp_path / "agent.sock")

    class Connection:
        async def get(self, path, **query):
            kind = next(k for k in KINDS.values() if k.path() == path)
            return await asyncio.to_thread(direct(config).page, kind, query["continue"])

    async def serve():
        async with asyncio.timeout(20):
            handler = relay.list_handler(Connection)
            agent = AdminServer(path, {"list": handler})
            await agent.start()
            try:
                return await asyncio.to_thread(main, ["matrix", "--socket", path, "-o", "json"])
            finally:
                await agent.close()

    assert asyncio.run(serve()) == 0
    assert len(json.loads(capsys.readouterr().out)["pods"]) == 5


@pytest.mark.parametrize("args", [{}, {"kind": "Secret"}, {"kind": "Pod", "continue": 1}])
async def test_the_agent_lists_nothing_but_the_kinds_that_netpol_reads(args):
    class Connection:
        async def get(self, path, **query):
            raise AssertionError(path, query)

    with pytest.raises(InputError):
        await relay.list_handler(Connection)(args)


async def test_an_agent_without_a_connection_says_so():
    with pytest.raises(NoAnswerError, match="no connection to the API server yet"):
        await relay.list_handler(lambda: None)({"kind": "Pod"})
