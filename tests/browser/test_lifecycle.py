"""What becomes of a lab when its kernel, its page or its cell goes: nothing trains unseen, nothing is lost."""

from __future__ import annotations

import json
import time

TINY = """
import time, torch, polrl
from polrl import Bars, Curve, Learner, Run, knob
from polrl_widgets import Lab

class Config(polrl.Config):
    strength: float = knob(0.5, low=0.0, high=1e6, scale="log_zero", smallest=1e-3, first=True)

class Tiny(Learner[Config]):
    curves = (Curve("value", "Value"),)

    def setup(self):
        self.x = torch.ones(())

    def update(self):
        time.sleep(0.005)
        if self.config.strength == 13.0:
            raise RuntimeError("thirteen is not liked here")
        self.x = 1 - 0.01 * self.x * self.config.strength
        return {"value": self.x if self.config.strength < 1e6 else self.x / 0}
"""
CELLS = [TINY, "lab = Lab(Tiny())\nlab"]
COUNT = "import threading; sum(t.name == 'polrl-training' for t in threading.enumerate())"


def wait_message(notebook, part: str) -> None:
    notebook.page.wait_for_function(
        "part => document.querySelector('.polrl-message').textContent.includes(part)", arg=part
    )


def kernel_of(notebook) -> str:
    return notebook.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.id")


def training(notebook) -> bool:
    return notebook.read("lab.driver.training") == "True"


def test_interrupting_an_idle_kernel_pauses(lab):
    lab.page.click(".polrl-run")
    lab.wait_steps(20)
    lab.server.ask(f"kernels/{kernel_of(lab)}/interrupt", method="POST")
    wait_message(lab, "the kernel was interrupted")
    assert not training(lab)
    lab.page.click(".polrl-run")
    lab.wait_steps(int(lab.read("lab.run.step")) + 20)


def test_interrupting_a_cell_pauses_as_well(lab):
    lab.page.click(".polrl-run")
    lab.wait_steps(5)
    kernel = kernel_of(lab)
    cells = lab.page.locator(".jp-CodeCell")
    lab.run_code("pass")
    cells.nth(lab.count).locator(".cm-content").fill("time.sleep(60)")
    lab.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-cell'); }")  # it ends with the cell
    lab.page.wait_for_function(
        "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'busy'"
    )
    time.sleep(1)
    lab.server.ask(f"kernels/{kernel}/interrupt", method="POST")
    wait_message(lab, "the kernel was interrupted")
    assert "KeyboardInterrupt" in cells.nth(lab.count).inner_text()
    assert not training(lab)


def test_an_exception_shows_its_traceback_and_pauses(lab):
    lab.page.click(".polrl-run")
    lab.wait_steps(5)
    lab.type_value("strength", "13")
    wait_message(lab, "RuntimeError: thirteen is not liked here")
    assert not training(lab)


def test_the_guard_names_step_metric_and_the_last_change(lab):
    lab.page.click(".polrl-run")
    lab.wait_steps(40)
    lab.type_value("strength", "1000000")
    wait_message(lab, "value was not finite at step")
    words = lab.text(".polrl-message")
    assert "strength=1000000.0" in words and "the run is back at step" in words
    assert not training(lab)
    assert lab.read("bool(lab.run.history.value.notna().all()), lab.run.learner.config.strength < 1e6") == "True True"


def test_a_lab_whose_output_is_cleared_stops_training(lab):
    lab.page.click(".polrl-run")
    lab.wait_steps(5)
    lab.page.locator(".jp-CodeCell").nth(1).locator(".cm-content").click()
    lab.command("notebook:clear-cell-output")
    lab.page.wait_for_function("() => !document.querySelector('.polrl-lab')")
    stopped = "end = time.time() + 20\nwhile lab.driver.training and time.time() < end: time.sleep(0.1)"
    assert lab.run_code(f"{stopped}\nprint(lab.driver.training, '|', lab._notice)").startswith("False | paused")


