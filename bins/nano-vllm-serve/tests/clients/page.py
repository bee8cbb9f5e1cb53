"""The page at `/` in headless Chromium, against servers that this starts: what it shows is what the API says.

page.py PROGRAM [--browser /usr/bin/chromium] [--screenshot FILE]
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import threading
import time
import urllib.request

from playwright.sync_api import sync_playwright

SYSTEM = "You are a small and friendly assistant. Answer in whole sentences. " * 8
PATIENCE = 60  # Seconds; nothing here takes as long unless it never comes.


@contextlib.contextmanager
def serving(program, *flags):
    """A server, on a free port unless told otherwise; gives its address."""
    port = [] if "--port" in flags else ["--port", "0"]
    command = [program, "serve", "--cpu", "--host", "127.0.0.1", *port, *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield server.stdout.readline().split(" at ")[1].strip()
    finally:
        server.terminate()
        try:
            assert server.wait(PATIENCE) == 0, "the server did not end well"
        finally:
            server.kill()


class Api:
    """The same server, without a browser."""

    def __init__(self, url, key=None):
        self.url, self.key = url, key

    def ask(self, path, body=None):
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = json.dumps(body).encode() if body else None
        return urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=PATIENCE)

    def metric(self, name):
        text = self.ask("/metrics").read().decode()
        return float(re.search(rf"^vllm:{name}{{.*}} (\S+)$", text, re.M)[1])

    def chat(self, question, path="/v1/chat/completions", **fields):
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        return json.load(self.ask(path, {"messages": messages, **fields}))

    def tokens(self, question):
        return self.chat(question, "/tokenize", add_generation_prompt=True)["tokens"]


class Browser:
    """A tab that notes what must not happen."""

    def __init__(self, chromium, url, **options):
        self.url, self.complaints, self.hosts = url, [], set()
        self.context = chromium.new_context(viewport={"width": 1280, "height": 800}, **options)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(1000 * PATIENCE)
        self.tab.on("console", lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None)
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))

    def open(self):
        self.tab.goto(self.url + "/")
        return self.tab

    def wait(self, condition):
        """Polls from outside: the page's policy forbids what `wait_for_function` does."""
        until = time.monotonic() + PATIENCE
        while not self.tab.evaluate(f"!!({condition})"):
            assert time.monotonic() < until, f"never: {condition}; {self.complaints}"
            time.sleep(0.03)

    def close(self, allowed=()):
        unexpected = [c for c in self.complaints if not any(a in c for a in allowed)]
        assert not unexpected, unexpected
        assert self.hosts == {self.url.split("/")[2]}, self.hosts
        self.context.close()


def test_an_answer_streams_in(chromium, program):
    with serving(program, "--max-model-len", "1024") as url:
        browser = Browser(chromium, url)
        tab = browser.open()
        browser.wait("document.querySelector('#state').className === 'live'")
        assert tab.locator("#model").inner_text() == "nano-vllm-demo"
        # One step computes the prompt, all others one token each, up to the end.
        tab.fill("#text", "What is 24 + 58?")
        tab.press("#text", "Enter")
        browser.wait("document.querySelector('.assistant:not(.open)') && steps.length > 5 && look.running === 0")
        assert "82" in tab.locator(".assistant").inner_text()
        rows = tab.evaluate("steps.flatMap(step => step.rows)")
        assert [row[3] for row in rows] == [0] + [1] * (len(rows) - 1), rows
        assert all(row[2] == 1 for row in rows[1:]) and rows[0][2] > 10, rows
        tab.evaluate("""() => {
            window.lengths = [];
            new MutationObserver(() => lengths.push(document.querySelectorAll('.assistant')[1]?.textContent.length ?? 0))
                .observe(document.querySelector('#log'), {subtree: true, childList: true, characterData: true});
        }""")
        tab.fill("#text", "Tell me a story about a race with a rabbit.")
        tab.press("#text", "Enter")
        browser.wait("document.querySelectorAll('.assistant:not(.open)').length === 2")
        lengths = tab.evaluate("lengths")
        assert lengths == sorted(lengths) and len(set(lengths)) > 2, f"it does not come in pieces: {lengths}"
        assert "rabbit" in tab.locator(".assistant").nth(1).inner_text()
        # The second message knows the first: it stood in the prefix cache.
        browser.wait("look.prefix_hit_rate > 0 && look.blocks.includes('c')")
        # The text of a message is text.
        tab.fill("#text", "<img src=x onerror=alert(1)>")
        tab.press("#text", "Enter")
        browser.wait("document.querySelectorAll('.assistant:not(.open)').length === 3")
        assert tab.locator("#log img").count() == 0
        # What the server refuses is shown.
        tab.fill("#text", "word " * 3000)
        tab.click("#send")
        browser.wait("document.querySelector('.error')")
        assert "1024" in tab.locator(".error").inner_text(), tab.locator(".error").inner_text()
        browser.close(allowed=["status of 400"])


