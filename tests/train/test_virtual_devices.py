"""Virtual CPU devices have threads enough for the collectives that they wait in together."""

import os
import subprocess
import sys

import pytest

_COUNT = """
import os
from train.parallel.runtime import set_up_devices

set_up_devices(4)
names = [open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")]
print(names.count("tf_XLAEigen"))
"""


@pytest.mark.parametrize(("given", "threads"), [(None, max(32, os.cpu_count())), ("5", 5)])
def test_each_virtual_device_has_eight_threads_unless_the_user_says_how_many_there_are(given, threads):
    environment = {name: value for name, value in os.environ.items() if name not in ("PJRT_NPROC", "XLA_FLAGS")}
    if given is not None:
        environment["PJRT_NPROC"] = given
    process = subprocess.run(
        [sys.executable, "-c", _COUNT], capture_output=True, text=True, env=environment, timeout=300
    )
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) == threads
