import json
import re
import shutil

import pytest
from conftest import TINY, edit_run

from vit_jax import report
from vit_jax.run import load_run
from vit_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def workdir(finished_run, tmp_path_factory):
    """A run directory that the tests may write to."""
    directory = tmp_path_factory.mktemp("runs") / "digits"
    shutil.copytree(finished_run, directory)
    return directory


@pytest.fixture(scope="module")
def page(workdir, run_command):
    """Path of the report."""
    result = run_command("-m", "vit_jax.report", "--workdir", workdir)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(workdir / "report.html")
    return workdir / "report.html"


def test_write_report_creates_self_contained_page(workdir, page):
    page = page.read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 9 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<script", page)
    accuracy = load_run(workdir).evaluate()["test/accuracy"]
    assert f"{accuracy:.2%}" in page and "20 steps × 64 images of 16 px" in page


def test_write_report_counts_images(page):
    page = page.read_text()
    assert "<th>training images</th><td>1,437; 137 to 153 per class</td>" in page
    assert "<th>test images</th><td>360; 28 to 44 per class</td>" in page


def test_write_report_shows_reference_results(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    results = [["digits", "<published>", 0.9876], ["cifar10", "other", 0.1234]]
    edit_run(tmp_path / "run", {"reference_results": results})
    page = report.write_report(tmp_path / "run").read_text()
    assert "<th>&lt;published&gt;</th><td>98.76%</td>" in page and "12.34%" not in page


def test_main_rejects_unfinished_run(workdir, run_cli, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    edit_run(tmp_path / "run", {"num_steps": 40})
    result = run_cli("vit_jax.report", ["--workdir", tmp_path / "run"])
    assert result.code == 1
    assert result.stderr.splitlines() == [f"error: {tmp_path / 'run'} is at step 20 of 40; expected a finished run"]


def test_write_report_rejects_missing_metrics(workdir, tmp_path):
    for name in ("checkpoints", "config.json"):
        (tmp_path / name).symlink_to(workdir / name)
    with pytest.raises(UserError, match="is finished at step 20, but metrics.jsonl is missing; python -m"):
        report.write_report(tmp_path)


def test_train_writes_report_once(run_command, run_cli, tmp_path):
    sizes = [f"--config.model.{name}={value}" for name, value in {**TINY, "patch_size": 16}.items()]
    overrides = ["--config.num_steps=4", "--config.warmup_steps=1", *sizes]
    command = ["--config", "configs/digits.py:scratch", "--workdir", tmp_path / "run", *overrides]
    result = run_command("train.py", *command, "--noreport")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "run/report.html").exists()
    result = run_cli("train", command)
    assert result.stdout.splitlines()[-1] == f"report: {tmp_path / 'run/report.html'}"
    assert "writing the report" in result.stdout
    assert "--config.num_steps=4" in (tmp_path / "run/report.html").read_text()
    assert "writing the report" not in run_cli("train", command).stdout


@pytest.fixture
def browser():
    """Headless Chromium."""
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
    .filter(element => element.getBoundingClientRect().right > innerWidth || element.scrollWidth > innerWidth)
    .map(element => element.outerHTML.slice(0, 80))
"""


@pytest.mark.parametrize("width", [400, 1400])
def test_write_report_fits_width_of_browser(workdir, page, browser, width):
    page = page.absolute().as_uri()
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page)
    assert browser.get_log("browser") == []
    entries = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    addresses = {
        entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"
    }
    assert page in addresses and not {url for url in addresses - {page} if not url.startswith("data:")}

    assert browser.execute_script("return innerWidth") == width
    images = browser.find_elements("css selector", "img")
    assert len(images) == 9
    for image in images:
        assert image.get_property("complete") and image.get_property("naturalWidth") > 500
        assert min(width, 600) - 50 <= image.rect["width"] <= width  # a scroll bar may take 15 px
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(_WIDER_THAN_THE_PAGE) == []
    sizes = "return [...document.querySelectorAll('p, td, th, pre')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert min(browser.execute_script(sizes)) >= 13
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert browser.find_element("css selector", ".big").text == f"{last['test/accuracy']:.2%}"
