"""A headless Chromium, spoken to over the pipes of its DevTools protocol."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--lang=en-US",
    "--remote-debugging-pipe",
)


class Browser:
    """One page; `problems` are console errors, exceptions and refused or failed requests."""

    def __init__(self, program: str, profile: Path) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._number = 0
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        # The protocol's pipes are descriptors 3 (commands) and 4 (answers); a shell puts them there.
        wires = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", wires, program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_read, to_write),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._answers = os.fdopen(self._from, "rb")
        targets = self._call("Target.getTargets", {}, session=False)["targetInfos"]
        target = next(found["targetId"] for found in targets if found["type"] == "page")
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True}, session=False)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable", {})

    def open(self, address: str) -> None:
        """Load a page anew and wait for it."""
        self._call("Page.navigate", {"url": "about:blank"})
        self._call("Page.navigate", {"url": address})
        ready = "new Promise(r => document.readyState === 'complete' ? r(1) : addEventListener('load', () => r(1)))"
        assert self.ask(ready) == 1

    def ask(self, expression: str) -> Any:
        """A JavaScript expression's value."""
        options = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        found = self._call("Runtime.evaluate", options)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", metrics)

    def close(self) -> None:
        self._call("Browser.close", {}, session=False)
        self._process.wait(20)
        os.close(self._to)
        self._answers.close()

    def _call(self, method: str, params: dict[str, Any], *, session: bool = True) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer.get("method", ""), answer.get("params", {}))

    def _read(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser went away"
            data += byte
        return json.loads(data)

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        wrong = method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert")
        wrong = wrong or (method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"))
        if wrong or method in ("Runtime.exceptionThrown", "Network.loadingFailed"):
            self.problems.append(json.dumps(params)[:500])
