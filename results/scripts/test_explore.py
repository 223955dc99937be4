"""The page, in chromium: it answers as PyTorch does, and shows what it says."""
import base64
import json
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from explore_data import OBJECTIVES, RESULTS, passes, run_for_page  # first: it finds the models

from data import PathStar, draw, to_text
from model_gpt import GPT, GPTConfig
from model_mamba import Mamba, MambaConfig

PAGE = (RESULTS / "explore.html").as_uri()
DATA = json.loads((RESULTS / "explore_data.js").read_text()[len("const DATA = "):-2])
STAR = PathStar(*[DATA["models"][0]["config"][name] for name in ("deg", "path_len", "num_nodes")])
MADE = {"mamba": (Mamba, MambaConfig), "gpt": (GPT, GPTConfig)}
CONTROL, END, ARROW_LEFT = "\ue009", "\ue010", "\ue012"          # as selenium calls them
pytestmark = pytest.mark.browser


class Browser:
    def __init__(self, driver):
        self.driver, self.js, self.cdp = driver, driver.execute_script, driver.execute_cdp_cmd

    def open(self, hash="", width=1280, page=PAGE, **media):
        self.cdp("Emulation.setEmulatedMedia", {"features": [
            {"name": f"prefers-{name}", "value": media[name]} for name in media]})
        self.cdp("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": 720, "deviceScaleFactor": 1, "mobile": width < 500})
        self.driver.get("about:blank")
        self.driver.get(page + hash)

    def each(self, selector, what="x.innerText.trim()"):
        return self.js(f"return [...document.querySelectorAll('{selector}')].map((x) => {what})")

    def shown(self):
        return self.each("#stage > :not(#notice)"), self.each(".card *", "x.getAttribute('class')")

    def press(self, keys, selector="body", *expected):
        self.driver.find_element("css selector", selector).send_keys(keys)
        assert all(part in self.driver.current_url for part in expected)

    def until(self, condition):
        ends = time.time() + 120
        while not condition():
            assert time.time() < ends
            time.sleep(0.1)


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location, chromedriver = map(shutil.which, ("chromium", "chromedriver"))
    if not (options.binary_location and chromedriver):
        pytest.skip("there is no chromium and chromedriver")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    driver.set_script_timeout(120)
    yield Browser(driver)
    errors = driver.get_log("browser")
    driver.quit()
    assert errors == []


def in_pytorch(data):
    def read(text, dtype):
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype)

    Model, Config = MADE[data["kind"]]
    model = Model(Config(**{field.name: data["config"][field.name] for field in fields(Config)}))
    weights = model.state_dict()                                # lm_head is one with the embedding
    for name, tensor in data["tensors"].items():
        x = read(tensor.get("float32") or tensor["scale"], torch.float32)
        if "int8" in tensor:
            x = read(tensor["int8"], torch.int8).view(len(x), -1) * x[:, None]
        weights[name].copy_(x.view_as(weights[name]))
    return model.eval()


@pytest.mark.parametrize("data", DATA["models"], ids=lambda data: data["kind"] + data["objective"])
def test_answers_and_passes_are_pytorchs(browser, data):
    torch.set_num_threads(1)
    prefixes, _ = draw(STAR, 200, np.random.default_rng(200))
    logits = passes(in_pytorch(data), STAR, data["config"]["teacherless"], prefixes)
    browser.open()
    said = browser.js("""
        const { config, model } = allModels[arguments[1]];
        return arguments[0].map((text) => parseGraph(text, config))
          .map((graph) => ({ arms: graph.arms, ...ask(model, graph) }));
    """, [to_text(prefix) for prefix in prefixes.tolist()], DATA["models"].index(data))
    for i, one in enumerate(said):
        chosen = logits[:, i].gather(2, torch.tensor(one["passes"])[:, :, None])[:, :, 0]
        assert torch.allclose(chosen, logits[:, i].amax(2), atol=1e-3)  # the rounding decides a tie
        shares = logits[:, i, 1].softmax(1)[:, [arm[1] for arm in one["arms"]]]
        assert torch.allclose(torch.tensor(one["odds"]), shares, atol=1e-3)


def test_recorded_runs_are_those_of_the_logs():
    logs = [map(json.loads, file.open()) for objective in (*OBJECTIVES, "reverse")
            for file in sorted((RESULTS / "logs/default").glob(f"*-{objective}-seed*.jsonl"))]
    assert DATA["runs"] == [run_for_page(header, lines) for header, *lines in logs]