def test_two_labs_train_in_one_kernel_without_disturbing_each_other(lab):
    assert lab.read("Run(Tiny()).step") == "0"
    lab.run_code("lab.close(); a = Lab(Tiny()); b = Lab(Tiny(strength=0.1)); a.play(200); b.play(200)")
    lab.run_code(
        "end = time.time() + 60\nwhile (a.driver.training or b.driver.training) and time.time() < end: time.sleep(0.1)"
    )
    printed = lab.run_code(
        "alone = [Run(Tiny()), Run(Tiny(strength=0.1))]\n"
        "for run in alone: run.advance(200)\n"
        "print([lab.run.step for lab in (a, b)], [bool((lab.run.history.value == run.history.value).all())"
        " for lab, run in zip((a, b), alone)])\n"
        "a.close(); b.close()"
    )
    assert printed == "[200, 200] [True, True]"


def test_where_no_custom_widget_arrives_pictures_are_redrawn(lab):
    lab.run_code("lab.close(); lab = Lab(Tiny(), mode='plain')\nlab")
    picture = lab.page.locator(".polrl-plain img")
    picture.wait_for()
    assert lab.page.locator(".polrl-board").count() == 0
    before = picture.get_attribute("src")
    lab.page.click(".polrl-run")
    lab.page.wait_for_function("before => document.querySelector('.polrl-plain img').src !== before", arg=before)
    lab.page.wait_for_function("() => /[1-9]\\d* steps/.test(document.querySelector('.polrl-plain').textContent)")
    lab.page.click(".polrl-pause")
    assert lab.read("lab.driver.error == '', lab.close()") == "True None"


def load_again(lab):
    """Load a page while its lab trains, and wait until the lab is back."""
    lab.page.click(".polrl-run")
    lab.wait_steps(20)
    lab.reload()
    lab.wait_lab()
    lab.wait_steps(60)


def test_a_page_that_is_loaded_again_finds_the_training_lab(lab):
    load_again(lab)
    lab.page.click(".polrl-pause")
    assert lab.run_code(f"{COUNT.split('; ')[0]}; print({COUNT.split('; ')[1]})") == "1"
    shown = lab.page.evaluate("document.querySelector('.polrl-chart .polrl-plot').figure.traces[0].x.slice(0, 3)")
    assert shown == [1, 2, 3]
    assert lab.errors == []


# The last one of the shared notebook: the script stays with the page.
LATE = """
const timeout = AbortSignal.timeout;
window.givenUp = 0;
AbortSignal.timeout = (ms) => timeout.call(AbortSignal, ms === 2000 && window.givenUp++ === 0 ? 0 : ms);
"""


def test_a_page_that_is_too_busy_to_start_the_board_gets_a_new_one(lab):
    lab.page.add_init_script(LATE)  # anywidget gives a model up that did not start within two seconds
    load_again(lab)
    lab.page.click(".polrl-pause")
    lab.wait_text(".polrl-state", "paused")
    assert lab.page.evaluate("window.givenUp") >= 2  # the model that could not start, and the one that did
    assert lab.page.locator(".polrl-board").count() == 1


def test_after_a_kernel_restart_the_run_goes_on_from_its_folder(open_notebook):
    slow = "lab = Lab(NoiseMask(width=4, per_class=4, pretrain_epochs=40))\nlab"
    notebook = open_notebook([f"{TINY}\nfrom polrl.foundations.noise_mask import NoiseMask", slow])
    notebook.wait_lab()
    folder = notebook.read("lab.run.folder")
    notebook.page.click(".polrl-run")
    saved = "import pathlib, time\nend = time.time() + 60\nbegun = time.time()\n"
    saved += f"file = pathlib.Path({folder!r}, 'state.safetensors')\n"
    saved += "late = lambda: not file.exists() or file.stat().st_mtime < begun + 1\n"
    saved += "while late() and time.time() < end: time.sleep(0.1)\nprint(lab.run.step > 0)"
    assert notebook.run_code(saved) == "True"
    notebook.server.ask(f"kernels/{kernel_of(notebook)}/restart", method="POST")
    notebook.wait_kernel()
    notebook.command("notebook:clear-all-cell-outputs")  # the prompts count from 1 again
    notebook.run_cell(0)
    told = notebook.run_code(
        f"run = Run.load({folder!r}); step = run.step; again = Run.replay(run.tape)\n"
        "import json; print(json.dumps([step, run._tape.digest == again.tape.digest])); run.close()"
    )
    step, alike = json.loads(told.splitlines()[-1])
    assert step > 0 and alike
