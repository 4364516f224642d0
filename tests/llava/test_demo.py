"""The demo: two answers side by side with their costs, right for several people at once, and in a real browser."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from llava.eval.encoder import Encoder
from llava.mini.scenes import render, sample_scene
from llava.pruning import PruningConfig
from llava.serve import demo

QUESTION = "What does the green sign say?"


@pytest.fixture(scope="module")
def model() -> demo.Model:
    return demo.Model("llava-mini", "cpu")


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    return render(sample_scene(14, "validation"))


def test_an_answer_comes_with_its_tokens_and_its_costs(model, scene):
    config = PruningConfig("otprune", 0.098)
    whole, pruned = model.ask(scene, QUESTION, None), model.ask(scene, QUESTION, config)
    assert (whole.text, whole.total, whole.kept, len(whole.indices)) == ("fox", 576, 576, 576)
    assert (pruned.text, pruned.total, pruned.kept) == ("fox", 576, 56)
    assert pruned.indices == sorted(Encoder(model.model, model.processor).kept_order(scene, config))
    assert 0 < pruned.flops < whole.flops and pruned.seconds > 0


@pytest.mark.parametrize(
    ("method", "left", "kept"),
    [("fastv:layer=3", 56, (3 * 576 + 5 * 56) / 8), ("vtw:ratio=0.25", 0, 144), ("pyramiddrop:ratio=0.5", None, 288)],
)
def test_tokens_that_leave_inside_the_decoder_are_followed(model, scene, method, left, kept):
    answer = model.ask(scene, QUESTION, PruningConfig.from_text(method, 0.098), 1)
    assert answer.kept == pytest.approx(kept, rel=0.02) and answer.indices == sorted(set(answer.indices))
    assert left is None or len(answer.indices) == left


def test_a_cached_image_keeps_the_same_tokens_and_no_method_stays_behind(model, scene):
    config = PruningConfig("divprune", 0.05)
    assert model.ask(scene, QUESTION, config, 1, cached=True).indices == model.ask(scene, QUESTION, config, 1).indices
    assert model.model.pruning is None and model.model.visual_cache is None


def test_people_who_ask_at_once_get_what_each_would_get_alone(model, scene):
    asked = [
        (PruningConfig.from_text(name, 0.05), cached) for name in ("otprune", "fastv", "uniform") for cached in (0, 1)
    ]
    alone = [model.ask(scene, QUESTION, config, 4, cached=bool(cached)) for config, cached in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: model.ask(scene, QUESTION, one[0], 4, cached=bool(one[1])), asked))
    assert [(a.text, a.indices) for a in together] == [(a.text, a.indices) for a in alone]


@pytest.mark.parametrize(
    ("question", "said"),
    [("  ", "the question is empty"), ("what is <image>?", "<image> stands for an image"), ("why " * 5000, "too long")],
)
def test_a_question_that_cannot_be_asked_is_named(model, scene, question, said):
    with pytest.raises(ValueError, match=said):
        model.ask(scene, question, None)


def test_what_cannot_be_served_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(demo, "import_gradio", lambda: None)
    assert demo.main(["--model", "/nowhere"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "/nowhere" in line


def test_the_page_listens_on_this_machine_only_unless_told(monkeypatch):
    served = []
    monkeypatch.setattr(demo, "_serve", served.append)
    demo.main([])
    assert served[0].host == "127.0.0.1" and not served[0].share


@pytest.fixture(scope="module")
def address(model):
    """A served page."""
    pytest.importorskip("gradio", reason="the demo's page needs Gradio: pip install -e 'LLaVA[demo]'")
    page = demo.build_page(model)
    demo.launch(page, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close()


class Browser:
    """A headless Chromium at the page; `outside` collects what it asked of any other machine."""

    def __init__(self, address: str):
        webdriver = pytest.importorskip(
            "selenium.webdriver", reason="the browser test needs selenium: pip install selenium"
        )
        programs = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
        if None in programs:
            pytest.skip("the browser test needs Chromium and its driver: apt install chromium chromium-driver")
        options = webdriver.ChromeOptions()
        options.binary_location = programs[0]
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-proxy-server"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
        self.address = address

    def open(self, width: int, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(self.address)
        self.wait(lambda: self.driver.find_elements("css selector", "tr.tr-body"))

    def wait(self, condition, seconds: float = 60):
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, self.driver.find_element("tag name", "body").text
            time.sleep(0.1)
        return found

    def find(self, name: str, inside: str = ""):
        return self.driver.find_element("css selector", f"#{name} {inside}")

    def text(self, name: str) -> str:
        return self.find(name).text

    def ask(self) -> None:
        self.find("ask").click()

    def overflow(self) -> int:
        return self.driver.execute_script("return document.documentElement.scrollWidth - innerWidth")

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def outside(self) -> set[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
        return {url for url in asked if not url.startswith((self.address, "data:", "blob:"))}


@pytest.fixture
def browser(address):
    browser = Browser(address)
    yield browser
    browser.driver.quit()


@pytest.mark.parametrize("width", [1280, 412])
def test_a_person_compares_two_answers_and_steps_through_the_tokens(browser, width):
    browser.open(width)
    browser.ask()
    browser.wait(lambda: browser.text("status") == "there is no image: upload one, or choose a scene")

    browser.driver.find_elements("css selector", "tr.tr-body")[0].click()
    browser.wait(lambda: browser.find("question", "textarea").get_attribute("value") == QUESTION)
    browser.ask()
    browser.wait(lambda: "time to first token" in browser.text("pruned"))
    assert "fox" in browser.text("unpruned") and "576 of 576" in browser.text("unpruned")
    assert "fox" in browser.text("pruned") and "56 of 576 (9.7 %)" in browser.text("pruned")
    assert "(42." in browser.text("pruned")
    assert "56 of 576 visual tokens kept" in browser.text("tokens")

    browser.find("count", "input[type=range]").send_keys("\ue012" * 6)  # the left arrow
    browser.wait(lambda: "50 of 576 visual tokens kept" in browser.text("tokens"))
    assert browser.overflow() <= 0
    assert browser.console() == []
    assert browser.outside() == set()


def test_bad_input_is_a_sentence_on_the_page_and_the_server_goes_on(browser, tmp_path):
    damaged = tmp_path / "cut.png"
    render(sample_scene(14, "validation")).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:400])
    browser.open(1280)
    browser.driver.find_element("css selector", "input[type=file]").send_keys(str(damaged))
    browser.find("question", "textarea").send_keys(QUESTION)
    time.sleep(1)
    browser.ask()
    browser.wait(lambda: "damaged" in browser.text("status"))
