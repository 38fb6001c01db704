"""A page in headless Chromium, at any width, light or dark, driven by a script; no other package.

The page stands in a frame, whose width may be a phone's (a window of Chromium's may not), and the
script runs outside of it: `page` is the frame's window. What it returns comes back, with whatever
the page complained about.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --hide-scrollbars "
    "--virtual-time-budget=20000"
)
HARNESS = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="frame" style="border:0;width:%dpx;height:%dpx"></iframe>
<script type="application/json" id="page">%s</script><script>
const frame = document.getElementById("frame"), complaints = [];
const answer = (value) => {
  const out = document.createElement("pre");
  out.id = "answer";
  out.textContent = JSON.stringify({ value, complaints });
  document.body.append(out);
};
frame.onload = () => setTimeout(() => {
  const page = frame.contentWindow, $ = (id) => page.document.getElementById(id);
  try { answer((() => { %s })()); }
  catch (error) { complaints.push(String(error.stack)); answer(null); }
}, 200);
const before = `<script>onerror = (e) => parent.complain(e);
  onunhandledrejection = (e) => parent.complain(String(e.reason));
  console.error = console.warn = (...e) => parent.complain(e.join(" "));
  addEventListener("error", (e) => e.target !== window && parent.complain("not loaded"), true);
<\\/script>`;
window.complain = (words) => complaints.push(words);
const text = JSON.parse(document.getElementById("page").textContent);
frame.srcdoc = text.replace("<head>", "<head>" + before);
</script>"""


def drive(page: Path, tmp_path: Path, script="return null", width=1280, dark=False, shot=None):
    """What `script` returns: it may use `page`, and $(id). `shot`: a PNG of it, too."""
    text = json.dumps(page.read_text(encoding="utf-8")).replace("<", "\\u003c")
    harness = tmp_path / "harness.html"
    harness.write_text(HARNESS % (width, 1000, text, script), encoding="utf-8")
    options = [*OPTIONS.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    options += [f"--window-size={max(width, 500)},1000"]
    if shot:
        run([CHROMIUM, *options, f"--screenshot={shot}", harness.as_uri()])
    dom = run([CHROMIUM, *options, "--dump-dom", harness.as_uri()])
    assert '<pre id="answer">' in dom, dom[-2000:]
    found = dom.rpartition('<pre id="answer">')[2].partition("</pre>")[0]
    for name, letter in (("&lt;", "<"), ("&gt;", ">"), ("&nbsp;", " "), ("&amp;", "&")):
        found = found.replace(name, letter)
    answer = json.loads(found)
    assert answer["complaints"] == []
    return answer["value"]


def run(command: list) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
