"""The page, in chromium: it answers as PyTorch does, shows what it says, and its address holds it."""
import base64
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from explore_data import OBJECTIVES, RESULTS, passes, run_for_page  # first: it finds the models

from data import PathStar, draw, find_arms, parse_graph, to_text
from model_gpt import GPT, GPTConfig
from model_mamba import Mamba, MambaConfig

PAGE = (RESULTS / "explore.html").as_uri()
DATA = json.loads((RESULTS / "explore_data.js").read_text()[len("const DATA = "):-2])
STAR = PathStar(*[DATA["models"][0]["config"][name] for name in ("deg", "path_len", "num_nodes")])
MADE = {"mamba": (Mamba, MambaConfig), "gpt": (GPT, GPTConfig)}
pytestmark = pytest.mark.browser


class Browser:
    """What a user does and sees."""

    def __init__(self, driver):
        self.driver = driver
        self.js, self.cdp = driver.execute_script, driver.execute_cdp_cmd

    def open(self, hash="", width=1280, height=720, page=PAGE, still=False, theme="light"):
        motion = "reduce" if still else "no-preference"
        features = {"prefers-reduced-motion": motion, "prefers-color-scheme": theme}
        media = [{"name": name, "value": value} for name, value in features.items()]
        self.cdp("Emulation.setEmulatedMedia", {"features": media})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.cdp("Emulation.setDeviceMetricsOverride", size)
        self.driver.get("about:blank")
        self.driver.get(page + hash)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def texts(self, selector):
        return [node.text for node in self.driver.find_elements("css selector", selector)]

    def press(self, keys, selector="body"):
        self.find(selector).send_keys(keys)

    def shown(self):
        """All that the stage shows, as text, and where its pictures have which colours."""
        classes = "[...document.querySelectorAll('.card [class]')].map((x) => `${x.getAttribute('class')}`)"
        return self.find("#stage").text, self.js(f"return {classes}")

    def until(self, condition, seconds=30):
        from selenium.webdriver.support.ui import WebDriverWait
        return WebDriverWait(self.driver, seconds, 0.05).until(lambda _: condition())


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("there is no chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", "disable-quic"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver):
    yield Browser(driver)
    assert driver.get_log("browser") == []                      # no error


def read_tensor(tensor):
    numbers = {name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=getattr(torch, dtype))
               for name, text in tensor.items()
               for dtype in [{"scale": "float32"}.get(name, name)]}
    if "float32" in numbers:
        return numbers["float32"]
    return numbers["int8"].view(len(numbers["scale"]), -1) * numbers["scale"][:, None]


def in_pytorch(data):
    """A model of the page."""
    Model, Config = MADE[data["kind"]]
    model = Model(Config(**{field.name: data["config"][field.name] for field in dataclasses.fields(Config)}))
    weights = model.state_dict()
    for name, tensor in data["tensors"].items():
        weights[name] = read_tensor(tensor).view(weights[name].shape)
    weights["lm_head.weight"] = next(x for name, x in weights.items() if "wte" in name or "embedding" in name)
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize("data", DATA["models"], ids=lambda data: f"{data['kind']}-{data['objective']}")
def test_answers_and_passes_are_pytorchs(browser, data):
    torch.set_num_threads(1)
    prefixes, _ = draw(STAR, 200, np.random.default_rng(200))
    logits = passes(in_pytorch(data), STAR, data["config"]["teacherless"], prefixes)
    texts = [to_text(prefix) for prefix in prefixes.tolist()]
    browser.open()
    said = browser.js("""
        const { config, model } = allModels.find((one) => one.kind === arguments[1] && one.objective === arguments[2]);
        return arguments[0].map((text) => ask(model, parseGraph(text, config)));
    """, texts, data["kind"], data["objective"])
    in_page = torch.tensor([one["passes"] for one in said]).transpose(0, 1)
    assert torch.equal(in_page, logits.argmax(3))
    for i, text in enumerate(texts):
        edges, path = parse_graph(text)
        hops = [arm[1] for arm in find_arms(edges, path[0])]
        shares = logits[:, i, 1].softmax(1)[:, hops]
        assert torch.allclose(torch.tensor(said[i]["odds"]), shares, atol=1e-3)


