"""The tests of explore.html."""
import base64
import json
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
sys.path[:0] = [str(HERE), str(HERE / "scripts"), str(PROJECT)]

from test_all import TINY, call, refusal, settings  # first: it sets the threads

import numpy as np
import pytest
import torch

import data
import explore
import tables
import train
from data import PathStar


# ---- explore.html


def data_of(page):
    """The runs that stand in a page."""
    return json.loads(re.search('type="application/json" id="data">(.*?)</script>', page)[1])


@pytest.fixture(scope="module")
def own_page(tmp_path_factory):
    """The page of three small runs: -> the page, {name: Log}"""
    folder = tmp_path_factory.mktemp("runs")
    star = PathStar(2, 5, 12)
    graphs = data.draw(star, 300, np.random.default_rng(1))
    lines = [data.to_text(*graph) for graph in zip(*(tokens.tolist() for tokens in graphs))]
    (folder / "graphs.txt").write_text("\n".join(lines))
    files = ("--train_file", folder / "graphs.txt", "--test_file", folder / "graphs.txt")
    runs = {
        "forced": (), "own_graphs": ("--reverse", *files, "--seed", 1),
        "teacherless": ("--model", "mamba", "--teacherless", "--max_iters", 9),
    }
    for name, flags in runs.items():
        quick = ("--warmup_iters", 0, "--lr", 0.02)             # so that the answers change
        assert call(train, *TINY, *quick, *flags, "--out_dir", folder / name) == 0
    assert call(explore, *[folder / name for name in runs]) == 0
    logs = {str(folder / name): tables.read_log(folder / name / "log.jsonl") for name in runs}
    return folder / "forced" / "explore.html", logs


def test_the_page_is_that_of_the_logs():
    logs = explore.recorded_logs()
    page = (HERE / "explore.html").read_text()
    assert page == explore.page(logs, HERE, json.loads(explore.LIVE_MODELS.read_text()))
    assert not re.search("(src|href)=.?(https?:|//)", page)     # nothing from elsewhere


def test_a_page_of_ones_own_runs(own_page):
    page, logs = own_page
    shown = data_of(page.read_text())
    readme = re.search('href="(.*README.md)"', page.read_text())[1]
    assert (page.parent / readme).resolve() == PROJECT / "README.md"
    assert list(shown["runs"]) == list(logs)
    for name, log in logs.items():
        run = shown["runs"][name]
        for graph, line in zip(run["graphs"], log.header["graphs"], strict=True):
            assert line.endswith("=" + ",".join(map(str, graph["path"])))
            assert graph["path"] in graph["arms"] and len(graph["arms"]) == 2
        for evaluation, line in zip(run["evaluations"], log.lines, strict=True):
            assert evaluation["step"] == line["iter"]
            for key, short in (("answers", "answer"), ("p_first_hop", "p_first_hop")):
                assert evaluation[key] == [sample[short] for sample in line["samples"]]
            shares = [round(100 * share, 1) for share in line["node_accuracy"]]
            assert evaluation["nodes"] == shares


def test_a_page_of_what_is_no_run_is_refused(tmp_path, capsys):
    refusal(capsys, explore, tmp_path)
    assert not (tmp_path / "explore.html").exists()


@pytest.fixture
def browser():
    """A function that opens a page at a width, and gives a Selenium driver."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("there is no chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))

    def open_page(width, page, theme="light"):
        media = [{"name": "prefers-color-scheme", "value": theme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(page.as_uri())
        driver.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
        return driver

    yield open_page
    assert driver.get_log("browser") == []                      # no error
    driver.quit()


def shown_in(driver, panel, log):
    """-> the step in the panel's text, and the nodes of the answer in its table"""
    text = driver.find_element("css selector", f"#panel{panel} .share-text").text
    nodes = []
    for cell in driver.find_elements("css selector", f"#panel{panel} td.answer"):
        token = cell.text.strip("()✓✗ ")
        nodes.append(log.config["num_nodes"] + "|=/$".index(token) if token in "|=/$"
                     else int(token))
    return int(re.search("at step ([0-9,]+)", text)[1].replace(",", "")), nodes


def in_log(log, evaluation, graph):
    return log.lines[evaluation]["iter"], log.lines[evaluation]["samples"][graph]["answer"]


def read_tensor(tensor, shape):
    """A tensor of a page."""
    def numbers(key, dtype):
        return np.frombuffer(base64.b64decode(tensor[key]), dtype)

    if "float32" in tensor:
        x = numbers("float32", np.float32)
    else:
        x = numbers("int8", np.int8).reshape(shape) * numbers("scale", np.float32)[:, None]
    return torch.from_numpy(x.reshape(shape).copy())


