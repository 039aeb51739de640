"""The one step of a build that pyproject.toml cannot say: with D2MOE_AHEAD, the CPU backend's library is compiled into
the wheel, which then belongs to a platform, and needs no compiler where it is installed. Without it the wheel is pure
Python, and that library is compiled by the first server that needs it.

D2MOE_AHEAD: `1` for all targets of this architecture (d2moe_vllm/ops/cpu/compiler.py), or some by name, with commas.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

AHEAD = os.environ.get("D2MOE_AHEAD", "").strip()
FOLDER = Path("d2moe_vllm", "ops", "cpu")


def compiler():
    """The package's own file; the package cannot be imported here, as torch is not installed."""
    spec = importlib.util.spec_from_file_location("compiler", FOLDER / "compiler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Build(build_py):
    def run(self):
        super().run()
        if not AHEAD:
            return
        if self.editable_mode:
            raise SystemExit("D2MOE_AHEAD is for wheels: an editable install compiles when it is used; unset it")
        # What an earlier build left there.
        for left in (Path(self.build_lib) / FOLDER / "built").glob("*.so"):
            left.unlink()
        wanted = None if AHEAD == "1" else AHEAD.split(",")
        compiler().compile_ahead(Path(self.build_lib) / FOLDER / "built", wanted)


class OfPlatform(Distribution):
    def has_ext_modules(self):
        """Makes setuptools install everything where what is compiled belongs."""
        return bool(AHEAD)


class Wheel(bdist_wheel):
    def get_tag(self):
        """The library knows nothing of Python: any version will do."""
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if AHEAD else tag


setup(distclass=OfPlatform, cmdclass={"build_py": Build, "bdist_wheel": Wheel})
