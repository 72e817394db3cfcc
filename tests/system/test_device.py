"""What a machine is asked for while a stage runs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mlx_zh.system import device

FAKE = """#!/bin/sh
echo "$@" > {told}
trap 'echo ended >> {told}; exit' TERM
while :; do sleep 0.05; done
"""


@pytest.fixture
def caffeinate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for macOS's own on the path; what it was asked and its end go to the file returned."""
    told = tmp_path / "told"
    fake = tmp_path / "bin" / "caffeinate"
    fake.parent.mkdir()
    fake.write_text(FAKE.format(told=told))
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    return told


def test_a_mac_is_kept_awake_by_a_process_that_ends_with_this_one(
    caffeinate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No idle sleep (-i), no sleeping disk (-m), no sleep on mains power (-s), as long as this process is there (-w).

    A keyboard's Ctrl-C goes to a terminal's whole process group, so it must be in another one.
    """
    monkeypatch.setattr(device.sys, "platform", "darwin")
    with device.awake():
        for _ in range(500):
            if caffeinate.exists() and caffeinate.read_text():
                break
            time.sleep(0.02)
        assert caffeinate.read_text() == f"-i -m -s -w {os.getpid()}\n"
    assert caffeinate.read_text().endswith("ended\n")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_it_may_sleep_again_after_an_error(
    caffeinate: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    monkeypatch.setattr(device.sys, "platform", "darwin")
    with pytest.raises(error), device.awake():
        while not (caffeinate.exists() and caffeinate.read_text()):  # the shell makes the file before it writes
            time.sleep(0.02)
        raise error
    assert caffeinate.read_text().endswith("ended\n")


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_nothing_is_started_elsewhere_or_where_it_is_missing(
    caffeinate: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    monkeypatch.setattr(device.sys, "platform", platform)
    if platform == "darwin":
        monkeypatch.setenv("PATH", "")
    with device.awake():
        pass
    assert not caffeinate.exists()


METAL = "[METAL] Command buffer execution failed: "


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[malloc] Unable to allocate 1073741824 bytes.", "memory"),
        (
            "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer size of "
            "8 bytes.",
            "memory",
        ),
        ("[metal::malloc] Resource limit (499000) exceeded.", "memory"),
        ("cudaMallocAsync(&data, size, stream) failed: out of memory", "memory"),
        (f"{METAL}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).", "memory"),
        (
            f"{METAL}Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity).",
            "watchdog",
        ),
        (f"{METAL}Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout).", "watchdog"),
        (f"{METAL}Caused GPU Timeout Error (IOAF code 2).", "watchdog"),
        (f"{METAL}Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang).", "watchdog"),
        (
            f"{METAL}Discarded (victim of GPU error/recovery) "
            "(00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim).",
            "victim",
        ),
        (
            f"{METAL}Ignored (for causing prior/excessive GPU errors) "
            "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored).",
            "ignored",
        ),
        (
            f"{METAL}Ignored (for causing prior/excessive GPU errors) "
            "(00000004:kIOAccelCommandBufferCallbackErrorSubmissionsIgnored).",
            "ignored",
        ),
        (f"{METAL}Caused GPU Address Fault Error (0000000b:kIOGPUCommandBufferCallbackErrorPageFault).", "other"),
    ],
)
def test_what_mlx_says_when_the_accelerator_gives_up(text: str, kind: str) -> None:
    """As its Metal and CUDA back ends word it, and as macOS names its errors."""
    assert device.fault_of(RuntimeError(text)) == device.Fault(kind, text)
    assert device.fault_of(ValueError(text)) is None


@pytest.mark.parametrize(
    "text",
    [
        "cudaStreamSynchronize(stream) failed: an illegal memory access was encountered",
        "[matmul] Last dimension of first input with shape (2,3) must match second to last dimension of second input",
    ],
)
def test_other_errors_of_mlx_are_not_taken_for_it(text: str) -> None:
    assert device.fault_of(RuntimeError(text)) is None
