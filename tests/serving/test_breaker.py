from hiertcn.serving.inference.breaker import CircuitBreaker


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_it_opens_after_failures_in_a_row_and_lets_one_call_try_again():
    clock, told = Clock(), []
    breaker = CircuitBreaker(failures=3, open_s=2.0, changed=told.append, clock=clock)
    for outcome in ("failed", "failed", "succeeded", "failed", "failed"):
        assert breaker.allows()
        getattr(breaker, outcome)()
    assert breaker.allows() and told == []
    breaker.failed()
    assert told == [True] and breaker.is_open and not breaker.allows()
    clock.now += 1.99
    assert not breaker.allows()
    clock.now += 0.02
    assert [breaker.allows() for _ in range(3)] == [True, False, False]
    breaker.failed()
    assert not breaker.allows() and told == [True]
    clock.now += 2.01
    assert breaker.allows()
    breaker.succeeded()
    assert told == [True, False] and not breaker.is_open
    assert all(breaker.allows() for _ in range(5))
    breaker.failed()
    assert breaker.allows()


def test_a_probe_that_never_tells_blocks_nobody_for_long():
    clock = Clock()
    breaker = CircuitBreaker(failures=1, open_s=1.0, clock=clock)
    breaker.failed()
    clock.now += 1.5
    assert breaker.allows() and not breaker.allows()
    clock.now += 1.1
    assert breaker.allows()
