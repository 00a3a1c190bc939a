import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import peers, throughput
from benchmarks.peers import Case, Program
from benchmarks.throughput import Row, Worker, parse_case
from vit_jax.runtime.errors import UserError

TOY = "micro_4:8:2:float32"
DEFAULT_ALLOCATOR = ["--env", "vit_jax", "="]


class FakeWorker:
    """Takes 1 s per step; "slow" takes 3 s, each environment variable makes it faster. Records requests in `log`."""

    log: list[str] = []
    losses: dict[str, float] = {}

    def __init__(self, peer, case, directory, environment):
        if peer == "missing":
            raise UserError("missing: No module named 'missing'")
        self.peer, self.environment = peer, environment
        loss = self.losses.get(peer, 4.6)
        self.info = {"device": "cpu", "versions": {peer: "1.0"}, "flops": 1e9, "loss": loss}
        self.startup = 7.0

    def measure(self, seconds):
        self.log.append(self.peer)
        return {"slow": 3.0}.get(self.peer, 1.0) / (1 + len(self.environment))

    def ask(self, **request):
        return {"memory": 2**30} if "memory" in request else {"flops": 4e9}

    def close(self):
        self.log.append(f"close {self.peer}")


@pytest.fixture
def fake_workers(monkeypatch):
    monkeypatch.setattr(throughput, "Worker", FakeWorker)
    monkeypatch.setattr(throughput, "write_inputs", lambda case, directory: None)
    monkeypatch.setattr(FakeWorker, "log", [])
    monkeypatch.setattr(FakeWorker, "losses", {})
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return FakeWorker


def test_parse_case_expands_alternatives():
    assert parse_case("B_16:224:8,16:float32:full,forward") == [
        Case("B_16", 224, 8, "float32", "full"),
        Case("B_16", 224, 8, "float32", "forward"),
        Case("B_16", 224, 16, "float32", "full"),
        Case("B_16", 224, 16, "float32", "forward"),
    ]


@pytest.mark.parametrize("preset", throughput.PRESETS)
def test_presets_are_valid(preset):
    assert [case for text in throughput.PRESETS[preset] for case in parse_case(text)]
    assert {peer.partition(":")[0] for peer in throughput.PEERS[preset]} <= set(peers.CREATORS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "B_16"], "--cases B_16: expected VARIANT:PIXELS:BATCHES:DTYPES:MODES"),
        (["--cases", "B_17:224:8:float32:full"], "'B_17'; expected one of Ti_16"),
        (["--cases", "B_16:224:8:float16:full"], "'float16'; expected one of float32, bfloat16"),
        (["--cases", "B_16:224:0:float32:full"], "expected pixels and batches as positive integers"),
        (["--cases", "B_16:220:8:float32:full"], "expected pixels as a multiple of 16"),
        (["--peers", "jax"], "--peers jax: expected one of vit_jax"),
        (["--rounds", "0"], "expected at least one round"),
        (["--env", "timm", "X"], "--env: expected PEER NAME=VALUE"),
    ],
)
def test_main_rejects_invalid_arguments(run_cli, arguments, message):
    result = run_cli("benchmarks.throughput", arguments)
    assert result.code == 2
    assert message in result.stderr


def test_main_alternates_and_pairs_rounds(run_cli, fake_workers, tmp_path):
    arguments = ["--cases", f"{TOY}:full", "--peers", "vit_jax", "timm", "--rounds", 2, *DEFAULT_ALLOCATOR]
    path = tmp_path / "out.json"
    result = run_cli("benchmarks.throughput", [*arguments, "--env", "timm", "=", "--json", path])
    assert result.code == 0
    # Two measurements each to warm up, then the rounds, every other one reversed.
    expected = ["vit_jax", "vit_jax", "timm", "timm", "vit_jax", "timm", "timm", "vit_jax"]
    assert [name for name in fake_workers.log if "close" not in name] == expected
    rows = json.loads(path.read_text())
    assert [row["ratios"] for row in rows] == [[1.0, 1.0], [1.0, 1.0]]
    assert [row["matmul_fraction"] for row in rows] == [0.25, 0.25]
    assert "| micro_4 @8, b2, float32, full | timm | 1000 | 2 | 1.00 (1.00–1.00) | 25% | 1.00 |" in result.stdout


def test_row_shows_median_and_range():
    row = Row(Case("B_16", 224, 8, "float32", "full"), "timm", "cpu", {}, {}, loss=4.6, flops=None)
    row.seconds, row.ratios, row.startup = [2.0, 1.0, 4.0], [1.5, 1.25, 2.0], {"cold": 3.0, "warm": 1.0}
    assert row.cells()[2:5] == ["2000", "4", "1.50 (1.25–2.00)"]
    assert row.cells()[7] == "3.0 cold, 1.0 warm"


