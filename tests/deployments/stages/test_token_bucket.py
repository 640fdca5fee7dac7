from deployments.stages.token_bucket import TokenBucket


def test_a_burst_is_let_through_and_then_one_in_a_while():
    now = [50.0]
    bucket = TokenBucket(3, lambda: now[0])
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    assert bucket.due_in_s() == 1
    now[0] += 1
    assert [bucket.take(), bucket.take()] == [True, False]
    assert bucket.due_in_s(every_s=30) == 30
    now[0] += 1000
    assert [bucket.take(every_s=30) for _ in range(4)] == [True, True, True, False], "it holds no more than the burst"
