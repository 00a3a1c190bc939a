import os
import signal

import pytest

from vit_jax.runtime.signals import stop_requested, stop_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_signals_collect_signals_and_restore_handlers(number, capfd):
    previous_handler = signal.getsignal(number)
    with stop_signals() as signals:
        assert stop_requested(signals, synchronize=True) is None
        os.kill(os.getpid(), number)
        assert stop_requested(signals, synchronize=True) == number
        assert signal.getsignal(number) == previous_handler  # a second signal is handled as before
    assert signals == [number] and signal.getsignal(number) == previous_handler
    assert capfd.readouterr().err == "stopping after this step; a checkpoint is being written …\n"
