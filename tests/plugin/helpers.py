"""Settings and collator of the stock trainers that `attach` is tested on."""

from __future__ import annotations

import torch

COMMON = dict(
    use_cpu=True,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    num_train_epochs=2,
    logging_steps=1,
    learning_rate=1e-3,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)


def pad(features: list[dict], padding: int = 0) -> dict[str, torch.Tensor]:
    """What any user's padding collator does."""

    def rows(key: str, fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(feature[key]) for feature in features], batch_first=True, padding_value=fill
        )

    return {
        "input_ids": rows("input_ids", padding),
        "labels": rows("labels", -100),
        "attention_mask": (rows("input_ids", -1) >= 0).long(),
    }
