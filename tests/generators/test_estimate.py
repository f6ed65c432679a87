"""What a training will take: exact counts of parameters, memory near what torch allocates."""

import numpy as np
import pytest
import torch

from benchmarks.generators import peak_bytes
from distil_rank.__main__ import main
from distil_rank.generators.estimate import gpt2_parameters, working_bytes
from distil_rank.generators.loss import Objective, distillation_sums
from distil_rank.generators.models import fresh, save
from distil_rank.generators.teachers import Live, read
from distil_rank.generators.train import Schedule, set_mode


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape,half", [((12, 4, 128), False), ((2, 4, 512), True)])
def test_parameters_are_exact_and_memory_is_within_a_third(shape, half, checkpointing):
    student, teacher = fresh(5000, *shape, 128, 0, 0).eval(), fresh(5000, 2, 4, 256, 128, 0, 1)
    own = sum(p.numel() for p in student.parameters())
    assert gpt2_parameters(student.config) == own
    tokens, mask = torch.zeros(4, 128, dtype=torch.long), torch.ones(4, 128, dtype=torch.long)
    source = Live(teacher)
    set_mode(student, Schedule(1, gradient_checkpointing=checkpointing))

    def step():
        targets = source.targets(np.arange(4), tokens, mask)
        logits = read(student, tokens, "bfloat16" if half else "float32")
        distillation_sums(logits, targets, tokens, mask, Objective()).loss.backward()

    given = (student.config, teacher.config, tokens.numel(), half, checkpointing)
    wanted = 4 * own + working_bytes(*given)
    assert peak_bytes(step) == pytest.approx(wanted, rel=1 / 3)


def test_a_dry_run_says_what_it_takes_and_leaves_nothing(tmp_path, data, tokenizer, capsys):
    save(fresh(27, 2, 2, 32, 96, 0, 1), tokenizer, tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").unlink()  # no weights are needed
    before = sorted(tmp_path.rglob("*"))
    given = f"--teacher {tmp_path}/teacher --data {data} --out {tmp_path}/out --dry-run"
    main(f"generator train {given} --n-layer 1 --n-head 2 --n-embd 16".split())
    said = capsys.readouterr().out
    assert "H100" in said and "passes" in said and "assumed" in said
    own = fresh(27, 1, 2, 16, 96, 0, 0).num_parameters()
    assert said.startswith(f"{own:,} parameters")  # with the teacher's context, as it is trained
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "teacher" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SystemExit):
        main(f"generator train {given}".split())
    assert "a GPT-2 required" in capsys.readouterr().err
