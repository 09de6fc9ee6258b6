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

import pytest
import torch

from hf_clt.attribution.export import node_records
from hf_clt.attribution.graph import AttributionGraph, FeatureTarget, TokenTarget
from hf_clt.attribution.page import page_data, to_html


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = ["</script><b>", "a\nb", "<!--", "\u2028", '"\\', "\ud83d\ude00é", " "]


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
    found, through = torch.zeros_like(adjacency), []
    for source, target, weight, _ in data["edges"]:
        s, t = (names[data["nodes"][place]["id"]] for place in (source, target))
        found[t, s] = weight
        row = t if t < n else t - graph.first_target + n
        passed = influence[t] + (graph.target_weights[t - graph.first_target] if t >= graph.first_target else 0)
        through.append(float(abs(adjacency[t, s]) / sums[row] * passed))
    torch.testing.assert_close(found, adjacency, rtol=1e-3, atol=1e-6)
    assert through == sorted(through, reverse=True)
    shares = (torch.tensor(through).cumsum(0) / sum(through)).tolist()
    assert [edge[3] for edge in data["edges"]] == pytest.approx(shares, abs=1e-4)


def test_checks_get_the_ids_of_their_nodes():
    graph = make_graph()
    layer, position, feature = graph.features[3].tolist()
    found = {"predicted": -1.0, "measured": -0.5}
    graph.info["verified"] = {
        "frozen_error": 1e-5, "spearman": float("nan"), "count": 1, "nodes": {f"{layer}_{position}_{feature}": found}
    }  # fmt: skip
    assert page_data(graph)["verified"]["nodes"] == {f"{layer}_{feature}_{position}": found}


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

    def open(self, address, width=1400, height=900, dark=False):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=address)
        while self.run("document.readyState") != "complete" or self.run("location.href") == "about:blank":
            time.sleep(0.02)

    def click(self, selector, **more):
        self.move(selector)
        for kind in ("mousePressed", "mouseReleased"):
            x, y = self.place
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1, **more)

    def move(self, selector):
        self.place = self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'nearest'}});"
            "const b = (e.querySelector('.shape') || e).getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
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
        return faults + [
            e["params"]["entry"] for e in self.events if e["method"] == "Log.entryAdded" and e["params"]["entry"]["level"] == "error"
        ]  # fmt: skip

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
