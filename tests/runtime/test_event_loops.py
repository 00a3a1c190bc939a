import asyncio
import gc

import pytest

from vit_jax.runtime.event_loops import patient_event_loops


def test_patient_event_loops_finish_all_tasks_when_one_fails(caplog):
    finished = []

    async def work(number):
        await asyncio.sleep(number / 100)
        finished.append(number)
        raise KeyError(number)

    async def work_on_all():
        await asyncio.gather(*(work(number) for number in range(3)))

    policy = asyncio.get_event_loop_policy()
    with patient_event_loops():
        loop = asyncio.new_event_loop()
        with pytest.raises(KeyError, match="0"):
            loop.run_until_complete(work_on_all())
        loop.close()
    assert finished == [0, 1, 2]
    assert asyncio.get_event_loop_policy() is policy
    gc.collect()
    assert caplog.text == ""  # "exception was never retrieved"