def test_the_models_of_the_page_are_good():
    """As good as their runs, on new graphs, in spite of the rounding. The page has the same."""
    models = json.loads(explore.LIVE_MODELS.read_text())
    assert models == data_of((HERE / "explore.html").read_text())["live"]
    for model in models:
        if model["config"]["teacherless"]:
            assert model["accuracy"]["int8"] >= 0.99
        else:
            assert abs(model["accuracy"]["int8"] - 0.5) < 0.07  # four standard errors
        command = f"`{model['command'].rsplit(' --seed', 1)[0]}`"
        assert command in tables.default_table()     # a recorded kind of run


@pytest.mark.browser
def test_the_models_of_the_page_answer_as_pytorch_does(browser):
    driver = browser(1280, HERE / "explore.html")
    star = PathStar(2, 5, 10)
    graphs = data.draw(star, 200, np.random.default_rng(5))
    for model in data_of((HERE / "explore.html").read_text())["live"]:
        javascript_class = {"mamba": "Mamba", "gpt": "GPT"}[model["model"]]
        flags = ["--teacherless"] if model["config"]["teacherless"] else []
        args = settings("--model", model["model"], *flags)
        ours = train.build_model(args, star)
        weights = {
            name: read_tensor(tensor, ours.state_dict()[name].shape)
            for name, tensor in model["tensors"].items()
        }
        ours.load_state_dict(weights, strict=False)             # the lm_head is tied
        prefixes, solutions = train.prefixes_and_solutions(args, *graphs)
        answers, _, _ = train.predict(args, star, ours, prefixes, solutions)
        _, forced, _ = train.predict(args, star, ours, prefixes[:20], solutions[:20])
        if forced is not None:
            assert forced.tolist() == driver.execute_script(
                f"const model = new {javascript_class}(arguments[0]);"
                "return arguments[1].map((pair) => forcedPredictions(model, ...pair));",
                model, list(zip(prefixes[:20].tolist(), graphs[1][:20].tolist()))
            )
        theirs = driver.execute_script(
            f"const model = new {javascript_class}(arguments[0]);"
            "return arguments[1].map((prefix) => {"
            "  const { answer, logits } = generate(model, prefix, 5, arguments[2]);"
            "  return [answer, logits.map((each) => Array.from(each))];"
            "});", model, prefixes.tolist(), star.dollar
        )
        assert [answer for answer, _ in theirs] == answers.tolist()
        inputs, _ = train.inputs_and_targets(args, star, prefixes, answers)
        logits = ours(inputs)[0][:, -5:].detach()
        torch.testing.assert_close(torch.tensor([x for _, x in theirs]), logits, rtol=0, atol=1e-4)


@pytest.mark.browser
def test_two_models_can_be_asked(browser):
    """By mouse and by keyboard: a guess, the goal moved, another order, other names."""
    from selenium.webdriver import Keys
    driver = browser(1280, HERE / "explore.html")

    def text(selector):
        return driver.find_element("css selector", selector).text

    def click(selector):
        driver.execute_script("document.querySelector(arguments[0])"
                              ".dispatchEvent(new MouseEvent('click'))", selector)

    prefix = text("#tokens")
    assert text("#live0 .said") == text("#live1 .said") == ""   # not before the guess
    click("#guesses button")
    assert "of 1." in text("#guess-score") and "of 1." in text("#live1 .score")
    driver.find_element("css selector", "#ask-first").send_keys(" ")  # no more guesses
    click("#live1 .choose")
    assert "Turned to the new goal in 1 of 1." in text("#live1 .score")
    start, goal = text("#tokens")[-4:-1].split(",")
    assert text("#tokens")[:-3] == prefix[:-3] and text("#tokens") != prefix
    assert text("#live1 .said").startswith(start) and f"→ {goal}." in text("#live1 .said")
    driver.find_element("css selector", "#live0 .choose").send_keys(Keys.ENTER)
    assert "of 2." in text("#live0 .score") and text("#tokens") == prefix
    for _ in range(2):                                          # the focus stays
        driver.switch_to.active_element.send_keys(" ")
        assert driver.execute_script("return state.timer") is None  # nothing plays
    assert "of 4." in text("#live0 .score") and text("#tokens") == prefix
    click("#new-order")
    assert "Only the order of the edges changed" in text("#live0 .change")
    assert sorted(text("#tokens")[:-5].split("|")) == sorted(prefix[:-5].split("|"))
    click("#new-names")
    click("#new-graph")
    assert re.match("Right in [0-8] of 8. Turned to the new goal in [0-4] of 4.$",
                    text("#live0 .score"))


