"""The lab in a real browser: slider to screen, throughput beside the same run headless, first moving chart.

    python -m benchmarks lab [--rounds 5] [--seconds 12]

`Lab(NoiseMask())` trains in a notebook's kernel, first untouched, then while the arrow keys move a slider in the
page three times a second: throughput is told for both. One measurement of the slider runs from the key press to the
animation frame after the one that shows the new value as applied, which is the value that the last step was trained
with. The same run goes on headless in a plain process with as many threads; both are repeated in turn and medians
are given. Where other work shares the processor only ratios by processor time say something. Needs Chromium
(POLRL_CHROMIUM or on the path) and playwright.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
THREADS = max(1, (os.cpu_count() or 2) - 1)

IMPORTS = """
import time
from polrl.foundations.noise_mask import NoiseMask
from polrl_widgets import Lab
"""

LAB = "lab = Lab(NoiseMask(pretrain_epochs=4000))\nlab"

HEADLESS = """
import sys, time
from polrl import Run
from polrl.foundations.noise_mask import NoiseMask
run = Run(NoiseMask(pretrain_epochs=4000), threads=int(sys.argv[1]))
run.advance(30)
begun, cpu, start = time.perf_counter(), time.thread_time(), run.step
while time.perf_counter() - begun < float(sys.argv[2]):
    run.advance(10)
