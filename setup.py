"""Build the one extension, pgtask._fastpath; everything else is declared in pyproject.toml.

The extension is one unit of compilation: `_fastpath.pyx` includes the parts in `_fastpath/`.

PGTASK_DEBUG=1 compiles with the line trace and the annotated HTML, for profiling and for reading the C.
"""

import os
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup

debug = os.environ.get("PGTASK_DEBUG") == "1"

setup(
    ext_modules=cythonize(  # type: ignore[no-untyped-call,unused-ignore]
        [
            Extension(
                "pgtask._fastpath",
                ["pgtask/_fastpath.pyx"],
                depends=sorted(glob("pgtask/_fastpath/*.pyx")),
                extra_compile_args=["-O0", "-g"] if debug else ["-O2"],
            )
        ],
        annotate=debug,
        compiler_directives={
            "language_level": 3,
            "boundscheck": debug,
            "wraparound": False,
            "linetrace": debug,
        },
    )
)