def test_the_engine_is_shown_as_it_is(chromium, program):
    flags = ["--max-num-seqs", "6", "--num-gpu-blocks-override", "600", "--max-model-len", "2048"]
    with serving(program, *flags) as url:
        api, browser = Api(url), Browser(chromium, url)
        tab = browser.open()
        browser.wait("look")
        long = dict(max_tokens=1900, ignore_eos=True, temperature=0)
        api.chat("Question?", max_tokens=2)
        askers = [threading.Thread(target=api.chat, args=(f"Question {n}?",), kwargs=long) for n in range(8)]
        for asker in askers:
            asker.start()
        # Eight came, six fit: page and metrics agree, and so do counts, table and timeline.
        browser.wait("look.running === 6 && look.waiting === 2 && steps.at(-1).rows.filter(row => row[3]).length === 6")
        assert (api.metric("num_requests_running"), api.metric("num_requests_waiting")) == (6, 2)
        seen = tab.evaluate("""() => {
            const canvas = document.querySelector('#map'), scale = devicePixelRatio;
            const {cell, columns, group} = layout(600, document.querySelector('#map').clientWidth);
            // All at once: more readings of a canvas bring a warning.
            const image = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
            const pixel = (x, y) => {
                const at = 4 * (y * scale * image.width + x * scale);
                return image.data.slice(at, at + 3).join();
            };
            // What a canvas shows for a colour.
            const shown = colour => {
                const context = document.createElement('canvas').getContext('2d');
                context.fillStyle = colour;
                context.fillRect(0, 0, 1, 1);
                return context.getImageData(0, 0, 1, 1).data.slice(0, 3).join();
            };
            return {
                look, group,
                running: document.querySelector('#running').textContent, waiting: document.querySelector('#waiting').textContent,
                used: document.querySelector('#used').textContent, rows: document.querySelectorAll('#rows tr').length,
                map: Array.from({length: 600}, (_, at) => pixel(at % columns * cell + 1, Math.floor(at / columns) * cell + 1)),
                colours: Object.fromEntries(look.sequences.map(seq => [seq.id, shown(colour(seq.id))])),
                kinds: {s: shown(ink('--ink')), c: shown(ink('--cached')), f: shown(ink('--free'))},
                last: steps.at(-1).rows,
            };
        }""")
        look = seen["look"]
        assert (seen["running"], seen["waiting"], seen["group"], seen["rows"]) == ("6", "2", 1, 8), seen
        kinds = "".join(kind * int(count) for kind, count in re.findall(r"([a-z])(\d+)", look["blocks"]))
        assert len(kinds) == 600 and seen["used"] == f"{kinds.count('s') + kinds.count('u')} / 600"
        holders = {}
        for seq in look["sequences"]:
            for block in seq["blocks"]:
                holders.setdefault(block, []).append(seq["id"])
        for at, kind in enumerate(kinds):
            readers = holders.get(at, [])
            assert len(readers) in {"f": [0], "c": [0], "u": [1], "s": range(2, 9)}[kind], (at, kind, readers)
            expected = seen["colours"][str(readers[0])] if kind == "u" else seen["kinds"][kind]
            assert seen["map"][at] == expected, (at, kind, seen["map"][at], expected)
        # Shared is what the prompts have in common, in whole blocks of 16 tokens.
        prompts = [api.tokens(f"Question {n}?") for n in range(8)]
        common = len(os.path.commonprefix(prompts)) // 16
        shared = kinds.count("s")
        assert shared == common > 2, (shared, common)
        assert {seq["prompt"] for seq in look["sequences"]} == {len(prompts[0])}
        assert all(sum(kinds[b] == "s" for b in seq["blocks"]) == shared for seq in look["sequences"] if seq["blocks"])
        # Every running sequence decodes in the last step, one token each.
        decoding = {seq["id"] for seq in look["sequences"] if seq["state"] == "running"}
        assert {row[0] for row in seen["last"]} == decoding and all(row[2:] == [1, 1] for row in seen["last"]), (seen["last"], decoding)
        assert tab.evaluate("document.querySelector('#time').getContext('2d').getImageData(0, 0, 999, 120).data.some(x => x)")
        for asker in askers:
            asker.join(10 * PATIENCE)
        browser.wait("look.running === 0 && look.waiting === 0 && look.sequences.length === 0 && !/[su]/.test(look.blocks)")
        assert (api.metric("num_requests_running"), api.metric("kv_cache_usage_perc")) == (0, 0)
        browser.close()


