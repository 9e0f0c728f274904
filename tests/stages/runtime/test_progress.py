"""Progress of a run that an earlier process began."""

from stages.runtime import context


def test_what_was_done_before_counts_and_the_time_left_is_that_of_this_process(monkeypatch, capsys):
    """60 of 100 steps were done; this process takes 10 seconds a step, so after one step 39 x 10 seconds are left."""
    times = iter([0.0, 10.0])
    monkeypatch.setattr(context.time, "monotonic", lambda: next(times))
    with context.progress("train", 100, "steps", done=60) as advance:
        advance(1, "loss 0.5")
    assert capsys.readouterr().err == "train: 61 of 100 steps, loss 0.5, 390 s left\n"
