"""The one import point of the compiled module: ``ffi`` and ``lib``.

``lib`` holds the flat calls of native/glue.h and the constants of infiniband/verbs.h. Only aiordma.verbs
imports this; everything above speaks in its objects.
"""

from ._verbs import ffi, lib

__all__ = ["ffi", "lib"]
