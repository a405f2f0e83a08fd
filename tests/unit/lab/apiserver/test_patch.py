"""The patch styles and server-side apply, on plain objects."""

import pytest

from netpol.lab.apiserver import ApiError, apply, patch


@pytest.mark.parametrize(
    ("target", "body", "expected"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patches_of_rfc_7386(target, body, expected):
    assert patch.merge_patch(target, body) == expected


@pytest.mark.parametrize(
    ("target", "operation", "expected"),
    [
        ({"a": 1}, {"op": "add", "path": "/b", "value": 2}, {"a": 1, "b": 2}),
        ({"a": [1, 3]}, {"op": "add", "path": "/a/1", "value": 2}, {"a": [1, 2, 3]}),
        ({"a": [1]}, {"op": "add", "path": "/a/-", "value": 2}, {"a": [1, 2]}),
        ({"a": [1, 2]}, {"op": "remove", "path": "/a/0"}, {"a": [2]}),
        ({"a": [1, 2]}, {"op": "replace", "path": "/a/1", "value": 9}, {"a": [1, 9]}),
        ({"a": 1}, {"op": "move", "from": "/a", "path": "/b"}, {"b": 1}),
        (
            {"a": {"c": 1}},
            {"op": "copy", "from": "/a", "path": "/b"},
            {"a": {"c": 1}, "b": {"c": 1}},
        ),
        ({"x/y": {"~": 1}}, {"op": "remove", "path": "/x~1y/~0"}, {"x/y": {}}),
        ({"a": 1}, {"op": "replace", "path": "", "value": {"b": 1}}, {"b": 1}),
        ({"a": 1}, {"op": "test", "path": "/a", "value": 1}, {"a": 1}),
    ],
)
def test_json_patches_of_rfc_6902(target, operation, expected):
    assert patch.json_patch(target, [operation]) == expected


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "test", "path": "/a", "value": 2},
        {"op": "remove", "path": "/b"},
        {"op": "replace", "path": "/b", "value": 1},
        {"op": "add", "path": "/l/9", "value": 1},
        {"op": "add", "path": "b", "value": 1},
        {"op": "odd", "path": "/a"},
        {"path": "/a"},
        7,
    ],
)
def test_a_json_patch_that_does_not_fit_is_422(operation):
    with pytest.raises(ApiError) as refusal:
        patch.json_patch({"a": 1, "l": []}, [operation])
    assert refusal.value.code == 422


def containers(*names):
    return {"spec": {"containers": [{"name": name, "image": f"{name}:1"} for name in names]}}


@pytest.mark.parametrize(
    ("target", "body", "expected"),
    [
        (
            containers("a", "b"),
            {"spec": {"containers": [{"name": "b", "image": "b:2"}]}},
            {
                "spec": {
                    "containers": [{"name": "a", "image": "a:1"}, {"name": "b", "image": "b:2"}]
                }
            },
        ),
        (
            containers("a", "b"),
            {"spec": {"containers": [{"name": "a", "$patch": "delete"}]}},
            containers("b"),
        ),
        (
            containers("a", "b"),
            {"spec": {"containers": [{"$patch": "replace"}, {"name": "c", "image": "c:1"}]}},
            containers("c"),
        ),
        (
            containers("a", "b"),
            {
                "spec": {
                    "$setElementOrder/containers": [{"name": "c"}, {"name": "b"}, {"name": "a"}],
                    "containers": [{"name": "c", "image": "c:1"}],
                }
            },
            containers("c", "b", "a"),
        ),
        (
            {"spec": {"ports": [{"port": 80, "name": "a"}, {"port": 443}]}},
            {"spec": {"ports": [{"port": 80, "name": "b"}]}},
            {"spec": {"ports": [{"port": 80, "name": "b"}, {"port": 443}]}},
        ),
        (
            {"metadata": {"finalizers": ["a", "b"]}},
            {"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "finalizers": ["c"]}},
            {"metadata": {"finalizers": ["b", "c"]}},
        ),
        (
            {"spec": {"ingress": [{"from": [1]}, {"from": [2]}]}},
            {"spec": {"ingress": [{"ports": [{"port": 80}]}]}},
            {"spec": {"ingress": [{"ports": [{"port": 80}]}]}},
        ),
        (
            {"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {}}}},
            {"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}},
            {"spec": {"strategy": {"type": "Recreate"}}},
        ),
        ({"a": {"b": 1, "c": 2}}, {"a": {"$patch": "replace", "d": 3}}, {"a": {"d": 3}}),
        ({"a": {"b": 1}, "x": 1}, {"a": {"$patch": "delete"}}, {"x": 1}),
        (
            {"status": {"conditions": [{"type": "Ready", "status": "False"}]}},
            {"status": {"conditions": [{"type": "Ready", "status": "True"}]}},
            {"status": {"conditions": [{"type": "Ready", "status": "True"}]}},
        ),
    ],
)
def test_strategic_merges(target, body, expected):
    assert patch.strategic_merge(target, body) == expected


def test_an_element_without_its_merge_key_is_400():
    with pytest.raises(ApiError) as refusal:
        patch.strategic_merge(containers("a"), {"spec": {"containers": [{"image": "x"}]}})
    assert refusal.value.code == 400


class Applied:
    """A live object that managers apply to."""

    def __init__(self):
        self.live = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}}

    def by(self, manager, **body):
        configuration = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}} | body
        merged = apply.merge(self.live, configuration, manager)
        apply.note_manager(
            merged, self.live, manager=manager, applied=configuration, now="t", subresource=""
        )
        self.live = merged
        return merged


def test_an_apply_removes_only_what_its_manager_alone_applied():
    found = Applied()
    found.by("one", data={"a": "1", "b": "1"}, metadata={"name": "s", "labels": {"x": "1"}})
    found.by("two", data={"b": "1", "c": "1"})
    assert found.by("one")["data"] == {"b": "1", "c": "1"}
    assert "labels" not in found.live["metadata"]
    assert "data" not in found.by("two")
    assert [entry["manager"] for entry in found.live["metadata"]["managedFields"]] == ["one", "two"]


def test_an_apply_merges_lists_by_their_keys():
    found = Applied()
    found.by("one", spec={"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53}]})
    found.by("two", spec={"ports": [{"port": 53, "name": "tcp"}]})
    assert found.live["spec"]["ports"] == [
        {"port": 53, "protocol": "UDP"},
        {"port": 53, "name": "tcp"},
    ]
    found.by("one", spec={"ports": [{"port": 80}]})
    assert found.live["spec"]["ports"] == [{"port": 53, "name": "tcp"}, {"port": 80}]


def test_an_apply_replaces_atomic_lists_and_selectors():
    found = Applied()
    found.by("one", spec={"podSelector": {"a": "1"}, "ingress": [{"x": 1}, {"x": 2}]})
    found.by("one", spec={"podSelector": {"b": "1"}, "ingress": [{"x": 3}]})
    assert found.live["spec"] == {"podSelector": {"b": "1"}, "ingress": [{"x": 3}]}