@pytest.mark.browser
@pytest.mark.parametrize("width, theme", [(360, "dark"), (1280, "light")])
def test_the_story_shows_what_it_says(browser, width, theme):
    """Each chapter, and again from the address that it leaves."""
    page = HERE / "explore.html"
    driver = browser(width, page, theme)
    color = driver.find_element("css selector", "body").value_of_css_property("background-color")
    assert (int(re.search(r"\d+", color)[0]) > 128) == (theme == "light")
    run = data_of(page.read_text())["runs"]
    left = run["mamba-teacher_forced-seed0"]["evaluations"]
    teacherless = run["mamba-teacherless-seed0"]["evaluations"]
    reverse = run["mamba-reverse-seed0"]["evaluations"]
    at_400 = [evaluation for evaluation in teacherless if evaluation["step"] == 400][0]
    path = run["mamba-teacherless-seed0"]["graphs"][7]["path"]
    wrong_first_hop = [node == right for node, right in zip(at_400["answers"][7], path)]
    assert wrong_first_hop == [True, False, True, True, True]
    assert min(left[-1]["forced"][2:]) >= 99.5                  # the cheat
    shares = [(left[0], teacherless[0]), (left[-1], teacherless[-1]), (left[-1], None),
              (None, at_400), (left[-1], reverse[-1])]
    for chapter, expected in enumerate(shares):
        driver.execute_script(
            "document.querySelectorAll('#chapters button')[arguments[0]].click()", chapter
        )
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        for _ in range(2):
            for panel, evaluation in enumerate(expected):
                if evaluation is not None:
                    shown = driver.find_element("css selector", f"#panel{panel} .share").text
                    assert shown == f"{evaluation['accuracy']:.1f} %"
            driver.refresh()
    button = "document.querySelectorAll('#chapters button')[2]"
    text = driver.execute_script(f"{button}.click(); return byId('chapter').textContent")
    assert "“Node by node”" in text
    assert driver.find_element("css selector", "#panel1 table").is_displayed()
    driver.execute_script("show(1, 'mamba-reverse-seed0')")     # the text would be wrong
    assert driver.find_element("id", "chapter").text == ""
    assert driver.execute_script(f"return {button}.ariaPressed") == "false"


@pytest.mark.browser
def test_the_page_shows_what_the_log_says(browser, own_page):
    """By the slider, by keys and by the menus."""
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.ui import Select
    page, logs = own_page
    forced, own_graphs, teacherless = logs.values()
    driver = browser(1100, page)

    def press(*keys):
        ActionChains(driver).send_keys(*keys).perform()

    for at in (0, 1, 3):
        driver.execute_script(
            "const slider = document.getElementById('slider'); slider.value = arguments[0];"
            "slider.dispatchEvent(new Event('input'));", at
        )
        assert shown_in(driver, 0, forced) == in_log(forced, min(at, 2), 0)
        assert shown_in(driver, 1, teacherless) == in_log(teacherless, at, 0)
    press(Keys.ARROW_LEFT, Keys.ARROW_LEFT, "4")
    assert shown_in(driver, 0, forced) == in_log(forced, 1, 3)
    assert shown_in(driver, 1, teacherless) == in_log(teacherless, 1, 3)
    play = driver.find_element("id", "play")
    press(" ")
    assert "Pause" in play.text
    press(" ")
    assert "Play" in play.text
    menu = Select(driver.find_element("css selector", "#panel0 .objective"))
    menu.select_by_visible_text("reversed")
    assert shown_in(driver, 0, own_graphs)[1] in [in_log(own_graphs, i, 3)[1] for i in range(3)]
    assert driver.find_element("id", "differ").is_displayed()


@pytest.mark.browser
def test_each_entry_of_the_menus_shows_such_a_run(browser):
    """A model and an objective. The keys go on working after each choice."""
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.ui import Select
    driver = browser(1280, HERE / "explore.html")
    runs = data_of((HERE / "explore.html").read_text())["runs"]
    kinds = {(run["model"], run["objective"]) for run in runs.values()}
    for model, objective in sorted(kinds):
        for menu, entry in ((".model", model), (".objective", objective)):
            choice = Select(driver.find_element("css selector", f"#panel0 {menu}"))
            choice.select_by_visible_text(entry)
        title = driver.find_element("css selector", "#panel0 .title").text
        assert title == f"{model}, {objective}"
        before = driver.execute_script("return state.at")
        ActionChains(driver).send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, "3").perform()
        assert driver.execute_script("return [state.at, state.graph]") == [max(before - 2, 0), 2]
        assert driver.find_element("css selector", "#panel0 .title").text == title


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 768, 1400])
def test_the_page_fits(browser, own_page, width):
    """Nothing overflows, whichever run is shown."""
    page, logs = own_page
    driver = browser(width, page)
    for name in logs:
        driver.execute_script("show(0, arguments[0]);", name)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width, name


@pytest.mark.browser
def test_a_long_path_can_be_read_on_a_phone(browser, tmp_path):
    """Graph and table are wider than the page then. They scroll, and the page does not."""
    size = ("--deg", 2, "--path_len", 12, "--num_nodes", 24)
    assert call(train, *TINY, *size, "--out_dir", tmp_path) == 0
    assert call(explore, tmp_path) == 0
    driver = browser(360, tmp_path / "explore.html")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
    for part in ("graph svg", "table table"):
        width = f"return document.querySelector('#panel0 .{part}').clientWidth"
        assert driver.execute_script(width) > 600, part
