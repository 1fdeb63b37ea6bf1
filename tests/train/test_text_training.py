"""What processes say reaches all of them, whatever its size."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from elm_mlx.train.text_training import gather

PROGRAM = """
import json, elm_mlx, mlx.core as mx
from elm_mlx.train.text_training import gather
group = mx.distributed.init(strict=True, backend="ring")
print(json.dumps([gather({"rank": group.rank(), "é": "x" * 9000 * group.rank()}), gather([])]))
"""


def test_one_process() -> None:
    assert gather({"a": [1, None]}) == [{"a": [1, None]}]


def test_two_processes(tmp_path: Path) -> None:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    hosts = [[f"127.0.0.1:{each.getsockname()[1]}"] for each in sockets]
    for each in sockets:
        each.close()
    (tmp_path / "hosts.json").write_text(json.dumps(hosts))
    settings = os.environ | {"MLX_HOSTFILE": str(tmp_path / "hosts.json")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM], env=settings | {"MLX_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    expected = [[{"rank": 0, "é": ""}, {"rank": 1, "é": "x" * 9000}], [[], []]]
    assert [json.loads(output) for output in outputs] == [expected, expected]
