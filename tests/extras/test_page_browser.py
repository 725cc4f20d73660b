"""The search page in a headless Chromium."""

import base64
import csv
import json
import re
import shutil
import subprocess
import time
from contextlib import suppress

import pytest
import requests
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed")

from page_lab import embedding, listed, paths

from reid.extras import server
from reid.extras.pictures import verdict


class Browser:
    """A few commands of the WebDriver protocol (https://www.w3.org/TR/webdriver2/) to chromedriver."""

    def __init__(self, port, chromium, profile):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
                 "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
                 f"--user-data-dir={profile}"]
        self.base = f"http://127.0.0.1:{port}/session"
        options = {"goog:chromeOptions": {"args": flags, "binary": chromium}}
        self.base += "/" + self("POST", "", capabilities={"alwaysMatch": options})["sessionId"]

    def __call__(self, method, path, **body):
        answer = requests.request(method, self.base + path, json=body if method == "POST" else None, timeout=120).json()
        assert not (isinstance(answer["value"], dict) and "stacktrace" in answer["value"]), answer["value"]
        return answer["value"]

    def open(self, url):
        self("POST", "/url", url=url)

    def js(self, script, *arguments):
        return self("POST", "/execute/sync", script=script, args=arguments)

    def wait(self, script):
        """The value of an expression as soon as it is true."""
        for _ in range(600):
            if value := self.js(f"return {script}"):
                return value
            time.sleep(0.05)
        raise AssertionError(f"never came true: {script}\n" + self.js("return document.body.innerText"))

    def upload(self, file):
        [element] = self("POST", "/element", using="css selector", value="#file").values()
        self("POST", f"/element/{element}/value", text=str(file))

    def click(self, selector):
        self.js("document.querySelector(arguments[0]).click()", selector)

    def rows(self):
        """The rows of the results, once the page has them."""
        self.wait("!document.body.classList.contains('busy') && document.querySelector('#title').textContent == 'Results'")
        return self.js("return Array.from(document.querySelectorAll('.card'), (c) => c.dataset.path)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if not driver or not chromium:
        pytest.skip("chromium and chromedriver are not installed")
    with subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            port = next(m[1] for line in process.stdout if (m := re.search(r"successfully on port (\d+)", line)))
            running = Browser(port, chromium, tmp_path_factory.mktemp("profile"))
            yield running
            running("DELETE", "")
        finally:
            process.terminate()


def set_value(browser, selector, value, event="change"):
    browser.js("const node = document.querySelector(arguments[0]); node.value = arguments[1];"
               "node.dispatchEvent(new Event(arguments[2], {bubbles: true}))", selector, str(value), event)


def expected(index, body, *args, **filters):
    return paths(index, index.nearest(embedding(body), *args, **filters)[1][0])


@pytest.fixture
def file(crop, tmp_path):
    (tmp_path / "crop.png").write_bytes(crop)
    return tmp_path / "crop.png"


def test_search_by_upload_with_filters(browser, site, index, crop, file):
    browser.open(site.url("/"))
    browser.wait("document.querySelectorAll('.card img').length > 5 &&"
                 " Array.from(document.querySelectorAll('.card img')).slice(0, 4).every((image) => image.naturalWidth == 32)")
    browser.upload(file)
    assert browser.rows() == expected(index, crop, 15)
    text = browser.js("return document.querySelector('.card').innerText")
    assert "match" in text and "id 3" in text
    browser.wait("document.querySelector('.query img').naturalWidth == 32")

    set_value(browser, "#topk", 4)
    browser.wait("document.querySelectorAll('.card').length == 4")
    browser.click("#cameras input[value='2']")
    within = expected(index, crop, 4, camids=[2])
    browser.wait(f"document.querySelector('.card').dataset.path == '{within[0]}'")
    assert browser.rows() == within
    browser.click("#cameras input[value='2']")
    set_value(browser, "#first_frame", 1)
    browser.wait("Array.from(document.querySelectorAll('.card')).every((card) => card.dataset.path.includes('_000001_'))")


def test_several_queries_have_a_row_each(browser, site, index, gallery, tmp_path):
    names = [index.paths[row] for row in (2, 9, 30)]
    browser.open(site.url("/"))
    browser.wait("document.querySelector('.card')")
    (tmp_path / "text.png").write_text("not an image")
    browser.upload("\n".join([*(str(gallery / name) for name in names), str(tmp_path / "text.png")]))
    browser.rows()
    rows = browser.js("return Array.from(document.querySelectorAll('.row'), (row) => [row.querySelector('.name').textContent,"
                      "Array.from(row.querySelectorAll('.card'), (card) => card.dataset.path),"
                      "row.querySelector('.error')?.textContent])")
    for (name, found, error), query in zip(rows, names):
        assert (name, found, error) == (query, expected(index, (gallery / query).read_bytes(), 15), None)
    assert len(rows) == 4 and "not an image" in rows[3][2]
    browser.click(".row:nth-child(2) [data-key='1 remove']")
    browser.wait("document.querySelectorAll('.row').length == 3")


def test_a_box_on_a_frame_is_a_query(browser, site, index, gallery, tmp_path):
    frame = Image.new("RGB", (320, 180))
    frame.paste(Image.open(gallery / index.paths[9]), (200, 60))
    frame.save(tmp_path / "frame.png")
    browser.open(site.url("/"))
    browser.wait("document.querySelector('.card')")
    browser.upload(tmp_path / "frame.png")
    browser.wait("document.querySelector('#boxes').open && document.querySelector('#frame').naturalWidth == 320")
    left, top, scale = browser.js("const area = document.querySelector('#frame').getBoundingClientRect();"
                                  "return [area.left, area.top, area.width / 320]")
    corners = [(round(left + x * scale), round(top + y * scale)) for x, y in ((200, 60), (232, 124))]
    move = {"type": "pointerMove", "origin": "viewport", "duration": 0}
    browser("POST", "/actions", actions=[{"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [
        {**move, "x": corners[0][0], "y": corners[0][1]}, {"type": "pointerDown", "button": 0},
        {**move, "x": corners[1][0], "y": corners[1][1]}, {"type": "pointerUp", "button": 0}]}])
    browser.wait("document.querySelector('#done').textContent == 'Search this box'")
    browser.click("#done")
    assert browser.rows()[0] == index.paths[9]
    assert browser.js("return document.querySelector('.row .name').textContent").startswith("frame.png#")


