"""The lab in a kernel of its own, spoken to as a page does, without a page."""

from __future__ import annotations

import pathlib
import queue
import time
from collections.abc import Iterator
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager
from tiny import environment

LAB = """
from polrl_widgets import Lab
from tiny import Tiny

lab = Lab(Tiny(), mode="live")
lab.play()
print(lab.board.model_id)
"""


@pytest.fixture
def kernel(tmp_path: pathlib.Path) -> Iterator[BlockingKernelClient]:
    """A kernel that finds polrl and the tests' learners."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path), env=environment(POLRL_RUNS=str(tmp_path / "runs")))
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=120)
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def ask_control(client: BlockingKernelClient, kind: str, **content: str) -> dict[str, Any]:
    """Send a request over the control channel; return what is answered."""
    request = client.session.msg(kind, content)
    client.control_channel.send(request)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        reply = client.get_control_msg(timeout=60)
        if reply["parent_header"].get("msg_id") == request["header"]["msg_id"]:
            return reply["content"]
    raise AssertionError(f"{kind} was not answered")


def answered(client: BlockingKernelClient, subshell: str, comm: str, seconds: float) -> bool:
    """Ask for everything as a page does, on a subshell; whether the board sends it."""
    hello = {"comm_id": comm, "data": {"method": "custom", "content": {"type": "hello"}}}
    message = client.session.msg("comm_msg", hello)
    message["header"]["subshell_id"] = subshell
    while client.iopub_channel.msg_ready():
        client.get_iopub_msg(timeout=1)
    client.shell_channel.send(message)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            heard = client.get_iopub_msg(timeout=1)
        except queue.Empty:
            continue
        if heard["msg_type"] == "comm_msg" and heard["content"]["comm_id"] == comm:
            if heard["content"]["data"]["content"].get("whole"):
                return True
    return False


def test_a_page_is_heard_after_the_subshell_of_an_earlier_one_is_gone(kernel: BlockingKernelClient) -> None:
    features = kernel.kernel_info(reply=True, timeout=60)["content"].get("supported_features", [])
    if "kernel subshells" not in features:
        pytest.skip("this ipykernel has no subshells")
    printed: list[str] = []
    kernel.execute_interactive(LAB, timeout=120, output_hook=lambda m: printed.append(m["content"].get("text", "")))
    board = "".join(printed).strip().splitlines()[-1]
    former = ask_control(kernel, "create_subshell_request")["subshell_id"]
    answered(kernel, former, board, 30)  # it may be told everything before it asks; after this never
    assert answered(kernel, former, board, 30)
    time.sleep(1)  # the lab trains on, and has sent more
    assert ask_control(kernel, "delete_subshell_request", subshell_id=former)["status"] == "ok"
    later = ask_control(kernel, "create_subshell_request")["subshell_id"]
    assert answered(kernel, later, board, 10)
