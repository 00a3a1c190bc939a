import dataclasses
import importlib.metadata

import pytest

from benchmarks import aot

NONE = dict.fromkeys(aot.KINDS, 0)
GOOD = aot.Measured(
    variant="B_16",
    data=1,
    fsdp=8,
    batch=64,
    arguments=3 * aot.GIB,
    state=aot.GIB,
    expected_state=aot.GIB,
    temporaries=6 * aot.GIB,
    matmuls=245,
    fused=(0, 0),
    counts=NONE,
    per_block=[{**NONE, "all-gather": 6.0}, {**NONE, "all-gather": 6.0}],
    most_per_block={**NONE, "all-gather": 6},
    seconds=1.0,
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"counts": {**NONE, "all-to-all": 1}}, ["1 all-to-all, expected none"]),
        ({"state": 1.019 * aot.GIB}, []),
        ({"state": 1.03 * aot.GIB}, ["state 1.030 GiB per device, expected 1.000"]),
        ({"state": 0}, ["state 0.000 GiB per device, expected 1.000"]),
        ({"per_block": []}, []),
        (
            {"per_block": [{**NONE, "all-gather": 6.0}, {**NONE, "all-gather": 5.5}]},
            ["a block adds 6 then 5.5 all-gather, expected one number"],
        ),
        ({"most_per_block": {**NONE, "all-gather": 5}}, ["a block adds 6 all-gather, its parameters need 5"]),
        ({"temporaries": 8 * aot.GIB}, []),
        ({"fsdp": 1, "temporaries": 8 * aot.GIB}, ["temporaries 8.00 GiB, expected at most 7"]),
        ({"fused": (12, 12), "matmuls": 225}, []),
        ({"fused": (12, 12), "fsdp": 1, "matmuls": 225}, ["temporaries 6.00 GiB, expected at most 4.8"]),
        ({"fused": (12, 12), "matmuls": 226}, ["226 matmuls, expected at most 225"]),
        ({"fused": (12, 11), "matmuls": 225}, ["12 + 11 calls of fused attention, expected 12 each"]),
    ],
)
def test_failures_of_returns_failed_checks(changes, expected):
    assert aot.failures_of(dataclasses.replace(GOOD, **changes)) == expected


def test_count_collectives_counts_async_pairs_once():
    text = """
      %a = (f32[1], f32[8]) all-gather-start(%x), metadata={op_name="jit(f)/all-gather"}
      %b = f32[8] all-gather-done(%a)
      %c = f32[8] all-gather(%y)
      %d = f32[1] reduce-scatter(%c)
      %e = f32[8] ragged-all-to-all(%c)
    """
    assert aot.count_collectives(text) == {"all-gather": 2, "reduce-scatter": 1, "all-reduce": 0, "all-to-all": 1}


@pytest.mark.parametrize(
    ("num_devices", "meshes"),
    [
        (1, [(1, 1)]),
        (2, [(2, 1), (1, 2)]),
        (5, [(5, 1), (1, 5)]),
        (8, [(8, 1), (1, 8), (2, 4)]),
        (64, [(64, 1), (1, 64), (8, 8)]),
    ],
)
def test_meshes_of_keeps_shards_within_hosts(num_devices, meshes):
    assert aot.meshes_of(num_devices) == meshes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "12"], "--devices 12: expected 1 to 8, or a multiple of 8"),
        (["--batch", "0"], "--batch 0: expected at least 1"),
        (["--variants", "B_17"], "invalid choice: 'B_17'"),
    ],
)
def test_main_rejects_invalid_arguments(run_command, arguments, message):
    result = run_command("benchmarks/aot.py", *arguments)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]


def installed(package: str) -> bool:
    return any(distribution.name == package for distribution in importlib.metadata.distributions())


@pytest.mark.slow
@pytest.mark.timeout(1800)  # five and a half minutes on two shared cores
@pytest.mark.skipif(not installed("jax-cuda12-plugin"), reason="needs JAX's CUDA plugin: pip install '.[aot]' (Linux)")
@pytest.mark.parametrize("attention", ["xla", "cudnn"])
def test_main_compiles_train_step_for_absent_gpus(run_command, attention):
    options = ["--variants", "B_16", "--devices", "1", "8", "--attention", attention]
    result = run_command("benchmarks/aot.py", *options, timeout=1800)
    assert result.returncode == 0, result.stderr
    rows = [line.split("|")[1:3] for line in result.stdout.splitlines() if line.startswith("|") and "B_16" in line]
    assert [mesh.strip() for _, mesh in rows] == ["1 × 1", "8 × 1", "1 × 8", "2 × 4"]
    assert "all checks passed" in result.stdout