def test_click_back_and_reload(browser, site, index):
    row_of = {path: row for row, path in enumerate(index.paths)}
    browser.open(site.url("/"))
    browser.wait("document.querySelector('.card button')")
    browser.click(".card button")
    first = browser.rows()
    browser.js("const found = document.querySelector(arguments[0]); found.focus(); found.click()",
               f".card[data-path='{first[0]}'] .go")
    browser.wait(f"document.querySelector('.query .name').textContent == '{first[0]}'")
    again, row = browser.rows(), row_of[first[0]]
    assert again == paths(index, index.nearest(index.embeddings[row][None].float(), 15, exclude=torch.tensor([row]))[1][0])
    assert browser.js("return document.activeElement.id") == "title"  # the control that was used is gone
    marks = browser.js("return Array.from(document.querySelectorAll('.card'), (c) => c.classList[1])")
    assert marks == [verdict(int(index.pids[row]), int(index.pids[row_of[path]])) for path in again]
    set_value(browser, "#topk", 3)
    browser.click("#cameras input[value='1']")
    browser.click("#group")
    browser.wait("document.querySelector('.group') && document.querySelectorAll('.card').length == 3")
    before = browser.rows()
    browser("POST", "/refresh")
    assert browser.rows() == before
    assert browser.js("return [topk.value, group.checked, rerank.checked,"
                      "document.querySelectorAll('#cameras :checked').length]") == ["3", True, False, 1]
    browser("POST", "/back")
    browser.wait(f"document.querySelector('.card').dataset.path == '{first[0]}'")
    assert browser.rows() == first


def test_threshold_groups_and_reranking(browser, site, index, crop, file):
    browser.open(site.url("/"))
    browser.wait("document.querySelector('.card')")
    browser.upload(file)
    browser.rows()
    scores = browser.js("return Array.from(document.querySelectorAll('.card'), (c) => Number(c.dataset.score))")
    for threshold in (0.8, 0.95, 0.3):
        if threshold != 0.8:
            set_value(browser, "#threshold", threshold, "input")
        marks = browser.js("return Array.from(document.querySelectorAll('.card small'), (s) => s.textContent)")
        assert marks == ["match" if score > threshold else "no match" for score in scores]
    browser.click("#group")
    browser.wait("document.querySelector('.group')")
    headings = browser.js("return Array.from(document.querySelectorAll('.group'), (g) => [g.querySelector('h3').textContent,"
                          "Array.from(g.querySelectorAll('.facts'), (f) => f.textContent)])")
    assert headings[0][0].startswith("id 3 · ") and sum(len(facts) for _, facts in headings) == 15
    assert all(fact.startswith(heading.split(" · ")[0]) for heading, facts in headings for fact in facts)
    browser.click("#group")
    browser.click("#rerank")
    browser.wait("document.querySelector('#threshold').disabled && !document.querySelector('.card small').textContent")
    assert browser.rows() == listed(site.post(crop, topk=15, rerank=True))


