"""Event loops for Orbax, which closes its loop as soon as one array cannot be read."""

import asyncio
import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def patient_event_loops() -> Iterator[None]:
    """Makes new event loops finish their tasks before they close; otherwise, pending reads print tracebacks."""
    policy = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_PatientPolicy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(policy)


class _PatientPolicy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _PatientLoop()


class _PatientLoop(asyncio.SelectorEventLoop):
    def close(self) -> None:
        while tasks := asyncio.all_tasks(self):
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()
