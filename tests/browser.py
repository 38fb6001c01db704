"""A page in headless Chromium, driven by a script; no other package.

The page stands in a frame, whose width may be a phone's (a window of Chromium's may not), and the
script runs outside of it: `page` is the frame's window. What it returns comes back, and an error of
the page fails the test.
"""

import html
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
    "--virtual-time-budget=20000 --blink-settings=preferredColorScheme=0"  # dark
)
HARNESS = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="frame" style="border:0;width:%dpx;height:1000px"></iframe>
<script type="application/json" id="page">%s</script><script>
const frame = document.getElementById("frame"), errors = [];
const answer = (value) => {
  const out = document.createElement("pre");
  out.id = "answer";
  out.textContent = JSON.stringify({ value, errors });
  document.body.append(out);
};
frame.onload = () => setTimeout(() => {
  const page = frame.contentWindow, $ = (id) => page.document.getElementById(id);
  try { answer((() => { %s })()); }
  catch (error) { errors.push(String(error.stack)); answer(null); }
}, 200);
const before = `<script>onerror = (error) => parent.errors.push(error);<\\/script>`;
window.errors = errors;
const text = JSON.parse(document.getElementById("page").textContent);
frame.srcdoc = text.replace("<head>", "<head>" + before);
</script>"""


def drive(page: Path, tmp_path: Path, script: str, width: int):
    """What `script` returns: it may use `page`, and $(id)."""
    text = json.dumps(page.read_text(encoding="utf-8")).replace("<", "\\u003c")
    harness = tmp_path / "harness.html"
    harness.write_text(HARNESS % (width, text, script), encoding="utf-8")
    options = [*OPTIONS.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    run = subprocess.run(
        [CHROMIUM, *options, harness.as_uri()], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert '<pre id="answer">' in run.stdout, run.stdout[-2000:]
    answer = run.stdout.rpartition('<pre id="answer">')[2].partition("</pre>")[0]
    answer = json.loads(html.unescape(answer).replace("\xa0", " "))
    assert answer["errors"] == []
    return answer["value"]
