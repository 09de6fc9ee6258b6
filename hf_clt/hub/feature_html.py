"""
The pages of `feature_pages`: HTML that needs no server and requests nothing. One page per layer holds the records of
all its features; one page leads to the layers.
"""

import base64
import html
import json
from collections.abc import Iterable
from pathlib import Path

from ..evaluation.feature_examples import FeatureActivity
from ..files import replacing, write_text


def write_layer_page(path: Path, records: Iterable[bytes], activity: FeatureActivity, layer: int, title: str) -> None:
    """
    Writes the page of one layer: a list of its features, and their records.

    Args:
        path (`Path`): Where to.
        records (iterable of `bytes`): JSON in gzip, one per feature. They stand in the page in base64, and it unpacks
            the one that is looked at; the text in it is set as text, never as HTML.
        activity ([`FeatureActivity`]): Of one pass over the text.
        layer (`int`): Which layer.
        title (`str`): Name of the CLT.
    """
    found = activity.layers[layer]
    peaks = [f"{peak:.3g}" for peak in found.largest.tolist()]
    summary = {
        "layer": layer,
        "layers": len(activity.layers),
        "tokens": activity.num_tokens,
        "counts": found.counts.tolist(),
        "peaks": [float(peak) for peak in peaks],
    }
    alive = int((found.counts > 0).sum())
    facts = (
        f"{len(found.counts):,} features, {alive:,} of them active on {activity.num_tokens:,} tokens; "
        f"L0 {found.counts.sum().item() / activity.num_tokens:.1f}"
    )
    head = LAYER_PAGE_HEAD.format(
        policy=POLICY,
        style=STYLE,
        title=html.escape(f"Layer {layer}: features of {title}"),
        heading=html.escape(f"Layer {layer}"),
        clt=html.escape(title),
        facts=html.escape(facts),
        links=_layer_links(len(activity.layers), layer),
        summary=_json_in_script(summary),
    )
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(head)
        for packed in records:
            file.write(base64.b64encode(packed).decode("ascii") + "\n")
        file.write(f"</script>\n<script>\n{PAGE_SCRIPT}\n</script>\n</body>\n</html>\n")


