"""Prompts and prefixes of PEFT's other task types: what its own models compute, read and written again."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from support import close
from torch import Tensor, nn

import peftfn as pf

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning"),
]
IDS = torch.tensor([[5, 6, 7, 8, 9, 3], [4, 4, 9, 2, 7, 3], [9, 8, 7, 6, 5, 4]])
MASK = torch.ones(3, 6, dtype=torch.long)
MASK[1, 4:] = 0
TASKS: dict[str, tuple[Any, str]] = {
    "TOKEN_CLS": (tf.BertForTokenClassification, "logits"),
    "QUESTION_ANS": (tf.BertForQuestionAnswering, "start_logits"),
    "FEATURE_EXTRACTION": (tf.BertModel, "last_hidden_state"),
}
"""Task type → (a model, what is compared of its output)."""


@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PromptEncoderConfig, peft.PrefixTuningConfig])
@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_pefts_both_ways(task: str, config: Any, tmp_path: Path) -> None:
    cls, key = TASKS[task]

    def output(run: Any) -> Tensor:
        """Of the real tokens: PEFT returns virtual ones too, in front."""
        y: Tensor = getattr(run(input_ids=IDS, attention_mask=MASK), key).detach()
        return y[:, -IDS.shape[1] :][MASK.bool()]

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = cls(tf.BertConfig(vocab_size=32, **size)).eval()
    made: nn.Module = peft.get_peft_model(copy.deepcopy(base), config(task_type=task, num_virtual_tokens=3)).eval()
    for p in (p for p in made.parameters() if p.requires_grad):
        p.data += 0.3 * torch.randn_like(p)
    made.save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    net, a = pf.load(tmp_path / "theirs", base)

    want = output(made)
    close(output(lambda **x: net.apply(a, **x)), want, 1e-5)
    assert not torch.allclose(output(base), want, atol=0.1)
    pf.save(tmp_path / "ours", net, a, format="peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert type(again) is type(made)
    close(output(again), want, 1e-5)