done = run.step - start
print(done / (time.perf_counter() - begun), done / (time.thread_time() - cpu))
"""

# Presses of the arrow key, each timed until the page shows and has painted what the step was trained with: the
# animation frame after the one in which the text changed.
WATCH = """
() => {
  window.polrlTimes = [];
  const read = () => [document.querySelector('.polrl-knob-mask_strength .noUi-handle').getAttribute('aria-valuetext'),
                      document.querySelector('.polrl-applied-mask_strength').textContent];
  let begun = null;
  const look = () => {
    const [wanted, applied] = read();
    if (begun === null || Math.abs(parseFloat(wanted) - applied) > 1e-6) return;
    const key = begun;
    begun = null;
    requestAnimationFrame(() => window.polrlTimes.push(performance.now() - key));
  };
  new MutationObserver(look).observe(document.querySelector('.polrl-tracks'),
                                     { childList: true, characterData: true, subtree: true });
  document.querySelector('.polrl-knob-mask_strength .noUi-handle').addEventListener('keydown', () => {
    if (begun !== null) window.polrlTimes.push(5000);  // the one before was never answered
    begun = performance.now();
  }, true);
}
"""


def headless(seconds: float) -> tuple[float, float]:
    """Updates of the same run in a plain process, per second and per second of its thread's processor time."""
    command = [sys.executable, "-c", HEADLESS, str(THREADS), str(seconds)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rate, per_cpu_second = map(float, done.stdout.split())
    return rate, per_cpu_second


def in_browser(browser, server, seconds: float, moves: int) -> dict[str, object]:
    """Updates per second untouched and while the slider is moved, its times to the screen, the first moving chart."""
    from conftest import NotebookPage

    notebook = NotebookPage(browser, server, "lab.ipynb", [IMPORTS, LAB]).open()
    page = notebook.page
    notebook.command("application:toggle-left-area")
    notebook.run_cell(0)
    page.evaluate("window.polrlBegun = performance.now()")
    notebook.run_cell(1)
    page.wait_for_selector(".polrl-run")
    page.click(".polrl-run")
    page.wait_for_function(
        """() => document.querySelector('.polrl-chart-c1 .polrl-plot')?.figure?.traces[0].x.length > 1
                 && Number(document.querySelector('.polrl-step')?.dataset.value) > 1"""
    )
    opened = page.evaluate("performance.now() - window.polrlBegun")
    page.evaluate(WATCH)
    before = _kernel(notebook)
    page.evaluate("document.querySelector('.polrl-lab').scrollIntoView()")
    page.wait_for_timeout(3000)  # JupyterLab is busy for a second after it has run a cell
    steps, begun = _steps(page)
    page.wait_for_timeout(1000 * seconds)
    last, ended = _steps(page)
    at_rest = 1000 * (last - steps) / (ended - begun)
    begin = _kernel(notebook)
    page.locator(".polrl-knob-mask_strength .noUi-handle").focus()
    page.evaluate("document.querySelector('.polrl-lab').scrollIntoView()")  # the cell's output took its place
    page.wait_for_timeout(3000)  # JupyterLab is busy for a second after it has run a cell
    steps, begun = _steps(page)
    for move in range(moves):
        page.keyboard.press("ArrowRight" if move % 10 >= 5 else "ArrowLeft")
        page.wait_for_timeout(1000 * seconds / moves)
    last, ended = _steps(page)
    times = page.evaluate("window.polrlTimes")
    if shot := os.environ.get("POLRL_SCREENSHOT"):
        page.screenshot(path=shot)  # now, for the question to the kernel scrolls the lab away
    end = _kernel(notebook)
    trained, cpu, messages, size = (after - first for first, after in zip(begin, end, strict=True))
    trained_at_rest, cpu_at_rest = (after - first for first, after in zip(before[:2], begin[:2], strict=True))
    notebook.close()
    rate = 1000 * (last - steps) / (ended - begun)
    return {
        "at rest": (at_rest, trained_at_rest / cpu_at_rest),
        "moving": (rate, trained / cpu),
        "times": times,
        "message": size / messages,
        "first": opened,
    }


def _kernel(notebook) -> list[float]:
    """Return steps, processor time of the training thread, messages and bytes so far."""
    told = "[lab.run.step, lab.driver.cpu_seconds(), lab.board.messages_sent, lab.board.bytes_sent]"
    return json.loads(notebook.read(told))


def _steps(page) -> tuple[int, float]:
    return tuple(page.evaluate("[+document.querySelector('.polrl-step').dataset.value, performance.now()]"))


def main(words: list[str]) -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks lab")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=12.0)
    options = parser.parse_args(words)
    sys.path.insert(0, str(ROOT / "tests" / "browser"))
    from conftest import FLAGS, JupyterServer, find_chromium
    from playwright.sync_api import sync_playwright

    plain, times, firsts = [], [], []
    ratios: dict[str, list[tuple[float, float]]] = {"at rest": [], "moving": []}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = JupyterServer(pathlib.Path(folder))
        try:
            for _ in range(options.rounds):
                rate, per_cpu = headless(options.seconds)
                browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
                lab = in_browser(browser, server, options.seconds, int(3 * options.seconds))
                browser.close()
                plain.append(rate)
                for name, seen in ratios.items():
                    seen.append((lab[name][0] / rate, lab[name][1] / per_cpu))
                times += lab["times"]
                firsts.append(lab["first"])
                p50, p95 = _share(lab["times"], 0.5), _share(lab["times"], 0.95)
                print(
                    f"headless {rate:.0f}, lab at rest {lab['at rest'][0]:.0f},"
                    f" slider moving {lab['moving'][0]:.0f} updates/s;"
                    f" slider to screen {p50:.0f} / {p95:.0f} ms; {lab['message']:.0f} bytes a message;"
                    f" load {os.getloadavg()[0]:.1f}",
                    flush=True,
                )
        finally:
            server.close()
    report = {
        "slider to screen p50 ms": round(_share(times, 0.5)),
        "slider to screen p95 ms": round(_share(times, 0.95)),
        "moves": len(times),
        "cell run to first moving chart, ms": round(statistics.median(firsts)),
        "headless updates/s": round(statistics.median(plain), 1),
    }
    for name, where in (("at rest", "untouched"), ("moving", "slider moving")):
        by_clock, by_processor = (round(statistics.median(column), 3) for column in zip(*ratios[name], strict=True))
        report[f"throughput ratio, {where}"] = by_clock
        report[f"throughput ratio, {where}, by processor time of the training thread"] = by_processor
    print(json.dumps(report, indent=2))


def _share(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(share * len(times)))] if times else float("nan")
