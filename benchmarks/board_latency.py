"""Slider to screen and training throughput with a `Board` open in a real browser.

    python benchmarks/board_latency.py [--rounds 5] [--seconds 12]

A small network trains in a thread of a notebook's kernel; the board shows four curves and a grid of 2 x 8
images, fed about fifteen times a second. The arrow keys move a slider in the page. One measurement runs from the
key press to the animation frame after the one that shows the new value as applied. The same loop runs in a plain
process with as many threads; both are repeated in turn and the medians are given. Where other work shares the
processor, only the ratio by processor time says something. Needs Chromium (POLRL_CHROMIUM or on the path) and
playwright.
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
sys.path[:0] = [str(ROOT), str(ROOT / "widgets"), str(ROOT / "tests" / "browser")]

TRAINING = """
import threading, time
import numpy as np, torch

class Training:
    '''A small image classifier; `publish(steps, losses, images)` is called about 15 times a second.'''

    def __init__(self, publish=None, period=0.066):
        self.publish, self.period = publish, period
        self.strength, self.applied, self.steps, self.alive = 1.0, None, 0, True

    def run(self, seconds=None):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 5, 2), torch.nn.ReLU(),
            torch.nn.Conv2d(16, 32, 5, 2), torch.nn.ReLU(),
            torch.nn.Flatten(), torch.nn.Linear(512, 10),
        )
        adam = torch.optim.Adam(net.parameters(), 1e-3)
        images, labels = torch.rand(2048, 1, 28, 28), torch.randint(0, 10, (2048,))
        begun = last = time.perf_counter()
        self.begun_cpu = time.thread_time()
        fresh = []
        while self.alive and (seconds is None or time.perf_counter() - begun < seconds):
            strength = self.strength
            rows = torch.randint(0, 2048, (64,))
            loss = torch.nn.functional.cross_entropy(net(images[rows]), labels[rows])
            penalty = sum((p * p).sum() for p in net.parameters()) * 1e-4 * strength
            adam.zero_grad()
            (loss + penalty).backward()
            adam.step()
            self.steps += 1
            fresh.append((self.steps, loss.detach(), penalty.detach()))
            now = time.perf_counter()
            if self.publish and (now - last > self.period or strength != self.applied):
                self.applied, last = strength, now
                self.publish(fresh, strength, images[rows[:16]].reshape(2, 8, 28, 28).numpy())
                fresh = []
            elif len(fresh) > 1000:
                fresh = []
            self.per_cpu_second = self.steps / (time.thread_time() - self.begun_cpu)
        return self.steps / (time.perf_counter() - begun)
"""

LAB = """
import ipywidgets
from polrl.core.views import ImageGrid
from polrl_widgets.board import Board, Chart, Track, TrackFrame

names = ("loss", "penalty", "sum", "ratio")
board = Board([Chart(name, name, (name,)) for name in names], [Track("run", "network")])

def publish(fresh, strength, images):
    steps = np.array([row[0] for row in fresh])
    loss, penalty = (torch.stack([row[i] for row in fresh]).numpy() for i in (1, 2))
    curves = (loss, penalty, loss + penalty, penalty / loss)
    points = {name: (steps, curve) for name, curve in zip(names, curves)}
    views = {}
    if board.ready:
        views["images"] = ImageGrid(title="Batch", alt="Sixteen images of the batch", images=images)
    words = {"step": int(steps[-1]), "state": "running", "applied": {"x": f"{strength:.2f}"}}
    board.frame({"run": TrackFrame(points=points, views=views, **words)})

