"""What stands in examples/ runs, and does what it says."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from cpp_build import ROOT

from dca_ext import DCAConfig, replace_attention

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def batching():
    pytest.importorskip("transformers", reason="the example runs a transformers model: pip install '.[demo]'")
    spec = importlib.util.spec_from_file_location("continuous_batching", EXAMPLES / "continuous_batching.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny_model():
    from dca_ext.cli.act_tiny import load_tiny

    return load_tiny()


def test_continuous_batching_runs(batching) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / "continuous_batching.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    answers = [line for line in result.stdout.splitlines() if " answer " in line]
    assert len(answers) == len(batching.prompts())
    assert all(line.endswith(", as model.generate") for line in answers)
    assert " 256 of them shared:" in answers[1]


def generated(model, prompt: list[int], max_new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": max_new_tokens}
    return model.generate(ids, **options)[0].tolist()


def test_requests_wait_for_pages_and_share_them(batching, tiny_model) -> None:
    dca_config = DCAConfig.from_pretraining_length(tiny_model.config.max_position_embeddings)
    engine = batching.Engine(tiny_model, dca_config, num_pages=30, tokens_per_step=50)
    common = torch.randint(32, 127, (200,)).tolist()
    prompts = [common, [*common[:160], 65, 66], torch.randint(32, 127, (230,)).tolist(), [67], common[:33]]
    requests = [engine.submit(prompts[0], 7)]
    for _ in range(5):
        engine.step()
    requests += [engine.submit(prompt, 7) for prompt in prompts[1:]]
    engine.step()
    assert engine.waiting, "30 pages are too few for all of these"
    engine.run()

    replace_attention(tiny_model, dca_config)
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.tokens == generated(tiny_model, prompt, 7)
    assert requests[1].shared == 160
    assert sorted(engine.pool.free) == list(range(30))
    assert not engine.pool.by_content
    assert not engine.pool.content


def test_a_request_that_never_fits_is_refused(batching, tiny_model) -> None:
    engine = batching.Engine(tiny_model, DCAConfig.from_pretraining_length(128), num_pages=2)
    with pytest.raises(ValueError, match="needs 3 pages; there are 2"):
        engine.submit([65] * 32, max_new_tokens=2)