@pytest.mark.parametrize("kind, theme", [("mamba", "light"), ("gpt", "dark")])
def test_each_step_shows_its_claim_on_one_screen(browser, kind, theme):
    places = set()

    def punches():
        assert browser.each("#tools", "x.getBoundingClientRect().bottom")[0] <= 720
        places.add(tuple(browser.each(".card > *", "Math.round(x.getBoundingClientRect().top)")))
        return browser.each(".punch")

    browser.open(f"#models={kind}", **{"color-scheme": theme})
    assert punches() == ["It walks the wrong arm.", "It finds the path."]
    hop = browser.each(".answer .is-wrong")[0]
    browser.press("g")
    assert f"stays {hop}: right only by luck" in punches()[0] and f"turns to {hop}." in punches()[1]
    browser.press("g2p")
    for shown in range(1, 1 + DATA["models"][0]["config"]["n_loop"]):
        browser.until(lambda: len(browser.each("td.odds")) == 2 * shown + 1)   # row by row
        assert "First hop: " in punches()[0]
    assert punches()[1] in ("Found hop 3, then 2, then 1.", "Found hop 3 and 2, then 1.")
    assert len(browser.each("mark")) == len(browser.each("td.new")) > 3
    for kinds in browser.js("return [passKinds(0), passKinds(1)]"):     # found is found for good
        assert all(sorted(place, key="right".__eq__) == list(place) for place in zip(*kinds))
    browser.press("3")
    browser.press("g", "body", browser.driver.current_url)      # not for it
    assert punches() == ["", ""]
    browser.press("p")
    browser.until(lambda: "of 100" in punches()[0])
    left, right = [int(text.split()[3]) for text in punches()]
    assert 25 <= left <= 75 and right >= 95
    assert len(browser.each(".dot.wrong")) == 200 - left - right
    browser.press("p")
    browser.until(lambda: sum(map(int, punches()[0].split()[2::2])) == 100)    # all accounted for
    assert int(punches()[0].split()[2]) >= 60 and int(punches()[1].split()[2]) <= 5
    browser.press("4")
    assert "Step 0: " in punches()[0]
    browser.press(END, "#slider")
    assert "Solved at step " in punches()[1]
    own, forced = [browser.each(f".card:first-child tr:nth-child({row}) td") for row in (4, 5)]
    assert own[1] == forced[1] and set(forced[2:]) <= {"100 %", "99.9 %"}
    browser.press("5")
    assert punches() and "0 on the left and 10 on the right are solved" in browser.each("#text")[0]
    assert browser.each(".card:last-child th[scope=col]")[::4] == ["goal", "start"]
    assert len(places) == 1                                     # nothing jumps


def test_the_address_holds_the_state(browser):
    def after(key):
        browser.press(key)
        return browser.driver.current_url, browser.shown()

    browser.open()
    start, pages = browser.shown(), list(map(after, "mg2oo4oo"))
    for url, shown in (pages[1], pages[4], pages[-1]):          # pasted
        browser.open(page=url)
        assert browser.shown() == shown
    browser.open()
    pages = [start, *(shown for _, shown in map(after, "ma2"))]
    for move, shown in (("back", 2), ("back", 1), ("back", 0), ("forward", 1)):
        browser.js(f"history.{move}()")
        browser.until(lambda: browser.shown() == pages[shown])
    for nonsense in ("x", "step=6", "models=constructor", "graph=1,2/1,2", "step=4&seed=1e9", "%"):
        browser.open("#" + nonsense)
        assert "so this is the start" in browser.each("#notice")[0] and browser.shown() == start


def test_keys_leave_menus_and_fields_alone(browser):
    browser.open("#step=4")
    browser.press("1o", "#seed", "step=4", "seed=1", "at=")     # o: the page has the keys again
    browser.press(END, "#slider", "step=4", "at=")
    browser.press("5", "#slider", "step=5")
    browser.press(ARROW_LEFT, "#another", "step=4")
    browser.press("1", "#another", "step=1")
    own = to_text(draw(STAR, 1, np.random.default_rng(1))[0][0].tolist())
    for text in (own + "gap1", own):
        browser.press(CONTROL + "a", "#own-text")
        browser.press(text + "\n", "#own-text")
        assert ("does not fit" in browser.each("#notice")[0]) == (text != own)
        assert (own[:-1] in browser.driver.current_url) == (text == own)
    browser.press("g", "#another", "step=1", "from=")
    browser.press(" 2", "[data-focus=goal]", "step=2")


def test_guessing_first_and_little_motion(browser):
    browser.open(**{"reduced-motion": "reduce"})
    for key, place, hidden, says in (
            (" ", "#guess", 4, ""), ("p", "#guess", 4, ""),
            (" ", ".punch button", 0, "Your guess was"), ("a", "body", 4, ""),
            (" ", "#guess", 0, "")):
        browser.press(key, place)
        assert browser.each(".answer, .strip").count("") == hidden
        assert says in browser.each("#notice")[0]
    browser.press("2p", "body", "step=2")                       # to the last pass at once
    assert "pass=" not in browser.driver.current_url


def test_a_phone_shows_text_and_graph_and_no_script_a_picture(browser):
    for hash in ("", "#step=3", "#step=5"):
        browser.open(hash, 360)
        assert browser.each("html", "x.scrollWidth") == [360]
        places = browser.each("#text, .graph", "x.getBoundingClientRect().bottom")
        assert sorted(places) == places and places[1] < 720
    browser.cdp("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.open()
    assert "it needs JavaScript" in browser.driver.find_element("css selector", "body").text
    browser.cdp("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_page_of_a_run_of_ones_own(browser, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags, out = "--deg 3 --path_len 4 --num_nodes 12 --n_train 64 --max_iters 2", tmp_path / "run"
    for words in (f"train.py {flags} --out_dir {out}", f"results/scripts/explore_data.py {out}"):
        subprocess.run([sys.executable, *words.split()], cwd=RESULTS.parent, check=True)
    for step in "1234":
        browser.open(f"#step={step}", page=(out / "explore.html").as_uri())
        assert flags in browser.each("#text")[0] and len(browser.each(".punch")) == 1
    assert "5 Goal first" not in browser.each("#story")[0]
