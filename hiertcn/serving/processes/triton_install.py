"""Find a tritonserver on this machine and what it needs to run: no Docker required.

Looks in this order: the folder named by ``HIERTCN_TRITON_HOME``, the files of the
``nvidia-pytriton`` wheel that ``make install`` unpacks beside the environment, ``tritonserver``
on PATH. The wheel brings only Triton's Python backend, so its servers get the Python-based
``onnxruntime`` backend in ``triton_backend``; any other build is expected to have NVIDIA's.
"""

import ctypes
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from hiertcn.errors import InputError
from hiertcn.files import whole_directory

_ADVICE = (
    "run 'make install' on x86-64 Linux, set HIERTCN_TRITON_HOME to an unpacked nvidia-pytriton "
    "wheel or to NVIDIA's /opt/tritonserver, or use a running Triton with --triton-url"
)


@dataclass(frozen=True, kw_only=True)
class TritonInstall:
    """A tritonserver binary; ``wheel`` is the unpacked wheel it belongs to, if it does."""

    executable: Path
    wheel: Path | None = None

    def environment(self) -> dict[str, str]:
        """Environment variables that the server and its model processes need."""
        environment = dict(os.environ)
        # Libraries of each model process would otherwise take every core.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[name] = "1"
        if self.wheel is not None:
            _prepend(environment, "LD_LIBRARY_PATH", [self.wheel / "nvidia_pytriton.libs"])
            library_folder = sysconfig.get_config_var("LIBDIR")
            if library_folder and (Path(library_folder) / _libpython()).exists():
                _prepend(environment, "LD_LIBRARY_PATH", [Path(library_folder)])
            _prepend(environment, "PATH", [Path(sys.prefix) / "bin"])
            _prepend(environment, "PYTHONPATH", [Path(sysconfig.get_path("purelib"))])
        return environment

    def write_backends(self, directory: Path) -> list[str]:
        """Lay out a backend directory if this build needs ours; return the server's arguments.

        Raises:
            InputError: the wheel has no Python backend for this Python, or libpython is missing.
        """
        if self.wheel is None:
            return []
        server = self.wheel / "pytriton" / "tritonserver"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.is_file():
            offered = sorted(path.parent.name for path in stub.parents[1].glob("*/*_stub"))
            raise InputError(
                f"the Triton wheel in {self.wheel} has no backend for Python {version}; it "
                f"offers {', '.join(offered) or 'none'}: use one of these or --triton-url"
            )
        _require_libpython()
        with whole_directory(directory) as aside:
            for name in ("python", "onnxruntime"):
                (aside / name).mkdir()
            backend = (server / "backends" / "python").iterdir()
            # pip may have compiled the wheel's modules into a folder beside them.
            for source in [*(path for path in backend if path.is_file()), stub]:
                _place(source, aside / "python" / source.name)
            source = Path(__file__).parent / "triton_backend" / "model.py"
            shutil.copyfile(source, aside / "onnxruntime" / "model.py")
        return [f"--backend-directory={directory}"]


def find_tritonserver() -> TritonInstall:
    """The tritonserver that this machine offers.

    Raises:
        InputError: there is none, saying how to get one.
    """
    if platform.system() != "Linux":
        raise InputError(
            f"Triton does not run on {platform.system()}; use a Triton on Linux with --triton-url"
        )
    named = os.environ.get("HIERTCN_TRITON_HOME")
    if named:
        install = _at(Path(named))
        if install is None:
            raise InputError(
                f"HIERTCN_TRITON_HOME is {named}, but there is no tritonserver in it; {_ADVICE}"
            )
        return install
    install = _at(Path(sys.prefix) / "share" / "hiertcn" / "triton")
    if install is not None:
        return install
    found = shutil.which("tritonserver")
    if found is None:
        raise InputError(
            f"no tritonserver found on this {platform.machine()} {platform.system()}: {_ADVICE}"
        )
    return TritonInstall(executable=Path(found))


def _at(home: Path) -> TritonInstall | None:
    home = home.absolute()
    inside_wheel = home / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    if inside_wheel.is_file():
        return TritonInstall(executable=inside_wheel, wheel=home)
    inside_opt = home / "bin" / "tritonserver"
    return TritonInstall(executable=inside_opt) if inside_opt.is_file() else None


def _prepend(environment: dict[str, str], name: str, folders: list[Path]) -> None:
    before = [environment[name]] if environment.get(name) else []
    environment[name] = os.pathsep.join([*map(str, folders), *before])


def _libpython() -> str:
    return f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"


def _require_libpython() -> None:
    folder = sysconfig.get_config_var("LIBDIR")
    if folder and (Path(folder) / _libpython()).exists():
        return
    try:
        ctypes.CDLL(_libpython())
    except OSError:
        raise InputError(
            f"Triton's Python backend needs {_libpython()}, which this Python was built without; "
            "install it (Debian: libpython3.11, pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared) "
            "or use --triton-url"
        ) from None


def _place(source: Path, target: Path) -> None:
    # Triton refuses symbolic links that leave the backend directory.
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
