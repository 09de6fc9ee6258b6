"""The page of an attribution graph: what is in it, and in a browser with mouse and keyboard."""

import base64
import json
import os
import re
import shutil
import subprocess
import time
from contextlib import contextmanager
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from hf_clt.attribution.export import node_records
from hf_clt.attribution.graph import AttributionGraph, FeatureTarget, TokenTarget
from hf_clt.attribution.page import page_data, to_html


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = ["</script><b>", "a\nb", "<!--", "\u2028", '"\\', "😀é", " "]


def make_graph(num_layers=3, num_tokens=7, num_features=24, seed=0, tokens=NASTY, details=True):
    """A graph of random edges that go upwards and to later positions, with all kinds of targets."""
    generator = torch.Generator().manual_seed(seed)
    cells = [(layer, position) for layer in range(num_layers) for position in range(1, num_tokens)]
    chosen = torch.randint(len(cells), (num_features,), generator=generator).tolist()
    numbers = torch.randint(50, (num_features,), generator=generator).tolist()
    features = torch.tensor(sorted({(*cells[cell], number) for cell, number in zip(chosen, numbers, strict=True)}))
    last = num_tokens - 1
    targets = [
        TokenTarget(5, last),
        TokenTarget(9, -1),
        TokenTarget(5, last, minus=9),
        FeatureTarget(num_layers - 1, 2, 7),
    ]
    n, m = len(features), len(targets)
    errors = torch.cartesian_prod(torch.arange(num_layers), torch.arange(num_tokens))
    places = torch.cat(
        [features[:, :2], errors, torch.stack([torch.full((num_tokens,), -1), torch.arange(num_tokens)], 1)]
    )
    ends = torch.tensor([[num_layers, last]] * 3 + [[num_layers - 1, 2]])
    rows = torch.cat([features[:, :2], ends])
    allowed = (places[None, :, 0] < rows[:, None, 0]) & (places[None, :, 1] <= rows[:, None, 1])
    edges = torch.randn(n + m, len(places), generator=generator) * allowed
    edges *= torch.rand(edges.shape, generator=generator) < 0.4
    return AttributionGraph(
        input_ids=torch.arange(100, 100 + num_tokens),
        tokens=[tokens[i % len(tokens)] for i in range(num_tokens)],
        features=features,
        activations=torch.rand(n, generator=generator) + 0.1,
        targets=targets,
        target_weights=torch.tensor([0.6, 0.2, 1.0, 1.0]),
        edges=edges,
        rest={"b_dec": torch.randn(n + m, generator=generator)},
        dropped=torch.rand(n + m, generator=generator),
        num_layers=num_layers,
        info={
            "target_words": {"5": "</script>", "9": " Paris"},
            "clt": "some/clt",
            "model": "<i>model</i>",
            "cleared": [0],
        },
        labels={(int(layer), int(f)): f"label </script> {layer}.{f}" for layer, _, f in features[::2]},
        details={
            (int(layer), int(f)): {
                "examples": [{"tokens": ["x", "</script>", "\n", "peak"], "acts": [0.0, 0.5, 0.0, 2.0]}] * 9,
                "top_logits": ["<img src=x>", " up"],
                "bottom_logits": [" down"],
            }
            for layer, _, f in features
            if details
        },
    )


