from bench import worlds
from bench.kuberouter_layout import Layout
from bench.packets import world_of


def layout():
    return Layout(world_of(worlds.one_policy_each(local=20, others=5, namespaces=4)), "node1")


def test_every_pod_stands_four_times_in_the_list_of_forward():
    rules = layout().rules.splitlines()
    forward = [r for r in rules if r.startswith("-A LIST-FORWARD ")]
    assert len(forward) == 20 * 4 + 2
    assert sum("--physdev-is-bridged" in r for r in forward) == 20 * 2
    assert "-j TAIL" in forward[-2]
    assert "-j ACCEPT" in forward[-1]


def test_every_rule_of_a_policy_has_a_set_of_subjects_and_one_of_peers():
    made = layout()
    policy = [r for r in made.rules.splitlines() if r.startswith("-A POLICY-0 ")]
    assert len(policy) == 4  # a mark and a return for each direction
    assert all(r.count("--match-set") == 2 for r in policy)
    created = [x.split()[1] for x in made.sets.splitlines() if x.startswith("create ")]
    assert len(created) == len(set(created)) == 20 * 3  # subjects, sources, destinations


def test_every_name_that_is_used_is_declared():
    made = layout()
    rules = made.rules.splitlines()
    chains = {r.split()[0][1:] for r in rules if r.startswith(":")}
    sets = {x.split()[1] for x in made.sets.splitlines() if x.startswith("create ")}
    builtin = {"MARK", "RETURN", "ACCEPT", "DROP", "REJECT", "NFLOG"}
    for rule in (r.split() for r in rules if r.startswith("-A ")):
        assert rule[rule.index("-j") + 1] in chains | builtin
        assert {rule[i + 1] for i, word in enumerate(rule) if word == "--match-set"} <= sets


def test_the_order_of_the_lists_is_not_that_of_the_addresses():
    order = [p.addresses[0] for p in layout().order]
    assert order != sorted(order)
    assert len(order) == 20