def test_a_key_is_asked_for(chromium, program):
    with serving(program, "--max-model-len", "1024", "--api-key", "secret") as url:
        browser = Browser(chromium, url)
        tab = browser.open()
        assert tab.locator("main").is_hidden() and tab.locator("aside").is_hidden()
        tab.fill("#key", "wrong")
        tab.press("#key", "Enter")
        browser.wait("document.querySelector('#why').textContent.includes('not accept')")
        tab.fill("#key", "secret")
        tab.press("#key", "Enter")
        browser.wait("look && !document.body.classList.contains('locked')")
        tab.fill("#text", "What is the capital of France?")
        tab.press("#text", "Enter")
        browser.wait("document.querySelector('.assistant:not(.open)')?.textContent.length > 5")
        # The tab keeps the key over a reload, and nothing else does.
        tab.reload()
        browser.wait("look && !document.body.classList.contains('locked')")
        assert tab.evaluate("localStorage.length + document.cookie.length") == 0
        assert "secret" not in tab.url
        browser.close(allowed=["status of 401"])


def test_the_server_goes_away(chromium, program):
    with serving(program, "--max-model-len", "1024") as url:
        browser = Browser(chromium, url)
        tab = browser.open()
        browser.wait("look")
    browser.wait("document.querySelector('#state').textContent.includes('lost')")
    with serving(program, "--max-model-len", "1024", "--port", url.rsplit(":", 1)[1]):
        browser.wait("document.querySelector('#state').className === 'live'")
        assert tab.evaluate("look.running") == 0
        browser.close(allowed=["ERR_", "Failed to load resource"])


def test_dark_narrow_and_the_picture(chromium, program, picture=None):
    with serving(program, "--num-gpu-blocks-override", "500") as url:
        for scheme in ("light", "dark"):
            browser = Browser(chromium, url, color_scheme=scheme, device_scale_factor=1)
            tab = browser.open()
            browser.wait("look")
            tab.click("#eight")
            browser.wait("document.querySelectorAll('.many .said:not(.open)').length === 8")
            assert tab.locator(".error").count() == 0
            browser.wait("look.running === 0 && look.blocks.includes('c')")
            back = tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
            assert (sum(back) > 600) == (scheme == "light"), back
            wide = "document.documentElement.scrollWidth <= innerWidth"
            assert tab.evaluate(wide)
            if picture and scheme == "light":
                take_picture(browser, Api(url), picture)
            tab.set_viewport_size({"width": 360, "height": 640})
            assert tab.evaluate(wide), f"it is {tab.evaluate('document.documentElement.scrollWidth')} wide"
            assert tab.locator("#send").is_visible() and tab.locator("#eight").is_visible()
            browser.close()


def take_picture(browser, api, path):
    """In the middle of work: eight conversations that share a beginning, some of them new."""
    kwargs = dict(max_tokens=700, ignore_eos=True, temperature=0)
    askers = []
    for number in range(7):
        asker = threading.Thread(target=api.chat, args=(f"Question {number}?",), kwargs=kwargs)
        asker.start()
        askers.append(asker)
        time.sleep(0.05)
    browser.tab.set_viewport_size({"width": 1280, "height": 860})
    browser.wait("look.running === 7 && look.sequences[6].tokens > 190")
    browser.tab.screenshot(path=path)
    for asker in askers:
        asker.join(10 * PATIENCE)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    parser.add_argument("--screenshot")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=arguments.browser, args=["--no-sandbox"])
        for name, test in list(globals().items()):
            if name.startswith("test_") and arguments.only in name:
                extra = (arguments.screenshot,) if "picture" in name else ()
                test(chromium, arguments.program, *extra)
                print("ok", name, flush=True)
        chromium.close()


if __name__ == "__main__":
    main()