class Scripts(HTMLParser):
    """The texts of script elements by id, and every element."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.elements, self.current = {}, [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.current = dict(attributes).get("id", "program") if tag == "script" else None

    def handle_endtag(self, tag):
        self.current = None

    def handle_data(self, data):
        if self.current:
            self.scripts[self.current] = data


def test_what_tokens_hold_stays_data(tmp_path):
    graph = make_graph()
    to_html(graph, tmp_path / "page.html")
    page = Scripts((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert json.loads(page.scripts["data"])["tokens"] == graph.tokens
    assert [tag for tag, _ in page.elements].count("script") == 2 and "b" not in [tag for tag, _ in page.elements]
    assert "innerHTML" not in page.scripts["program"] and "insertAdjacentHTML" not in page.scripts["program"]
    assert os.listdir(tmp_path) == ["page.html"]


def test_it_requests_nothing(tmp_path):
    to_html(make_graph(tokens=["a"]), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    for _, attributes in Scripts(text).elements:
        assert not {"src", "href", "srcset", "action"} & set(attributes)
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|url\(", text)
    assert "default-src 'none'" in text and "http://" not in text.replace("http://www.w3.org/2000/svg", "")


def test_edges_are_those_of_the_graph_the_most_influential_first():
    graph = make_graph()
    data, influence, n = page_data(graph), graph.influence().double(), graph.num_features
    names = {record["id"]: node for node, record in node_records(graph).items()}
    sums = (graph.edges.abs().sum(1) + graph.dropped).double()
    adjacency = graph.adjacency()
    ends, weights = (base64.b64decode(data["edges"][name]) for name in ("ends", "weights"))
    found, through = torch.zeros_like(adjacency), []
    places = np.frombuffer(ends, "<u2").reshape(-1, 2).tolist()
    for (source, target), weight in zip(places, np.frombuffer(weights, "<f4").tolist(), strict=True):
        s, t = (names[data["nodes"][place]["id"]] for place in (source, target))
        found[t, s] = weight
        row = t if t < n else t - graph.first_target + n
        passed = influence[t] + (graph.target_weights[t - graph.first_target] if t >= graph.first_target else 0)
        through.append(float(abs(adjacency[t, s]) / sums[row] * passed))
        assert abs(weight) * data["nodes"][target]["scale"] == pytest.approx(through[-1], rel=1e-5)
    torch.testing.assert_close(found, adjacency)
    assert through == pytest.approx(sorted(through, reverse=True), rel=1e-5)


def test_a_page_of_some_hundred_nodes_is_small(tmp_path):
    graph = make_graph(num_layers=20, num_tokens=12, num_features=500, tokens=[" the", " quite", " big"])
    for value in graph.details.values():
        value["examples"] = [{"tokens": [" token"] * 40, "acts": [0.123456] * 40}] * 20
    to_html(graph, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 2e6


def test_a_group_of_unknown_nodes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'Paris' names '1_2_3000'"):
        to_html(make_graph(), tmp_path / "page.html", supernodes=[["Paris", "1_2_3000"]])


# -- in a browser -----------------------------------------------------------------------------------------------------


class Browser:
    """Chromium over the pipes of its debugging protocol."""

    def __init__(self, folder):
        (from_page, self.write_end), (self.read_end, to_page) = os.pipe(), os.pipe()
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
        ]

        def ends():  # Chromium reads from 3 and writes to 4
            one, other = os.dup(from_page), os.dup(to_page)
            os.dup2(one, 3)
            os.dup2(other, 4)

        self.process = subprocess.Popen(
            [CHROMIUM, *options, "about:blank"],
            preexec_fn=ends,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_page)
        os.close(to_page)
        self.number, self.rest, self.session, self.events = 0, b"", None, []
        pages = self.send("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                data = os.read(self.read_end, 1 << 20)
                assert data, "the browser ended"
                self.rest += data
            text, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def run(self, expression):
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression):
        end = time.monotonic() + 10
        while not self.run(expression):
            assert time.monotonic() < end, f"never came: {expression}"
            time.sleep(0.02)

    def open(self, address, width=1400, height=900, dark=False):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def click(self, selector, **more):
        self.move(selector)
        for kind in ("mousePressed", "mouseReleased"):
            x, y = self.place
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1, **more)

    def move(self, selector):
        self.place = self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'nearest'}});"
            "const b = (e.querySelector('.shape') || e).getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=self.place[0], y=self.place[1])

    def press(self, key):
        text = {"Enter": "\r", "Space": " "}.get(key, key if len(key) == 1 else "")
        key = " " if key == "Space" else key
        codes = {
            "Enter": 13,
            "Escape": 27,
            "Tab": 9,
            "ArrowLeft": 37,
            "ArrowUp": 38,
            "ArrowRight": 39,
            "ArrowDown": 40,
        }
        code = codes.get(key, ord(key.upper()[0]))
        options = {"key": key, "windowsVirtualKeyCode": code} | ({"text": text} if text else {})
        self.send("Input.dispatchKeyEvent", type="keyDown", **options)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def type(self, text):
        self.send("Input.insertText", text=text)

    def picture(self, path):
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def faults(self):
        """Errors of the page, and whatever it asked for beyond itself."""
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        faults = [url for url in asked if not url.startswith(("file:", "about:", "blob:"))]
        faults += [e["params"] for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        logged = [e["params"]["entry"] for e in self.events if e["method"] == "Log.entryAdded"]
        return faults + [entry for entry in logged if entry["level"] == "error"]

    def close(self):
        self.session = None
        try:
            self.send("Browser.close")
            self.process.wait(20)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.write_end)
        os.close(self.read_end)


@contextmanager
def browser_in(folder):
    if CHROMIUM is None:
        pytest.skip("no Chromium here; install it to try the page in it")
    browser = Browser(folder)
    try:
        yield browser
    finally:
        browser.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browser_in(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture
def graph():
    return make_graph()


@pytest.fixture
def opened(browser, graph, tmp_path):
    """A page of the graph in a browser; it must end without an error or a request."""
    to_html(graph, tmp_path / "page.html")
    browser.events.clear()
    browser.open((tmp_path / "page.html").as_uri())
    yield browser
    assert not browser.faults()


def panel(browser):
    return browser.run("at('panel').innerText")


def strongest(graph, count=1):
    """Ids of the features of largest influence."""
    records = [record for record in node_records(graph).values() if record["kind"] == "feature"]
    return [record["id"] for record in sorted(records, key=lambda record: -record["influence"])][:count]


def focus(browser):
    return browser.run("document.activeElement.dataset.id || ''")


@pytest.mark.slow
@pytest.mark.parametrize("width, height", [(1400, 900), (800, 600)])
@pytest.mark.parametrize("dark", [False, True])
def test_every_node_has_its_place(opened, graph, tmp_path, width, height, dark):
    opened.open((tmp_path / "page.html").as_uri(), width, height, dark)
    records = list(node_records(graph).values())
    boxes = opened.run("[...document.querySelectorAll('.node')].map(e => [e.dataset.id, e.entity.x, e.entity.y])")
    places = {name: (x, y) for name, x, y in boxes}
    assert set(places) == {record["id"] for record in records}
    assert len(set(places.values())) == len(places)
    for one in records:
        for other in records:
            (x1, y1), (x2, y2) = places[one["id"]], places[other["id"]]
            assert one["layer"] >= other["layer"] or y1 > y2  # layers from bottom to top
            assert one["position"] >= other["position"] or x1 < x2
    heads = opened.run("[...document.querySelectorAll('#heads span')].map(e => e.textContent)")
    assert heads[:3] == ["</script><b>", "a⏎b", "<!--"] and heads[6] == "␣"
    back = opened.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back)[:3])) < 200) == dark
    assert opened.run("document.documentElement.scrollWidth <= innerWidth")
    assert opened.run("at('banner').textContent") == "Not checked against the model"
    opened.click("#theme")
    assert opened.run("getComputedStyle(document.body).backgroundColor") != back


@pytest.mark.slow
def test_a_click_shows_inputs_and_outputs_by_weight(opened, graph):
    name = strongest(graph)[0]
    node = next(place for place, record in node_records(graph).items() if record["id"] == name)
    ids = {place: record["id"] for place, record in node_records(graph).items()}
    opened.click(f'[data-id="{name}"]')
    adjacency = graph.adjacency()
    listed = [
        opened.run(f"edgesOf(byId.get('{name}'), '{side}').map(e => [e[0].id, e[1]])")
        for side in ("inputs", "outputs")
    ]
    for found, row in zip(listed, (adjacency[node], adjacency[:, node]), strict=True):
        expected = sorted(
            ((ids[i], row[i].item()) for i in row.nonzero().flatten().tolist()), key=lambda e: -abs(e[1])
        )
        assert [one[0] for one in found] == [one[0] for one in expected]
        assert [one[1] for one in found] == pytest.approx([one[1] for one in expected], rel=1e-6)
    rows = opened.run("[...document.querySelectorAll('#panel .edge')].map(e => e.dataset.to)")
    assert rows == [end for side in listed for end, _ in side]
    links = opened.run("document.querySelectorAll('.link').length")
    assert links == len(rows)
    text = panel(opened)
    assert "<img src=x>" in text and "Makes less likely" in text and "peak" in text and "b_dec" in text
    marks = opened.run(
        "[...document.querySelectorAll('.example span')].map(e => [e.textContent, e.style.background != ''])"
    )
    assert marks[:4] == [["x", False], ["</script>", True], ["\n", False], ["peak", True]]
    opened.click("#panel .edge")
    assert opened.run("state.selected") == rows[0]
    opened.press("Escape")
    assert opened.run("state.selected") is None


@pytest.mark.slow
def test_groups_by_hand_with_the_mouse(opened, graph, tmp_path):
    first, second, third = strongest(graph, 3)
    graph.info["verified"] = {"frozen_error": 1e-6, "spearman": 0.5, "count": 2, "nodes": {}}
    for name, measured in ((first, -1.0), (second, 2.0)):
        graph.info["verified"]["nodes"][name] = {"predicted": -0.5, "measured": measured}
    to_html(graph, tmp_path / "page.html")
    opened.open((tmp_path / "page.html").as_uri())
    assert "Checked in the model: 2 features" in opened.run("at('banner').textContent")
    for name in (first, second, third):
        opened.click(f'[data-id="{name}"]', modifiers=8)
    opened.click("#group")
    opened.type("say <b>")
    opened.press("Enter")
    opened.wait("state.groups.length")
    assert opened.run("state.groups.map(g => [g.name, ...g.ids])") == [["say <b>", first, second, third]]
    text = panel(opened)
    assert "say <b>" in text and "1 of 2 signs agree" in text and "not checked" in text
    opened.click("#collapse")
    assert opened.run("[...document.querySelectorAll('.node.group text')].map(e => e.textContent)") == ["say <b>"]
    assert not opened.run(f"document.querySelector('[data-id=\"{first}\"]')")
    # what leads out of the box is the sum over its members
    sums = opened.run("links.filter(l => l.from.kind === 'group').map(l => [l.to.id, l.weight])")
    records = {record["id"]: place for place, record in node_records(graph).items()}
    members = [records[name] for name in (first, second, third)]
    for name, weight in sums:
        assert weight == pytest.approx(graph.adjacency()[records[name], members].sum().item(), rel=1e-5)
    assert sums
    address = opened.run("location.href")
    opened.open(address)
    assert opened.run("[state.collapsed, state.groups[0].ids.length, state.selected]") == [True, 3, "group 0"]
    opened.run("location.hash = ''")
    opened.wait("!state.groups.length")
    assert first in address and "supernodes" in address


@pytest.mark.slow
def test_with_the_keyboard_alone(opened, graph):
    opened.run("focusOn(entities.find(n => n.kind === 'token' && n.position === 3))")
    start = focus(opened)
    opened.press("ArrowUp")
    up = focus(opened)
    assert up != start and opened.run(f"drawn.get(byId.get('{up}')).y < drawn.get(byId.get('{start}')).y")
    opened.press("ArrowDown")
    assert focus(opened) == start
    opened.press("ArrowRight")
    assert focus(opened).startswith("E_104")
    opened.press("ArrowLeft")
    assert focus(opened) == start
    assert opened.run("getComputedStyle(document.activeElement.querySelector('.ring')).display") == "block"
    opened.press("Enter")
    assert opened.run("state.selected") == start and focus(opened) == start
    opened.press("p")
    assert opened.run("[...state.pins]") == [start] and focus(opened) == start
    assert opened.run("document.activeElement.classList.contains('pinned')")
    opened.press("/")
    name = strongest(graph)[0]
    opened.type(name)
    assert opened.run("document.querySelectorAll('#found li').length") >= 1
    opened.press("Enter")
    assert focus(opened) == name == opened.run("state.selected")
    opened.press("Space")
    assert opened.run("[...marked]") == [name]
    opened.press("g")
    opened.press("Enter")  # the name that was proposed
    opened.wait("state.groups.length")
    assert opened.run("state.groups[0].ids") == [name]
    for _ in range(3):
        opened.press("Escape")
    assert opened.run("[state.selected, marked.size]") == [None, 0]
    for element in opened.run("[...document.querySelectorAll('.node')].map(e => e.getAttribute('aria-label'))"):
        assert element
    assert opened.run("document.querySelectorAll('.node[tabindex=\"0\"]').length") == 1


@pytest.mark.slow
def test_thresholds(opened, graph):
    records = list(node_records(graph).values())
    opened.run("at('nodes').value = 0.5; at('nodes').dispatchEvent(new Event('input'))")
    shown = set(opened.run("[...document.querySelectorAll('.node')].map(e => e.dataset.id)"))
    assert shown == {r["id"] for r in records if r["kind"] in ("token", "target") or r["cumulative"] <= 0.5}
    opened.run("at('nodes').value = 1; at('nodes').dispatchEvent(new Event('input'))")
    every = opened.run("links.length")
    assert every == int((graph.edges != 0).sum())
    opened.run("at('edges').value = 0.5; at('edges').dispatchEvent(new Event('input'))")
    shares = opened.run("edges.map(e => e.share)")
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
    assert opened.run("links.length") == sum(share <= 0.5 for share in shares) < every


@pytest.mark.slow
def test_nodes_that_are_alike_are_grouped(opened, graph):
    adjacency = graph.adjacency().double()
    n = graph.num_features
    inputs, outputs = (part / part.norm(dim=1, keepdim=True) for part in (adjacency[:n], adjacency.T[:n]))
    both = [i for i in range(n) if adjacency[i].any() and adjacency[:, i].any()]
    expected = ((inputs @ inputs.T + outputs @ outputs.T) / 2)[both][:, both]
    alike = "nodes.filter(n => n.kind === 'feature' && n.inputs.length && n.outputs.length)"
    found = torch.tensor(opened.run(f"similarities({alike}).map(row => [...row])"), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    def linked(least):  # average linkage, the plain way
        groups = [[i] for i in range(len(both))]
        while len(groups) > 1:
            mean, a, b = max(
                (expected[groups[i]][:, groups[j]].mean().item(), i, j) for j in range(len(groups)) for i in range(j)
            )
            if mean < least:
                break
            groups[a] += groups.pop(b)
        return {frozenset(group) for group in groups if len(group) > 1}

    for least in (0.05, 0.2):
        groups = opened.run(f"cluster(similarities({alike}), {least})")
        assert {frozenset(group) for group in groups} == linked(least) != set()
    opened.run("at('similarity').value = 0.05")
    opened.click("#auto")
    assert opened.run("state.groups.length") == len(linked(0.05))
    assert opened.run("state.groups.every(g => g.auto)")
    opened.click("#auto")
    assert opened.run("state.groups.length") == len(linked(0.05))


@pytest.mark.slow
def test_state_in_a_file(opened, graph, tmp_path):
    first, second = strongest(graph, 2)
    opened.run(
        f"state.pins.add('{first}'); state.groups.push({{name: 'x', ids: ['{second}'], auto: false}}); update()"
    )
    opened.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    opened.click("#save")
    path = tmp_path / "graph_state.json"
    end = time.monotonic() + 10
    while not (path.exists() and path.stat().st_size) and time.monotonic() < end:
        time.sleep(0.02)
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["pinnedIds"] == [first] and record["supernodes"] == [["x", second]]
    record["supernodes"].append(["y", "9_9_9", first])

    def load(text):
        path.write_text(text, encoding="utf-8")
        document = opened.send("DOM.getDocument")["root"]["nodeId"]
        node = opened.send("DOM.querySelector", nodeId=document, selector="#file")["nodeId"]
        opened.send("DOM.setFileInputFiles", files=[str(path)], nodeId=node)
        opened.wait("document.querySelectorAll('[role=alert]').length")

    opened.open((tmp_path / "page.html").as_uri())
    load(json.dumps(record))
    assert opened.run("state.groups.map(g => [g.name, ...g.ids])") == [["x", second], ["y", first]]
    assert "1 of the nodes that graph_state.json names are not in this graph" in panel(opened)
    load("{")
    opened.wait("at('panel').innerText.includes('is no state')")
    assert "is no state of a graph" in panel(opened) and opened.run("state.groups.length") == 2