training = Training(publish)
slider = ipywidgets.FloatSlider(value=1.0, min=0.0, max=10.0, step=0.01)
slider.add_class("polrl-knob-x")
slider.observe(lambda change: setattr(training, "strength", change["new"]), "value")
threading.Thread(target=training.run, daemon=True).start()
ipywidgets.VBox([slider, board])
"""

# Presses of the arrow key, each timed until the page shows and has painted what the step was trained with.
WATCH = """
() => {
  window.polrlTimes = [];
  const read = () => [document.querySelector('.polrl-knob-x .widget-readout').textContent,
                      document.querySelector('.polrl-applied-x').textContent];
  document.querySelector('.polrl-knob-x .noUi-handle').addEventListener('keydown', () => {
    const begun = performance.now();
    const look = () => {
      const [wanted, applied] = read();
      if (wanted === applied) requestAnimationFrame(() => window.polrlTimes.push(performance.now() - begun));
      else if (performance.now() - begun < 5000) setTimeout(look, 1);
      else window.polrlTimes.push(5000);
    };
    setTimeout(look, 0);
  }, true);
}
"""


def headless(seconds: float) -> tuple[float, float]:
    """Updates of the same loop in a plain process, per second and per second of processor time."""
    code = f"{TRAINING}\ntraining = Training()\nprint(training.run({seconds}), training.per_cpu_second)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    rate, per_cpu_second = map(float, done.stdout.split())
    return rate, per_cpu_second


def in_browser(browser, server, seconds: float, moves: int) -> dict[str, object]:
    """Updates per second while the slider is moved, and the times from slider to screen."""
    from conftest import NotebookPage

    notebook = NotebookPage(browser, server, "latency.ipynb", [TRAINING, LAB]).open().run_all()
    page = notebook.page
    page.wait_for_selector(".polrl-applied-x")
    page.wait_for_selector(".polrl-chart .main-svg")
    page.evaluate("document.querySelector('.polrl-knob-x').scrollIntoView()")
    page.wait_for_timeout(2000)
    page.evaluate(WATCH)
    page.locator(".polrl-knob-x .noUi-handle").focus()
    steps, begun = _steps(page)
    for move in range(moves):
        page.keyboard.press("ArrowRight" if move % 5 else "ArrowLeft")
        page.wait_for_timeout(1000 * seconds / moves)
    last, ended = _steps(page)
    times = page.evaluate("window.polrlTimes")
    code = "training.alive = False\nprint(board.messages_sent, board.bytes_sent, training.per_cpu_second)"
    messages, size, per_cpu_second = map(float, notebook.run_code(code).split())
    if shot := os.environ.get("POLRL_SCREENSHOT"):
        page.screenshot(path=shot)
    notebook.close()
    rate = 1000 * (last - steps) / (ended - begun)
    return {"rate": rate, "per_cpu": per_cpu_second, "times": times, "message": size / messages}


def _steps(page) -> tuple[int, float]:
    return tuple(page.evaluate("[+document.querySelector('.polrl-step').dataset.value, performance.now()]"))


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=12.0)
    options = parser.parse_args()
    from conftest import FLAGS, JupyterServer, find_chromium
    from playwright.sync_api import sync_playwright

    ratios, cpu_ratios, plain, times = [], [], [], []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = JupyterServer(pathlib.Path(folder))
        try:
            for _ in range(options.rounds):
                rate, per_cpu = headless(options.seconds)
                browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
                lab = in_browser(browser, server, options.seconds, int(3 * options.seconds))
                browser.close()
                plain.append(rate)
                ratios.append(lab["rate"] / rate)
                cpu_ratios.append(lab["per_cpu"] / per_cpu)
                times += lab["times"]
                p50, p95 = _share(lab["times"], 0.5), _share(lab["times"], 0.95)
                print(
                    f"headless {rate:.0f}, lab {lab['rate']:.0f} updates/s;"
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
        "headless updates/s": round(statistics.median(plain), 1),
        "throughput ratio": round(statistics.median(ratios), 3),
        "throughput ratio by processor time of the training thread": round(statistics.median(cpu_ratios), 3),
    }
    print(json.dumps(report, indent=2))


def _share(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(share * len(times)))] if times else float("nan")


if __name__ == "__main__":
    main()