def write_index_page(path: Path, activity: FeatureActivity, settings: dict[str, str], title: str) -> None:
    """Writes the page that leads to the layers, with what everything was made with."""
    rows = []
    for layer, found in enumerate(activity.layers):
        cells = (
            f'<a href="layer_{layer}.html">layer {layer}</a>',
            f"{found.counts.sum().item() / activity.num_tokens:.1f}",
            f"{(found.counts == 0).double().mean().item():.1%}",
            f"{found.largest.max().item():.3g}",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    made = [f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in settings.items()]
    page = INDEX_PAGE.format(
        policy=POLICY,
        style=STYLE,
        title=html.escape(f"Features of {title}"),
        facts=html.escape(f"{activity.num_tokens:,} tokens in {activity.num_blocks:,} blocks were looked at."),
        rows="\n".join(rows),
        made="\n".join(made),
    )
    write_text(path, page)


def _layer_links(num_layers: int, here: int) -> str:
    return " ".join(
        f"<b>{layer}</b>" if layer == here else f'<a href="layer_{layer}.html">{layer}</a>'
        for layer in range(num_layers)
    )


def _json_in_script(value) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


# -- what the pages are made of ---------------------------------------------------------------------------------------

# The browser itself then refuses every request to anywhere.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

STYLE = """
:root { --ink: #20242a; --soft: #69717c; --line: #dfe3e8; --paper: #fff; --tint: #f5f7f9; --mark: 226, 122, 20;
  --accent: #2f6db3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #98a1ad; --line: #363c45; --paper: #16191d; --tint: #1f2329; --mark: 240, 140, 40;
    --accent: #7db0ea; }
}
* { box-sizing: border-box; }
body { margin: 0; font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
header { padding: 14px 20px 10px; border-bottom: 1px solid var(--line); }
h1 { margin: 0; font-size: 19px; }
h2 { margin: 0 0 2px; font-size: 17px; }
h3 { margin: 20px 0 6px; font-size: 12px; color: var(--soft); font-weight: 600; letter-spacing: .02em; }
.soft, th { color: var(--soft); font-weight: normal; }
.layers { margin-top: 4px; overflow-wrap: anywhere; }
main { padding: 16px 20px; min-width: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: 2px 14px 2px 0; text-align: left; vertical-align: top; }
.columns { display: grid; grid-template-columns: 270px 1fr; min-height: calc(100vh - 92px); }
nav { border-right: 1px solid var(--line); background: var(--tint); padding: 10px; }
nav .list { overflow-y: auto; max-height: calc(100vh - 200px); }
nav button { display: flex; width: 100%; gap: 8px; border: 0; background: none; color: inherit; font: inherit;
  padding: 2px 6px; text-align: left; cursor: pointer; border-radius: 4px; font-variant-numeric: tabular-nums; }
nav button span:first-child { flex: 1; }
nav button span:nth-child(2) { width: 76px; text-align: right; }
nav button span:nth-child(3) { width: 60px; text-align: right; }
nav button:hover { background: var(--line); }
nav button.here { background: var(--accent); color: var(--paper); }
nav input[type=number], nav select { font: inherit; width: 100%; padding: 3px 6px; margin-bottom: 6px; color: inherit;
  background: var(--paper); border: 1px solid var(--line); border-radius: 4px; }
.tables { display: flex; flex-wrap: wrap; gap: 0 44px; }
.tables td { white-space: pre; }
td.number { text-align: right; }
.example { overflow-wrap: anywhere; white-space: pre-wrap; padding: 5px 8px; margin: 3px 0; background: var(--tint);
  border-radius: 5px; font: 13px/1.6 ui-monospace, monospace; }
.example.again { opacity: .45; }
.example .peak { border-bottom: 2px solid rgb(var(--mark)); }
svg { border-bottom: 1px solid var(--line); }
svg rect { fill: var(--accent); }
@media (max-width: 760px) { .columns { grid-template-columns: 1fr; } nav .list { max-height: 220px; } }
"""

PAGE_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
"""

LAYER_PAGE_HEAD = (
    PAGE_HEAD
    + """<header>
<h1>{heading}</h1>
<div class="soft">{facts}; <a href="index.html">{clt}</a></div>
<div class="layers soft">layers: {links}</div>
</header>
<div class="columns">
<nav>
<input type="number" id="number" min="0" placeholder="feature number">
<select id="order" aria-label="order of the list">
<option value="peak">highest activation first</option>
<option value="dense">most often active first</option>
<option value="sparse">least often active first</option>
<option value="number">by number</option>
</select>
<label class="soft"><input type="checkbox" id="dead"> with those that are never active</label>
<div class="soft" style="display:flex;gap:8px;padding:6px 6px 2px"><span style="flex:1">feature</span>
<span>active on</span><span style="width:60px;text-align:right">max</span></div>
<div class="list" id="list"></div>
</nav>
<main id="feature"><noscript>This page shows its features with JavaScript, which is off.</noscript></main>
</div>
<script type="application/json" id="summary">{summary}</script>
<script type="text/plain" id="records">
"""
)

INDEX_PAGE = (
    PAGE_HEAD
    + """<header><h1>{title}</h1><div class="soft">{facts}</div></header>
<main>
<table>
<tr><th>source layer</th><th>L0</th><th>never active</th><th>highest activation</th></tr>
{rows}
</table>
<h3>Made with</h3>
<table>
{made}
</table>
</main>
</body>
</html>
"""
)

PAGE_SCRIPT = r"""
"use strict";
const summary = JSON.parse(document.getElementById("summary").textContent);
const records = document.getElementById("records").textContent.trim().split("\n");
const list = document.getElementById("list"), view = document.getElementById("feature");
const order = document.getElementById("order"), dead = document.getElementById("dead");
const STEP = 300;  // rows of the list that are made at a time
let current = -1;

function make(tag, text, attributes) {  // text is set as text: what a prompt contains never becomes markup
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  return element;
}

function share(count) {
  const part = count / summary.tokens;
  return part === 0 ? "never" : part < 0.001 ? part.toExponential(1) : (100 * part).toFixed(part < 0.1 ? 2 : 1) + " %";
}

function ordered() {
  const keys = {
    peak: feature => -summary.peaks[feature], dense: feature => -summary.counts[feature],
    sparse: feature => summary.counts[feature], number: feature => feature,
  };
  const key = keys[order.value];
  const all = summary.counts.map((_, feature) => feature).filter(feature => dead.checked || summary.counts[feature]);
  return all.sort((a, b) => key(a) - key(b) || a - b);
}

function fill(features, start) {
  for (const feature of features.slice(start, start + STEP)) {
    const row = make("button", undefined, {"data-feature": feature});
    row.append(make("span", feature), make("span", share(summary.counts[feature])),
               make("span", summary.peaks[feature]));
    row.onclick = () => { location.hash = feature; };
    if (feature === current) row.className = "here";
    list.append(row);
  }
  const left = features.length - start - STEP;
  if (left > 0) {
    const more = make("button", "show more, " + left + " left");
    more.onclick = () => { more.remove(); fill(features, start + STEP); };
    list.append(more);
  }
}

function refill() { list.replaceChildren(); fill(ordered(), 0); }

async function record(feature) {
  const bytes = Uint8Array.from(atob(records[feature]), character => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function table(title, rows) {
  const block = make("div"), body = make("table");
  block.append(make("h3", title), body);
  for (const cells of rows) {
    const line = make("tr");
    cells.forEach((cell, place) => {
      const column = make("td", undefined, place === cells.length - 1 ? {class: "number"} : {});
      column.append(cell);
      line.append(column);
    });
    body.append(line);
  }
  if (!rows.length) block.append(make("div", "none", {class: "soft"}));
  return block;
}

function logits(title, tokens, values) {
  return table(title, tokens.map((token, place) => [JSON.stringify(token), values[place].toPrecision(3)]));
}

function links(title, ends) {
  return table(title, ends.map(([layer, feature, weight]) =>
    [make("a", "layer " + layer + ", feature " + feature, {href: "layer_" + layer + ".html#" + feature}),
     weight.toPrecision(3)]));
}

function histogram(counts, range) {
  const space = "http://www.w3.org/2000/svg", width = 320, height = 70;
  const picture = document.createElementNS(space, "svg");
  picture.setAttribute("width", width);
  picture.setAttribute("height", height);
  picture.setAttribute("role", "img");
  const tallest = Math.max(...counts, 1), step = width / counts.length;
  counts.forEach((count, place) => {
    const bar = document.createElementNS(space, "rect"), size = count ? Math.max(1, height * count / tallest) : 0;
    const label = document.createElementNS(space, "title"), bin = (range[1] - range[0]) / counts.length;
    label.textContent = (bin * place).toPrecision(3) + " to " + (bin * (place + 1)).toPrecision(3) + ": " + count;
    for (const [name, value] of [["x", step * place], ["y", height - size], ["width", step - 1], ["height", size]])
      bar.setAttribute(name, value);
    bar.append(label);
    picture.append(bar);
  });
  const block = make("div");
  block.append(make("h3", "Activations above zero, 0 to " + range[1]), picture);
  return block;
}

function example(found, largest) {
  const block = make("div", undefined, {class: "example" + (found.is_repeated_datapoint ? " again" : "")});
  found.tokens.forEach((token, place) => {
    const activation = found.tokens_acts_list[place];
    const piece = make("span", token, {title: String(activation)});
    if (activation > 0) piece.style.background = "rgba(var(--mark), " + (0.12 + 0.78 * activation / largest) + ")";
    if (place === found.train_token_ind) piece.className = "peak";
    block.append(piece);
  });
  return block;
}

async function show() {
  const wanted = decodeURIComponent(location.hash.slice(1));
  const feature = wanted === "" ? ordered()[0] || 0 : Number(wanted);
  current = feature;
  for (const row of list.querySelectorAll("button"))
    row.className = row.dataset.feature === String(feature) ? "here" : "";
  if (!(feature in records)) {
    const range = "this layer has features 0 to " + (records.length - 1);
    view.replaceChildren(make("h2", "There is no feature " + wanted), make("div", range, {class: "soft"}));
    return;
  }
  const found = await record(feature);
  if (feature !== current) return;  // another one was asked for meanwhile
  const count = summary.counts[feature];
  const parts = [
    make("h2", "Layer " + summary.layer + ", feature " + feature),
    make("div", count ? "active on " + share(count) + " of the tokens (" + count + " of " + summary.tokens +
         "), highest activation " + found.act_max : "never active on " + summary.tokens + " tokens", {class: "soft"}),
  ];
  const tables = make("div", undefined, {class: "tables"});
  if (count) tables.append(histogram(found.histogram, found.histogram_range));
  tables.append(logits("Makes more likely", found.top_logits, found.top_logit_values),
                logits("Makes less likely", found.bottom_logits, found.bottom_logit_values),
                links("Feeds (virtual weight)", found.feeds), links("Reads (virtual weight)", found.reads));
  parts.push(tables);
  for (const quantile of found.examples_quantiles) {
    if (!quantile.examples.length) continue;
    parts.push(make("h3", quantile.quantile_name));
    parts.push(...quantile.examples.map(one => example(one, found.act_max)));
  }
  view.replaceChildren(...parts);
}

order.onchange = refill;
dead.onchange = refill;
document.getElementById("number").onchange = event => { location.hash = event.target.value; };
window.onhashchange = show;
refill();
show();
"""


__all__ = ["write_index_page", "write_layer_page"]
