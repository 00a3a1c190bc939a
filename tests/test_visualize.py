import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from configs import digits
from vit_jax import report, trainer, visualize
from vit_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of few steps: its pictures are what matters."""
    config = digits.get_config()
    config.update(num_steps=20, warmup_steps=5, eval_every_steps=20, checkpoint_every_steps=20)
    folder = tmp_path_factory.mktemp("runs") / "digits"
    trainer.train_and_evaluate(config, folder)
    return folder


@pytest.fixture(scope="module")
def drawn(workdir, run_command):
    out = workdir.parent / "pictures"
    result = run_command("-m", "vit_jax.visualize", "--workdir", workdir, "--out", out)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def colours(path) -> int:
    return len(np.unique(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3), axis=0))


def test_every_picture_is_drawn_and_named(drawn):
    out, said = drawn
    names = (
        "curves position_similarity position_matrix patch_filters confusion mistakes attention_rollout attention_heads"
    )
    assert {path.name for path in out.iterdir()} == {f"{name}.png" for name in names.split()}
    assert all(str(path) in said for path in out.iterdir())
    assert all(colours(path) > 50 for path in out.iterdir())


def test_probabilities_give_the_accuracy_of_the_run(workdir):
    run = trainer.load_run(workdir)
    test = trainer.load_test_dataset(run).test
    probabilities = trainer.predict(run, test.images)
    assert probabilities.shape == (360, 10)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, atol=1e-5)
    assert np.mean(probabilities.argmax(axis=-1) == test.labels) == trainer.evaluate_run(run)["test/accuracy"]


def test_one_layer_and_head_on_ones_own_pictures(workdir, run_command, tmp_path):
    rng = np.random.default_rng(0)
    names = ["wide.png", "grey.jpg"]
    Image.fromarray(rng.integers(0, 256, (40, 90, 3)).astype(np.uint8)).save(tmp_path / names[0])
    Image.fromarray(rng.integers(0, 256, (20, 20)).astype(np.uint8)).save(tmp_path / names[1])
    out = tmp_path / "out"
    pictures = [tmp_path / name for name in names]
    command = ["-m", "vit_jax.visualize", "--workdir", workdir, "--out", out, "--layer", 3, "--head", 1]
    result = run_command(*command, "--images", *pictures)
    assert result.returncode == 0, result.stderr
    assert (out / "attention_layer_3_head_1.png").exists()
    assert not (out / "attention_rollout.png").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--layer", "4"], 2, "--layer is 4; the model has 0 to 3"),
        (["--layer", "1", "--head", "-1"], 2, "--head is -1; the model has 0 to 3"),
        (["--head", "1"], 2, "--head needs --layer"),
        (["--num_images", "0"], 2, "--num_images is 0; expected at least 1"),
        (["--images", "setup.cfg"], 1, "setup.cfg"),
        (["--images", "/nowhere.png"], 1, "/nowhere.png"),
        (["--step", "7"], 1, "has no checkpoint of step 7; it has 20"),
    ],
)
def test_what_does_not_exist_is_one_line(workdir, run_command, tmp_path, words, code, message):
    result = run_command("-m", "vit_jax.visualize", "--workdir", workdir, "--out", tmp_path / "out", *words)
    assert result.returncode == code
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_checkpoint_is_one_line(run_command, tmp_path):
    result = run_command("-m", "vit_jax.visualize", "--workdir", tmp_path, "--out", tmp_path / "out")
    assert result.returncode == 1
    assert "holds no run" in result.stderr


# ---- the report


@pytest.fixture(scope="module")
def page(workdir, run_command):
    """The report as a file."""
    result = run_command("-m", "vit_jax.report", "--workdir", workdir)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(workdir / "report.html")
    return workdir / "report.html"


def test_the_report_is_one_page_that_needs_nothing_else(workdir, page):
    page = page.read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 8 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<script", page)
    accuracy = trainer.evaluate_run(trainer.load_run(workdir))["test/accuracy"]
    assert f"{accuracy:.2%}" in page and "20 steps × 64 pictures of 16 px" in page


def test_a_report_of_an_unfinished_run_is_refused(workdir, run_command, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    config = (tmp_path / "run/config.json").read_text().replace('"num_steps": 20', '"num_steps": 40')
    (tmp_path / "run/config.json").write_text(config)
    result = run_command("-m", "vit_jax.report", "--workdir", tmp_path / "run")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"error: {tmp_path / 'run'} is at step 20 of 40; a report is of a finished run"
    ]


def test_draw_all_leaves_out_curves_where_metrics_are_missing(workdir, tmp_path, capsys):
    run = trainer.load_run(workdir)
    options = {"pictures": [], "num_images": 1, "layer": None, "head": None}
    assert next(visualize.draw_all(run, workdir, **options))[0] == "curves"
    assert next(visualize.draw_all(run, tmp_path, **options))[0] == "position_similarity"
    assert f"{tmp_path} has no metrics up to step 20: no curves are plotted\n" in capsys.readouterr().err


def test_write_report_refuses_missing_metrics(workdir, tmp_path):
    for name in ("checkpoints", "config.json"):
        (tmp_path / name).symlink_to(workdir / name)
    with pytest.raises(UserError, match="is finished at step 20, but metrics.jsonl is missing; python -m"):
        report.write_report(tmp_path)


def test_a_run_leaves_its_report_once(run_command, tmp_path):
    few = ("--config.num_steps=4", "--config.warmup_steps=1")
    command = ("train.py", "--config", "configs/digits.py", "--workdir", tmp_path / "run", *few)
    result = run_command(*command, "--noreport")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "run/report.html").exists()
    result = run_command(*command)
    assert result.stdout.splitlines()[-1] == f"report: {tmp_path / 'run/report.html'}"
    assert "drawing the report" in result.stdout
    assert "--config.num_steps=4" in (tmp_path / "run/report.html").read_text()
    assert "drawing the report" not in run_command(*command).stdout


@pytest.fixture
def browser():
    """Chromium without a window."""
    programs = [shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")]
    if None in programs:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    try:
        yield driver
    finally:
        driver.quit()


_WIDER_THAN_THE_PAGE = """
return [...document.querySelectorAll("body *")]
    .filter(element => !element.closest(".wide, pre") && element.getBoundingClientRect().right > innerWidth)
    .map(element => element.outerHTML.slice(0, 80))
"""


@pytest.mark.parametrize("width", [400, 1400])
def test_the_report_in_a_browser(workdir, page, browser, width):
    page = page.absolute().as_uri()
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page)
    assert browser.get_log("browser") == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = {one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"}
    assert page in addresses and not {url for url in addresses - {page} if not url.startswith("data:")}

    assert browser.execute_script("return innerWidth") == width
    images = browser.find_elements("css selector", "img")
    assert len(images) == 8
    for image in images:
        assert image.get_property("complete") and image.get_property("naturalWidth") > 500
        assert 600 <= image.rect["width"] <= max(width, 640)  # legible; a narrow page scrolls it, not itself
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(_WIDER_THAN_THE_PAGE) == []
    sizes = "return [...document.querySelectorAll('p, td, th, pre')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert min(browser.execute_script(sizes)) >= 13
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert browser.find_element("css selector", ".big").text == f"{last['test/accuracy']:.2%}"
