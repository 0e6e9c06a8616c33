"""Writes the C source of the ``aiordma._native._verbs`` extension (cffi, API mode); run by meson."""

import sys
from pathlib import Path

from cffi import FFI


def main(cdef: str, output: str) -> None:
    ffi = FFI()
    ffi.cdef(Path(cdef).read_text(encoding="utf-8"))
    ffi.set_source("aiordma._native._verbs", '#include "glue.h"')
    ffi.emit_c_code(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
