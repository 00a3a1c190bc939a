import numpy as np
import pytest
from PIL import Image

from vit_jax import pretrained, visualize
from vit_jax.run import load_run

FIGURES = (
    "curves position_similarity position_matrix patch_filters confusion reliability errors attention_rollout "
    "attention_heads"
).split()


def count_colors(path) -> int:
    return len(np.unique(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3), axis=0))


def test_main_saves_and_lists_every_figure(finished_run, run_command, tmp_path):
    result = run_command("-m", "vit_jax.visualize", "--workdir", finished_run, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    paths = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in paths] == sorted(f"{name}.png" for name in FIGURES)
    assert all(str(path) in result.stdout for path in paths)
    assert all(count_colors(path) > 50 for path in paths)


def test_main_plots_one_head_on_given_images(finished_run, run_cli, tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / "wide.png", tmp_path / "grey.jpg"]
    Image.fromarray(rng.integers(0, 256, (40, 90, 3)).astype(np.uint8)).save(paths[0])
    Image.fromarray(rng.integers(0, 256, (20, 20)).astype(np.uint8)).save(paths[1])
    out = tmp_path / "out"
    argv = ["--workdir", finished_run, "--out", out, "--layer", 3, "--head", 1, "--images", *paths]
    result = run_cli("vit_jax.visualize", argv)
    assert result.code == 0, result.stderr
    assert (out / "attention_layer_3_head_1.png").exists()
    assert not (out / "attention_rollout.png").exists()


@pytest.mark.parametrize("is_trained", [True, False])
def test_main_plots_checkpoint_on_given_images(tiny_npz, run_cli, tmp_path, monkeypatch, is_trained):
    params = pretrained.load_npz(tiny_npz)
    params["head"]["kernel"] *= is_trained
    pretrained.save_npz(tmp_path / "x.npz", params)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)).save(tmp_path / "a.png")
    titles = []
    draw_attention = visualize.draw_attention
    monkeypatch.setattr(
        visualize,
        "draw_attention",
        lambda model, x, names, **rest: titles.append(names) or draw_attention(model, x, names, **rest),
    )
    argv = ["--model", tmp_path / "x.npz", "--out", tmp_path / "out", "--images", tmp_path / "a.png"]
    result = run_cli("vit_jax.visualize", argv)
    assert result.code == 0, result.stderr
    assert {path.stem for path in (tmp_path / "out").iterdir()} == set(FIGURES) - {
        "curves",
        "confusion",
        "reliability",
        "errors",
    }
    assert "not a run: curves, confusion matrix, reliability and errors are omitted" in result.stderr
    assert titles[0][0].startswith("a.png\npredicted: " if is_trained else "a.png")
    assert ("predicted" in titles[0][0]) == is_trained


def test_main_plots_parameters_of_checkpoint_without_images(tiny_npz, run_cli, tmp_path):
    result = run_cli("vit_jax.visualize", ["--model", tiny_npz, "--out", tmp_path / "out"])
    assert result.code == 0, result.stderr
    assert len(list((tmp_path / "out").iterdir())) == 3 and "attention is plotted for --images" in result.stderr


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--layer", "4"], 2, "--layer is 4; this VisionTransformer has 4, counted from 0"),
        (["--layer", "1", "--head", "-1"], 2, "--head is -1; this VisionTransformer has 4, counted from 0"),
        (["--head", "1"], 2, "--head needs --layer"),
        (["--num_images", "0"], 2, "--num_images is 0; expected at least 1"),
        (["--images", "setup.cfg"], 1, "setup.cfg"),
        (["--images", "/nowhere.png"], 1, "/nowhere.png"),
        (["--step", "7"], 1, "has no checkpoint of step 7; it has 20"),
        (["--workdir", "configs"], 1, "configs is neither a run directory nor an orbax or safetensors export"),
        (["--model", "micro", "--step", "7"], 2, "micro is not a run directory"),
        (["--model", "micro", "--layer", "4"], 2, "--layer is 4; this VisionTransformer has 4"),
    ],
)
def test_main_reports_errors_in_one_line(finished_run, run_cli, tmp_path, argv, code, message):
    source = [] if "--model" in argv else ["--workdir", finished_run]
    result = run_cli("vit_jax.visualize", [*source, "--out", tmp_path / "out", *argv])
    assert result.code == code
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_draw_all_omits_curves_without_metrics(finished_run, tmp_path):
    for name in ("checkpoints", "config.json"):
        (tmp_path / name).symlink_to(finished_run / name)
    assert next(visualize.draw_all(load_run(finished_run)))[0] == "curves"
    assert next(visualize.draw_all(load_run(tmp_path)))[0] == "position_similarity"
