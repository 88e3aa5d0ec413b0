"""The environments of other projects: pinned here, made under `out/conformance` by the command, and used again.

Each lies over packtrain's environment: what is not pinned (torch, numpy, ...) is that one's, so that all settings
compute with the same torch for CPUs. Only what a trainer imports is installed, not all that its project asks for.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "out" / "conformance"
_WEB = ("requests==2.34.2", "urllib3==2.8.0", "charset-normalizer==3.5.3", "certifi==2026.10.19.post1")
_HTTP = (
    "httpx==0.28.1",
    "httpcore==1.0.9",
    "aiohttp==3.14.5",
    "aiosignal==1.4.0",
    "aiohappyeyeballs==2.7.1",
    "frozenlist==1.8.0",
    "multidict==7.2.1",
    "propcache==0.5.4",
    "yarl==1.25.1",
)
PINNED: dict[str, tuple[str, ...]] = {
    "llamafactory": (
        "llamafactory==0.9.5",
        "transformers==5.6.0",
        "tokenizers==0.22.2",
        "huggingface_hub==1.17.0",
        "trl==0.24.0",
        "peft==0.18.1",
        "accelerate==1.11.0",
        "datasets==4.0.0",
        "torchaudio==2.11.0",
        "omegaconf==2.4.0",
        "antlr4-python3-runtime==4.9.3",
        "fire==0.7.1",
        "termcolor==3.3.0",
        "pyarrow==21.0.0",
        "fsspec==2025.3.0",
        "dill==0.3.8",
        "multiprocess==0.70.16",
        "sentencepiece==0.2.3",
        *_HTTP,
        *_WEB,
    ),
    "torchtune": (
        "torchtune==0.6.1",
        "torchao==0.10.0",
        "torchdata==0.11.0",
        "omegaconf==2.4.0",
        "antlr4-python3-runtime==4.9.3",
        "tiktoken==0.14.0",
        "blobfile==3.3.0",
        "sentencepiece==0.2.3",
        "kagglehub==1.0.3",
        "pycryptodomex==3.24.2",
        "lxml==6.1.3",
        *_WEB,
    ),
    "swift": (
        "ms-swift==4.6.0",
        "transformers==5.16.1",
        "tokenizers==0.23.1",
        "huggingface_hub==1.17.0",
        "trl==0.29.1",
        "peft==0.20.0",
        "accelerate==1.13.0",
        "datasets==4.8.4",
        "modelscope==1.40.2",
        "modelscope-hub==0.5.1",
        "cryptography==50.0.2",
        "cffi==2.1.1",
        "pycparser==3.12",
        "binpacking==2.0.1",
        "dacite==1.9.2",
        "json-repair==0.64.6",
        "simplejson==4.3.0",
        "sentencepiece==0.2.3",
        *_HTTP,
        *_WEB,
    ),
}
REMOVED = {"llamafactory": "torchaudio/lib/*.so"}  # built for CUDA; where there is none, torchaudio does without


def python_of(environment: str) -> Path:
    """Returns the interpreter of an environment; of "", the one that runs."""
    return PLACE / environment / "bin" / "python" if environment else Path(sys.executable)


def make(environment: str) -> str:
    """Makes an environment where there is none of these pins, and returns the last line of what went wrong, if anything."""
    ready, pins = PLACE / environment / "installed.txt", "\n".join(PINNED.get(environment, ()))
    if not environment or (ready.exists() and ready.read_text(encoding="utf-8") == pins):
        return ""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", str(PLACE / environment)], check=True)
    (site,) = (PLACE / environment).glob("lib/python*/site-packages")
    (site / "zz_over.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [sys.executable, "-m", "pip", "--python", str(python_of(environment)), "install", "--quiet"]
    done = subprocess.run([*install, "--no-compile", "--no-deps", *PINNED[environment]], capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["pip failed and said nothing"])[-1]
    for library in site.glob(REMOVED[environment]) if environment in REMOVED else ():
        library.unlink()
    ready.write_text(pins, encoding="utf-8")
    return ""