def test_recorded_runs_are_those_of_the_logs():
    logs = []
    for objective in (*OBJECTIVES, "reverse"):
        for file in sorted((RESULTS / "logs/default").glob(f"*-{objective}-seed*.jsonl")):
            header, *lines = map(json.loads, file.open())
            logs.append(run_for_page(header, lines))
    assert DATA["runs"] == logs


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_each_step_shows_its_claim_on_one_screen(browser, kind, theme):
    def punches():
        assert browser.js("return document.querySelector('#tools').getBoundingClientRect().bottom") <= 720
        tops.add(tuple(browser.js("return [...document.querySelectorAll('.card > *')].slice(0, -1)"
                                  ".map((x) => Math.round(x.getBoundingClientRect().top))")))
        return browser.texts(".punch")

    tops = set()
    graph = "&graph=" + DATA["telling"][kind]
    browser.open(f"#models={kind}{graph}", theme=theme)
    assert punches() == ["It walks the wrong arm.", "It finds the path."]
    hop = browser.find(".answer .is-wrong").text
    browser.press("g")
    assert punches() == [f"Its first hop stays {hop}.", f"Its first hop turns to {hop}."]
    browser.press("g")

    browser.press("2")
    last = DATA["models"][0]["config"]["n_loop"]
    said = []
    browser.press("p")
    for shown in range(1, last + 1):                            # the rows fill one after the other
        browser.until(lambda: len(browser.driver.find_elements("css selector", "td.odds")) == 2 * shown + 1)
        said.append(punches())
    assert all(left.startswith("First hop: ") for left, _ in said)
    found = [int(word) for word in said[-1][1] if word.isdigit()]
    assert found == list(range(STAR.path_len - 2, 0, -1)) and "then" in said[-1][1]

    browser.press("3")
    browser.until(lambda: " of 100" in punches()[0])
    left, right = [int(text.split()[2]) for text in punches()]
    assert 25 <= left <= 75 and right >= 95
    assert len(browser.texts(".dot.wrong")) == 200 - left - right
    browser.press("p")
    browser.until(lambda: "100 stay" in punches()[0])
    left, right = [int(text.split()[2]) for text in punches()]  # stay
    assert left >= 60 and right <= 5

    browser.press("4")
    forced = browser.texts(".card:first-child tr:last-child td")
    assert forced[1] == browser.texts(".card:first-child tr:nth-child(3) td")[1] != forced[2]
    assert set(forced[2:]) <= {"100 %", "99.9 %"}
    assert "Solved: on the left 0 of 10" in browser.find("#text").text
    browser.press("5")
    assert "on the right 10 of 10" in browser.find("#text").text
    assert browser.texts(".title")[1].startswith("Teacher-forced, goal first")
    punches()
    assert len(tops) == 1                                       # nothing jumps


def test_the_address_holds_the_state(browser):
    browser.open()
    start = browser.shown()
    pages = []
    for keys in ("m", "g", "2", "o", "o", "4", "o", "o"):
        browser.press(keys)
        pages.append((browser.driver.current_url, browser.shown()))
    for url, shown in (pages[1], pages[4], pages[-1]):
        browser.open(page=url)                                  # pasted
        assert browser.shown() == shown
    browser.open()
    for keys in "ma2":
        browser.press(keys)
        pages.append((browser.driver.current_url, browser.shown()))
    browser.driver.back()
    browser.until(lambda: browser.shown() == pages[-2][1])
    browser.driver.back()
    browser.driver.back()
    browser.until(lambda: browser.shown() == start)
    browser.driver.forward()
    browser.until(lambda: browser.shown() == pages[-3][1])
    for nonsense in ("x", "step=6", "models=constructor", "graph=1,2/1,2", "step=4&seed=1e9", "pass=0", "%"):
        browser.js(f"location.hash = '{nonsense}'")
        browser.until(lambda: "so this is the start" in browser.find("#notice").text)
        notice = browser.find("#notice").text
        assert browser.shown() == (start[0] + "\n" + notice, start[1])


def test_keys_leave_menus_and_fields_alone(browser):
    browser.open("#step=4")
    browser.press("1g", "#seed")
    assert "seed=1" in browser.driver.current_url and "step=4" in browser.driver.current_url
    browser.press("\ue012", "#slider")                          # arrow left
    assert "step=4" in browser.driver.current_url and "at=" in browser.driver.current_url
    browser.press("5", "#slider")
    browser.press("\ue012", "#another")
    assert "step=4" in browser.driver.current_url
    browser.press("1", "#another")
    own = to_text(draw(STAR, 1, np.random.default_rng(1))[0][0].tolist())
    browser.find("#own-text").clear()
    browser.press(own[:-1] + "gap1\n", "#own-text")
    assert "This is no graph" in browser.find("#notice").text and "step=1" in browser.driver.current_url
    browser.find("#own-text").clear()
    browser.press(own + "\n", "#own-text")
    assert own[:-1] in browser.driver.current_url
    browser.press("g", ".card button")
    assert "from=" in browser.driver.current_url
    browser.press(" ", "[data-focus=goal]")
    assert browser.driver.switch_to.active_element.get_attribute("data-focus") == "goal"


def test_guessing_first_and_reduced_motion(browser):
    browser.open(still=True)
    browser.find("#guess").click()
    browser.press("a")
    assert browser.texts(".answer") == ["", ""]
    browser.find(".punch button").click()
    assert "You guessed" in browser.find("#notice").text and "" not in browser.texts(".answer")
    browser.press("p")
    assert "step=2" in browser.driver.current_url and "pass" not in browser.driver.current_url.split("step")[1]


def test_a_phone_shows_the_graph_first(browser):
    for hash in ("", "#step=3", "#step=5"):
        browser.open(hash, 360, 740)
        assert browser.js("return document.documentElement.scrollWidth") == 360
        assert browser.js("return document.querySelector('.graph').getBoundingClientRect().bottom") < 370


def test_without_scripts_there_is_a_picture(browser):
    browser.cdp("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.open()
    assert "it needs JavaScript" in browser.find("body").text
    browser.cdp("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_page_of_a_run_of_ones_own(browser, tmp_path):
    def python(*words):
        return subprocess.run([sys.executable, *map(str, words)], cwd=RESULTS.parent, check=True)

    python("train.py", "--deg", 3, "--path_len", 4, "--num_nodes", 12, "--n_train", 64, "--n_test", 9,
           "--max_iters", 2, "--eval_interval", 1, "--out_dir", tmp_path / "run")
    python(RESULTS / "scripts/explore_data.py", tmp_path / "run")
    page = (tmp_path / "run/explore.html").as_uri()
    for step in "1234":
        browser.open(f"#step={step}", page=page)
        assert "train.py --deg 3" in browser.find("#text").text
        assert len(browser.texts(".punch")) == 1
    assert "5 Goal first" not in browser.find("#story").text