@pytest.mark.parametrize(
    ("peer", "case", "setting"),
    [("timm", TOY, "tuned"), ("vit_jax", TOY, "tuned, 2 devices"), ("vit_jax", "micro_4:8:3:float32", "tuned")],
)
def test_start_fastest_keeps_fastest_setting(fake_workers, tmp_path, monkeypatch, peer, case, setting):
    monkeypatch.setattr(throughput.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(throughput.platform, "libc_ver", lambda: ("glibc", "2.36"))
    worker = throughput.start_fastest(peer, parse_case(f"{case}:full")[0], tmp_path, None, 1.0)
    assert throughput.name_setting(worker.environment) == setting
    assert fake_workers.log.count(f"close {peer}") == setting.count(",") + 1


def test_cpu_environments_keep_allocator_of_user(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert throughput.cpu_environments("timm", parse_case(f"{TOY}:full")[0]) == []


def test_main_leaves_out_software_that_fails(run_cli, fake_workers, monkeypatch):
    monkeypatch.setitem(peers.CREATORS, "missing", None)
    result = run_cli("benchmarks.throughput", ["--cases", f"{TOY}:full", "--peers", "vit_jax", "missing"])
    assert result.code == 0
    assert "not measured: missing: No module named 'missing'" in result.stderr
    assert "missing" not in result.stdout


def test_main_prints_nothing_if_losses_differ(run_cli, fake_workers):
    fake_workers.losses["timm"] = 4.6011
    result = run_cli("benchmarks.throughput", ["--cases", f"{TOY}:full", "--peers", "vit_jax", "timm"])
    assert result.code == 1
    assert "the first loss of timm is 4.60110, of vit_jax 4.60000" in result.stderr
    assert "micro_4" not in result.stdout


def test_main_skips_cases_after_time_limit(run_cli, fake_workers):
    arguments = ["--cases", f"{TOY}:full", "--peers", "vit_jax", "--time_limit", "-1"]
    result = run_cli("benchmarks.throughput", arguments)
    assert result.code == 1
    assert "no time left; raise --time_limit" in result.stderr


@pytest.mark.parametrize(("result", "expected"), [(np.float32(2.5), 2.5), (np.log([[1.0, 3.0], [2.0, 2.0]]), 1.03972)])
def test_first_loss_is_mean_cross_entropy(result, expected):
    program = Program(lambda: result, np.asarray, lambda size: lambda: None, lambda: 0, "cpu", {})
    assert peers.first_loss(program, np.array([0, 1])) == pytest.approx(expected, abs=1e-5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_process_memory_excludes_parent():
    ballast = np.ones(50_000_000)  # 400 MB in this process
    code = "from benchmarks import peers; print(peers.process_memory())"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=throughput.ROOT, capture_output=True, text=True, check=True
    )
    assert 0 < int(child.stdout) < ballast.nbytes / 2


@pytest.mark.slow
def test_main_measures_vit_jax_in_its_own_process(run_cli):
    arguments = ["--cases", f"{TOY}:full", "--peers", "vit_jax", "--rounds", 1, "--seconds", 0.01, *DEFAULT_ALLOCATOR]
    result = run_cli("benchmarks.throughput", arguments)
    assert result.code == 0, result.stderr
    cells = result.stdout.splitlines()[2].split("|")
    assert cells[1:3] == [" micro_4 @8, b2, float32, full ", " vit_jax "]
    assert float(cells[3]) > 0


def test_worker_reports_last_line_of_failure(tmp_path):
    with pytest.raises(UserError, match="^vit_jax: FileNotFoundError: .*images.npy"):
        Worker("vit_jax", parse_case(f"{TOY}:full")[0], tmp_path, {})


def others() -> list[str]:
    return [name for name in ("timm", "transformers") if importlib.util.find_spec(name)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not others(), reason="needs timm or transformers: pip install '.[interop]'")
@pytest.mark.parametrize(("dtype", "modes"), [("float32", "full,lora,forward"), ("bfloat16", "full")])
def test_main_measures_same_model_in_other_software(run_command, tmp_path, dtype, modes):
    case, names = f"micro_4:8:4:{dtype}:{modes}", ["vit_jax", *others()]
    fixed = [argument for name in names for argument in ("--env", name, "=")]
    path = tmp_path / "out.json"
    flags = ["--rounds", 1, "--seconds", 0.01, "--json", path, "--time_limit", 600]
    result = run_command(
        "benchmarks/throughput.py",
        "--cases",
        case,
        "--peers",
        *names,
        *flags,
        *fixed,
        timeout=600,
        env=dict(os.environ),
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(path.read_text())
    assert [row["peer"] for row in rows] == names * (modes.count(",") + 1), result.stderr
