import pytest

from vit_jax.runtime import progress


@pytest.mark.parametrize(("delay", "shown"), [(2.0, False), (0.0, True)])
def test_progress_bar_appears_after_delay(monkeypatch, capfd, delay, shown):
    monkeypatch.setattr(progress, "_DELAY_SECONDS", delay)
    assert list(progress.progress_bar(range(3), desc="work")) == [0, 1, 2]
    out, err = capfd.readouterr()
    assert ("work" in err, out) == (shown, "")
