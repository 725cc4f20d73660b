"""The search page in a headless Chromium."""

import base64
import re
import shutil
import subprocess
import time

import pytest
import requests
import torch

pytest.importorskip("fastapi", reason="fastapi is not installed")

from page_lab import embedding, paths

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


def test_page_search_by_upload(browser, site, index, crop, tmp_path):
    file = tmp_path / "crop.png"
    file.write_bytes(crop)
    browser.open(site.url("/"))
    browser.wait("document.querySelectorAll('.card img').length > 5 &&"
                 " Array.from(document.querySelectorAll('.card img')).slice(0, 4).every((image) => image.naturalWidth == 32)")
    browser.upload(file)
    expected = paths(index, index.nearest(embedding(crop), 15)[1][0])
    assert browser.rows() == expected
    text = browser.js("return document.querySelector('.card').innerText")
    assert "match" in text and "id 3" in text
    browser.wait("document.querySelector('#preview').naturalWidth == 32")

    browser.js("const k = document.querySelector('#topk'); k.value = 4; k.dispatchEvent(new Event('change'))")
    browser.wait("document.querySelectorAll('.card').length == 4")
    assert browser.rows() == expected[:4]
    browser.click("#cameras input[value='2']")
    within = paths(index, index.nearest(embedding(crop), 4, camids=[2])[1][0])
    browser.wait(f"document.querySelector('.card').dataset.path == '{within[0]}'")
    assert browser.rows() == within


def test_page_click_and_back(browser, site, index):
    browser.open(site.url("/"))
    browser.wait("document.querySelector('.card')")
    browser.click(".card")
    first = browser.rows()
    browser.click(f".card[data-path='{first[0]}']")
    browser.wait(f"document.querySelector('#preview').src.includes('{first[0]}')")
    again = browser.rows()
    row_of = {path: row for row, path in enumerate(index.paths)}
    row = row_of[first[0]]
    assert again == paths(index, index.nearest(index.embeddings[row][None].float(), 15, exclude=torch.tensor([row]))[1][0])
    marks = browser.js("return Array.from(document.querySelectorAll('.card'), (c) => c.className.split(' ')[1])")
    assert marks == [verdict(int(index.pids[row]), int(index.pids[row_of[path]])) for path in again]
    browser("POST", "/back")
    browser.wait(f"document.querySelector('.card').dataset.path == '{first[0]}'")
    assert browser.rows() == first


def test_page_shows_errors(browser, site, tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "large.jpg").write_bytes(b"\0" * (server.UPLOAD_LIMIT + 1))
    browser.open(site.url("/"))
    for name, message in [("text.jpg", "not an image"), ("large.jpg", "larger than 10 MB")]:
        browser.upload(tmp_path / name)
        assert message in browser.wait("document.querySelector('#error:not([hidden])')?.textContent")
        assert browser.js("return document.querySelectorAll('.card').length") == 0
    browser.click("#pick")
    browser.wait("document.querySelector('#error').hidden && document.querySelectorAll('.card').length > 5")


def test_page_takes_a_pasted_and_a_dropped_image(browser, site, index, crop):
    expected = paths(index, index.nearest(embedding(crop), 15)[1][0])
    for kind in ("paste", "drop"):
        browser.open(site.url("/"))
        browser.js("""
            const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0)), data = new DataTransfer();
            data.items.add(new File([bytes], "crop.png", {type: "image/png"}));
            const options = {bubbles: true, cancelable: true, clipboardData: data, dataTransfer: data};
            document.body.dispatchEvent(arguments[1] == "paste" ? new ClipboardEvent("paste", options)
                                                                : new DragEvent("drop", options));
            """, base64.b64encode(crop).decode(), kind)
        assert browser.rows() == expected


def test_page_obeys_its_own_policy(browser, site):
    """No script, style or address from elsewhere, and nothing in the page that its policy blocks."""
    browser.open(site.url("/"))
    browser.wait("document.querySelector('.card')")
    browser.click(".card")
    browser.rows()
    page = site.get("/").text
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page)
    assert browser.js("return getComputedStyle(document.querySelector('.grid')).display") == "grid"
    log = browser("POST", "/se/log", type="browser")
    assert [line for line in log if "Content Security Policy" in line["message"]] == []