def test_judged_pairs_and_exports_are_downloaded(browser, site, index, tmp_path):
    browser("POST", "/goog/cdp/execute", cmd="Browser.setDownloadBehavior",
            params={"behavior": "allow", "downloadPath": str(tmp_path)})
    browser.open(site.url(f"/?path={index.paths[3]}&topk=5"))
    found = browser.rows()
    browser.click(".card:nth-child(1) [data-same=true]")
    browser.click(".card:nth-child(2) [data-same=true]")
    browser.click(".card:nth-child(2) [data-same=false]")  # another judgement
    browser.click(".card:nth-child(3) [data-same=true]")
    browser.click(".card:nth-child(3) [data-same=true]")  # taken back
    assert browser.js("return document.querySelector('#pairs').textContent") == "Pairs (2)"
    for kind, name in (("pairs", "pairs.csv"), ("csv", "results.csv"), ("json", "results.json"), ("png", "results.png")):
        browser.click(f"[data-save={kind}]")
        for _ in range(600):
            if (tmp_path / name).exists():
                break
            time.sleep(0.05)
    assert (tmp_path / "pairs.csv").read_text().splitlines() == [
        "query,path,same", f"{index.paths[3]},{found[0]},1", f"{index.paths[3]},{found[1]},0"]
    lines = list(csv.DictReader((tmp_path / "results.csv").open(newline="")))
    assert [line["path"] for line in lines] == found and {line["query"] for line in lines} == {index.paths[3]}
    [ranking] = json.loads((tmp_path / "results.json").read_text())["rankings"]
    assert [hit["path"] for hit in ranking["hits"]] == found
    assert Image.open(tmp_path / "results.png").width > 5 * 128
    browser.js("sessionStorage.clear()")


def test_enlarge_by_keyboard_and_focus(browser, site, index):
    browser.open(site.url(f"/?path={index.paths[3]}&topk=5"))
    found = browser.rows()
    browser.js("document.querySelector('.card .frame').focus(); document.activeElement.click()")
    browser.wait("document.querySelector('#large').open && document.querySelector('#large_hit').naturalWidth == 32")
    browser.js("document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))")
    assert found[1] in browser.wait("document.querySelector('#large_facts').textContent")
    browser.click("#close")
    assert browser.js("return document.activeElement.dataset.key") == f"0 {found[0]}"
    browser.js("document.querySelector('.card:nth-child(2) .go').focus()")
    set_value(browser, "#topk", 3)
    browser.wait("document.querySelectorAll('.card').length == 3")
    assert browser.js("return document.activeElement.dataset.key") == f"0 {found[1]} search"


def test_a_person_is_enrolled_and_erased(browser, door, crop, file):
    browser.open(door.url("/"))
    browser.wait("document.querySelector('.card')")
    browser.upload(file)
    assert browser.rows()
    browser.wait("document.querySelectorAll('#names option').length == 6")
    set_value(browser, ".query form input", "anna b/c")
    browser.click(".query form button")
    browser.wait("document.querySelector('.error')?.textContent.startsWith('name:')")
    set_value(browser, ".query form input", "anna b")
    browser.click(".query form button")
    browser.wait("document.querySelector('#status').textContent.includes('1 images enrolled and 0 replaced: anna b')")
    assert browser.js("return document.querySelector('.card .facts').textContent") == "anna b" and not browser.js(
        "return document.querySelector('.error')")
    browser.wait("document.querySelector('.card img').naturalWidth == 8")  # as the network gets it
    browser.wait("document.querySelectorAll('#names option').length == 7")
    browser.click(".card .frame")
    assert browser.js("return document.querySelector('#erase').textContent") == "Erase anna b"
    for answer, label in (("dismiss", "anna b"), ("accept", "id 3")):
        browser.js("setTimeout(() => document.querySelector('#erase').click())")  # whose question would block this command
        for _ in range(100):
            with suppress(AssertionError):
                assert "all images of anna b" in browser("GET", "/alert/text")
                break
            time.sleep(0.02)
        browser("POST", f"/alert/{answer}")
        browser.wait(f"document.querySelector('.card .facts').textContent.startsWith('{label}')")
    browser.wait("document.querySelector('#status').textContent == 'anna b: 1 images erased, 37 left'")
    assert not browser.js("return document.querySelector('#large').open")
    assert {hit["label"] for hit in door.post(crop).json()["rankings"][0]["hits"]}.isdisjoint({"anna b"})


