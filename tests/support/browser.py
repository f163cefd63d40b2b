"""Pages as a browser shows them; Chromium, where there is one."""

import json
import re
import shutil
import subprocess
from pathlib import Path

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = "needs chromium (Debian: apt-get install chromium)"


def dom(folder: Path, address: str, *flags: str) -> str:
    """The document after its scripts have run for a while."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,2600", *flags]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=6000", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def on_a_telephone(folder: Path, page: str, **data: str) -> str:
    """The document in a frame of 390 pixels (windows of Chromium have at least 500), with its width as the title.

    Args:
        data: JSON that the page would fetch, by name without `.json`.
    """
    for name, text in data.items():
        fetched = re.search(rf'await \(await fetch\("{name}\.json".*?\)\)\.json\(\)', page)
        assert fetched is not None
        page = page.replace(fetched[0], text)
    (folder / "phone.html").write_text(_PHONE.replace("PAGE", json.dumps(page).replace("</", "<\\/")))
    return dom(folder, f"file://{folder}/phone.html", f"--screenshot={folder / 'phone.png'}")


_PHONE = """<!doctype html><title>waiting</title><iframe width=390 height=2600 style="border:0"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.srcdoc = PAGE;
frame.onload = () => setTimeout(() => {
  const page = frame.contentDocument.documentElement;
  document.title = `width ${page.scrollWidth} of ${page.clientWidth}`;
  document.body.append(Object.assign(document.createElement("template"), { innerHTML: page.innerHTML }));
}, 2500);
</script>"""
