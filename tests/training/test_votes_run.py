"""A run that learns from single votes."""

import json

import pytest

from dpo_jax.training.trainer import train


@pytest.mark.slow
def test_a_run_on_votes_logs_their_accuracy(tiny_config, mixed_pairs, tmp_path, capsys) -> None:
    config = tiny_config(
        "sd15",
        **{
            "loss.name": "kto",
            "data.path": str(mixed_pairs),
            "data.batch_size": 4,
            "steps": 2,
            "log_every": 1,
            "validation.every": 2,
            "checkpoint.best": "vote_accuracy",
        },
    )
    train(config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "train/loss" in row]
    assert trained[0]["train/loss"] == pytest.approx(0.5, abs=1e-4)  # the policy is the reference
    assert all("vote/accuracy" in row and "pair/accuracy" not in row for row in trained)
    held_out = [row for row in rows if "validation/votes" in row][-1]
    assert 0 <= held_out["validation/vote_accuracy"] <= 1
    assert "validation/pair_accuracy" not in held_out
    said = capsys.readouterr()
    assert "votes" in said.out
    assert "held-out votes" in said.err