def test_a_page_that_may_not_write_offers_nothing_to_change(browser, site, index, file):
    browser.open(site.url("/"))
    browser.wait("document.querySelector('.card')")
    browser.upload(file)
    browser.rows()
    browser.click(".card .frame")
    assert browser.js("return [!document.querySelector('.query form'), document.querySelector('#erase').hidden]") == [True, True]
    browser.click("#close")


def test_page_shows_errors(browser, site, tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "large.jpg").write_bytes(b"\0" * (server.UPLOAD_LIMIT + 1))
    browser.open(site.url("/"))
    browser.wait("document.querySelector('.card')")
    for name, message in [("text.jpg", "not an image"), ("large.jpg", "larger than 10 MB")]:
        browser.upload(tmp_path / name)
        browser.wait(f"document.querySelector('.error')?.textContent.includes('{message}')")
        assert browser.js("return document.querySelectorAll('.card').length") == 0
    browser.click("#pick")
    browser.wait("!document.querySelector('.error') && document.querySelectorAll('.card').length > 5")


def test_page_takes_a_pasted_and_a_dropped_image(browser, site, index, crop):
    for kind in ("paste", "drop"):
        browser.open(site.url("/"))
        browser.wait("document.querySelector('.card')")
        browser.js("""
            const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0)), data = new DataTransfer();
            data.items.add(new File([bytes], "crop.png", {type: "image/png"}));
            const options = {bubbles: true, cancelable: true, clipboardData: data, dataTransfer: data};
            document.body.dispatchEvent(arguments[1] == "paste" ? new ClipboardEvent("paste", options)
                                                                : new DragEvent("drop", options));
            """, base64.b64encode(crop).decode(), kind)
        assert browser.rows() == expected(index, crop, 15)


# The ratio of WCAG 2 (https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio) of each visible text to the colour behind it.
CONTRASTS = """
const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (colour) => numbers(colour).slice(0, 3).reduce((sum, v, i) => sum + channel(v) * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (node) => {
  for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if ((numbers(colour)[3] ?? 1) === 1) return colour;
  }
  return "rgb(255, 255, 255)";
};
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
for (let text; (text = texts.nextNode());) {
  const node = text.parentElement;
  if (!text.data.trim() || !node.checkVisibility() || node.closest("script, style") || node.disabled) continue;
  const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
  found.push([(a + 0.05) / (b + 0.05), text.data]);
}
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser, site, index, scheme):
    browser("POST", "/goog/cdp/execute", cmd="Emulation.setEmulatedMedia",
            params={"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.open(site.url(f"/?path={index.paths[3]}&group=true&camera=1&camera=2"))
    browser.rows()
    browser.click(".card [data-same=true]")
    browser.click(".card:last-child [data-same=false]")
    found = browser.js(CONTRASTS)
    assert len(found) > 60 and [text for ratio, text in found if ratio < 4.5] == []
    browser.js("sessionStorage.clear()")


def test_a_phone_shows_the_first_result_at_once(browser, site, index):
    screen = {"width": 390, "height": 664, "deviceScaleFactor": 1, "mobile": True}
    browser("POST", "/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=screen)
    browser.open(site.url(f"/?path={index.paths[3]}"))
    browser.rows()
    bottom, width = browser.js("return [document.querySelector('.card .frame').getBoundingClientRect().bottom,"
                               "document.documentElement.scrollWidth]")
    browser("POST", "/goog/cdp/execute", cmd="Emulation.clearDeviceMetricsOverride", params={})
    assert bottom < 664 and width <= 390


def test_page_obeys_its_own_policy(browser, site):
    """No script, style or address from elsewhere, and nothing in the pages that their policies block."""
    for path in ("/docs", "/"):
        browser.open(site.url(path))
        assert not re.search(r"""(src|href)=["'](https?:)?//""", site.get(path).text)
    browser.wait("document.querySelector('.card')")
    browser.click(".card button")
    browser.rows()
    assert browser.js("return getComputedStyle(document.querySelector('.grid')).display") == "grid"
    log = browser("POST", "/se/log", type="browser")
    assert [line for line in log if "Content Security Policy" in line["message"]] == []
