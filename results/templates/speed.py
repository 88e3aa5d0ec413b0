"""How many rows a CPU second are tokenised, by the code in PYTHONPATH: run in a process of its own, prints JSON.

PYTHONPATH=checkout python results/templates/speed.py gsm8k.jsonl --rows 3000
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ message.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MODES = {
    "messages, all learnt": {},
    "completion_only_loss": {"completion_only_loss": True},
    "assistant_only_loss": {"assistant_only_loss": True},
}
NEW_MODES = {"assistant_only_loss, no markers": {"assistant_only_loss": True}}  # refused before


def make_tokenizer(texts: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=4096, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def measure(path: Path, rows: int, modes: dict[str, dict]) -> dict[str, float]:
    """Rows a CPU second of each mode: reading, rendering, tokenising and storing, without the first batch's warm-up."""
    import datasets

    from packtrain.data.examples import build_examples
    from packtrain.data.sources import open_rows

    datasets.disable_progress_bars()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:rows]]
    tokenizer = make_tokenizer([line["question"] + line["answer"] for line in lines[:1000]])
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, count in (("warm-up", 50), ("all", len(lines))):
            chats = [
                {
                    "messages": [
                        {"role": "user", "content": q["question"]},
                        {"role": "assistant", "content": q["answer"]},
                    ]
                }
                for q in lines[:count]
            ]
            file = Path(directory, f"{name}.jsonl")
            file.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
            for mode, options in modes.items():
                bare = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
                tokenizer.chat_template = bare if mode in NEW_MODES else CHATML
                cache = Path(directory, "cache", name, mode)
                start = time.process_time()
                examples = build_examples(open_rows(str(file)), tokenizer, cache_dir=cache, **options)
                found[mode] = count / (time.process_time() - start)
                assert len(examples) == count
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--new", action="store_true", help="also what the code before refuses")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.path, arguments.rows, MODES | (NEW_MODES if arguments.new else {}))))


if __name__ == "__main__":
    main()
