"""A process that trains keeps the memory that its threads give back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_COUNT = """
import ctypes, os, re, sys, threading
from train.parallel.runtime import set_up_devices

set_up_devices()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.tmpfile.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = (ctypes.c_size_t,), (ctypes.c_void_p,)
together = threading.Barrier(16)

def allocate():
    together.wait()
    libc.free(libc.malloc(1000))
    together.wait()

threads = [threading.Thread(target=allocate) for _ in range(16)]
for one in threads: one.start()
for one in threads: one.join()
libc.fdopen.restype, libc.fdopen.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_char_p)
libc.malloc_info.argtypes = (ctypes.c_int, ctypes.c_void_p)
libc.fflush.argtypes = (ctypes.c_void_p,)
reader, writer = os.pipe()
os.set_blocking(reader, False)
stream = libc.fdopen(writer, b"w")
libc.malloc_info(0, stream)
libc.fflush(stream)
print(len(re.findall(rb"<heap nr=", os.read(reader, 2**16))))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="an option of glibc's malloc")
@pytest.mark.parametrize("variables", [{}, {"MALLOC_ARENA_MAX": "6"}], ids=["own", "user's"])
def test_threads_share_a_few_arenas_unless_the_user_has_set_their_number(variables):
    result = subprocess.run(
        [sys.executable, "-c", _COUNT], env=os.environ | variables, capture_output=True, text=True, check=True
    )
    # Those of threads that were started before the option is set stay.
    limit = int(variables.get("MALLOC_ARENA_MAX", "2"))
    assert int(result.stdout) <= limit + 1, result.stdout
    assert int(result.stdout) >= min(limit, 2)
