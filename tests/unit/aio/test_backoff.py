from netpol.aio.backoff import Backoff


def upper(_low, high):
    return high


def test_the_bound_doubles_up_to_the_maximum():
    backoff = Backoff(base_s=0.2, max_s=30.0, uniform=upper)
    waits = [backoff.failed() for _ in range(10)]
    assert waits == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]


def test_it_starts_anew_after_progress():
    backoff = Backoff(base_s=0.2, uniform=upper)
    backoff.failed()
    backoff.failed()
    backoff.reset()
    assert backoff.failures == 0
    assert backoff.failed() == 0.2


def test_waits_are_drawn_from_nothing_to_the_bound():
    backoff = Backoff(base_s=1.0, max_s=8.0)
    for _ in range(200):
        bound = backoff.bound_s
        assert 0.0 <= backoff.failed() <= bound <= 8.0


def test_many_failures_do_not_overflow():
    backoff = Backoff(uniform=upper)
    backoff.failures = 5000
    assert backoff.failed() == 30.0


def test_what_the_server_asked_for_is_waited_at_least():
    backoff = Backoff(base_s=1.0, uniform=upper)
    assert backoff.failed(at_least_s=7.0) == 8.0
