"""trainer.py: gradients, steps, SFT, checkpoints, and what memory a model needs."""

import contextlib
import dataclasses
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused, tiny, tiny_llama, torchao

import trainer
from trainer import Phase, State, adamw, is_complete, load_policy, load_trainer, save, sft

EXAMPLES = [([1, *range(4, 12 + k)], 3) for k in range(24)]


def equal(a, b) -> bool:
    """The same weights to the last bit."""
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_equal_one_loop_over_sequences_in_float64(tied):
    """Micro-batches, a head at response positions and a global mean change nothing."""
    policy, batch = tiny_llama(tie_word_embeddings=tied), []
    for L in random.choices(range(4, 31), k=9):
        batch.append(([random.randrange(4, 38) for _ in range(L)], random.randint(1, L - 2)))
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()
    mean = trainer.accumulate(policy, batch, token_budget=40)

    naive = tiny_llama(tie_word_embeddings=tied).double()
    naive.load_state_dict(policy.state_dict())
    losses = []
    for ids, n_prompt in batch:
        logp = naive(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-logp[i - 1, ids[i]] for i in range(n_prompt, len(ids))]
    loss = torch.stack(losses).mean()
    loss.backward()

    assert mean == pytest.approx(loss.item(), rel=1e-5)
    ours = dict(policy.named_parameters())
    for name, p in naive.named_parameters():
        assert torch.allclose(ours[name].grad.double(), p.grad, rtol=1e-3, atol=1e-6), name


def test_every_example_is_seen_before_any_comes_again():
    drawn = trainer.batches(40, 16, np.random.default_rng(0))
    seen = np.concatenate([next(drawn) for _ in range(5)]).tolist()
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40))


def steps(n: int, disturb=lambda step: None):
    """n real steps, disturb(i) in place of the i-th loss; returns the log and the policy."""
    policy, calls = tiny_llama(), iter(range(n))

    def accumulate(policy, batch, budget):
        loss = trainer.accumulate(policy, batch, budget)
        return disturb(next(calls)) or loss

    phase = Phase("train 1", 0, range(n), n, 1e-2, 1e-3, 0.1)
    log = trainer.train(policy, adamw(policy, 1e-2), EXAMPLES, phase, tiny(), accumulate)
    return log, policy


def test_steps_that_are_not_finite_are_skipped_and_counted():
    log, policy = steps(6, lambda i: math.nan if i in (0, 1, 3, 4) else None)
    assert log["skipped"] == 4 and math.isfinite(log["loss"] + log["grad_norm"])
    assert all(p.isfinite().all() for p in policy.parameters())
    _, untouched = steps(2, lambda i: math.nan)
    assert equal(untouched, tiny_llama())


def test_three_steps_in_a_row_that_are_not_finite_stop_the_run(capsys):
    with refused("^train 1: .* at step 4: three steps in a row .* is kept"):
        steps(6, lambda i: math.inf if i > 1 else None)
    assert capsys.readouterr().err.count("which is skipped") == 3


def test_a_full_gpu_names_the_flags_that_make_room_and_other_errors_stay_what_they_are():
    def fails(step):
        raise RuntimeError(message)

    message = "CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has\nmore"
    flags = "a smaller --token-budget, or with --gradient-checkpointing, goes on"
    with refused(f"^CUDA .* 2 GiB; what was complete is kept, .* {flags}$"):
        steps(1, fails)
    message = "out of paper"
    with pytest.raises(RuntimeError, match=message):
        steps(1, fails)


def test_the_rate_rises_and_falls_along_the_whole_horizon():
    whole = Phase("x", 0, range(100), 100, peak=1.0, end=0.1, warmup=0.1)
    rates = [whole.rate(s) for s in whole.steps]
    assert rates[0] == rates[-1] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    second_half = Phase("x", 0, range(50, 100), 100, peak=1.0, end=0.1, warmup=0.1)
    assert [second_half.rate(s) for s in second_half.steps] == rates[50:]


def test_place_moves_the_moments_and_nothing_else():
    policy = tiny_llama()
    optimizer = adamw(policy, 1e-3)
    trainer.place(optimizer, torch.float64)  # a dtype stands in for the device that is not here
    for state in optimizer.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float64
        assert state["step"].dtype == torch.float32


def flat(policy) -> torch.Tensor:
    return torch.cat([p.detach().float().ravel() for p in policy.parameters()])


@torchao
def test_adamw8bit_moves_bf16_weights_as_float32_moves_its_own(toy):
    """Rounded to the nearest they would move far less: most steps are below half a bit."""
    moved = {}
    for optim in ("adamw", "adamw8bit"):
        policy, cfg = toy.policy(optim), dataclasses.replace(toy.cfg, optim=optim)
        before, optimizer = flat(policy), adamw(policy, 1e-5)
        phase = Phase("x", 0, range(10), 10, 1e-5, 1e-5, 0.0)
        trainer.train(policy, optimizer, EXAMPLES, phase, cfg)
        moved[optim] = flat(policy) - before
    ratio = moved["adamw8bit"] @ moved["adamw"] / (moved["adamw"] @ moved["adamw"])
    assert 0.8 < ratio < 1.2 and policy.dtype == torch.bfloat16

    held = 0
    for state in optimizer.state.values():
        for value in state.values():
            parts = [value.codes, value.scale] if hasattr(value, "codes") else [value]
            held += sum(part.nbytes for part in parts)
    counted = trainer.needs(cfg, policy.num_parameters(), None, False)["optimizer"]
    assert held == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("optim", ["adamw", pytest.param("adamw8bit", marks=torchao)])
def test_training_goes_on_from_a_checkpoint_bit_for_bit(toy, tmp_path, optim):
    cfg, policy = dataclasses.replace(toy.cfg, optim=optim), toy.policy(optim)
    optimizer = adamw(policy, 1e-3)
    first, second = (Phase("x", i, range(6 * i, 6 * i + 6), 12, 1e-3, 1e-4, 0.0) for i in (0, 1))
    log = trainer.train(policy, optimizer, EXAMPLES, first, cfg)
    save(State(1, policy, optimizer, log), tmp_path / "c", toy.setup.tokenizer)

    again, held = load_policy(cfg, tmp_path / "c"), []
    fresh = adamw(again, 1.0)

    def note(optimizer, saved):
        held.append((len(optimizer.state), "trainer.pt" in Path("/proc/self/maps").read_text()))

    fresh.register_load_state_dict_pre_hook(note)
    assert load_trainer(tmp_path / "c", fresh) == log
    assert held == [(0, True)]  # the new moments have gone, and the file is mapped, not read
    for policy_, optimizer_ in ((policy, optimizer), (again, fresh)):
        trainer.train(policy_, optimizer_, EXAMPLES, second, cfg)
        torch.rand(7)  # the second finds torch's generator in another state
    assert equal(policy, again)


@pytest.fixture
def saved(toy, tmp_path) -> Path:
    """A checkpoint."""
    state = State(1, toy.policy(), log={"loss": 1.5})
    save(state, tmp_path / "iter_1", toy.setup.tokenizer)
    return tmp_path / "iter_1"


def test_a_broken_checkpoint_is_not_complete(saved):
    weights, marks = saved / "model.safetensors", saved / "complete.json"
    whole, listed = weights.read_bytes(), marks.read_text()
    one_bit = whole[:-1] + bytes([whole[-1] ^ 1])
    zeros = whole[:5000] + bytes(4096) + whole[9096:]
    for broken in (whole[:1000], one_bit, zeros):
        weights.write_bytes(broken)
        assert not is_complete(saved)
    weights.write_bytes(whole)
    for broken in ("", "{", "[1]", "null"):
        marks.write_text(broken)
        assert not is_complete(saved)
    marks.write_text(listed)
    assert is_complete(saved) and not is_complete(saved / "none")
    (saved / "trainer.pt").unlink()
    assert not is_complete(saved)


def test_the_fingerprint_of_a_large_file_sees_both_of_its_ends(tmp_path):
    large, marks = tmp_path / "large", []
    large.touch()
    os.truncate(large, 2**30)  # sparse: zeros that take no disk
    for at in (5, 0, 2**30 - 1):
        with open(large, "r+b") as f:
            f.seek(at)
            f.write(b"x")
        marks.append(trainer.fingerprint(large))
    assert [size for size, _ in marks] == [2**30] * 3 and len({crc for _, crc in marks}) == 3


def test_a_save_that_fails_half_way_leaves_the_old_checkpoint(toy, saved, monkeypatch):
    def full(content, path):
        Path(path).write_bytes(b"half")
        raise OSError

    monkeypatch.setattr(torch, "save", full)
    for folder in (saved, saved.with_name("iter_2")):
        with pytest.raises(OSError):
            save(State(2, toy.policy()), folder, toy.setup.tokenizer)
    assert is_complete(saved) and load_trainer(saved) == {"loss": 1.5}
    assert not saved.with_name("iter_2").exists()


def test_sft_is_made_once_for_what_it_depends_on_and_goes_on_from_its_last_stage(toy, monkeypatch):
    phases, train = [], trainer.train

    def counted(policy, optimizer, examples, phase, cfg):
        phases.append((phase.name, phase.steps, phase.horizon))
        return train(policy, optimizer, examples, phase, cfg)

    monkeypatch.setattr(trainer, "train", counted)
    of_toy = toy.setup.base, toy.setup.human, toy.setup.tokenizer
    last = ("SFT to epoch_12", range(48, 96), 96)  # of one schedule
    with contextlib.chdir(toy.cwd):
        [start] = sft(toy.cfg, *of_toy)
        assert start.resolve() == toy.start and not phases
        [first] = sft(tiny("--seed 1 --method rest-em"), *of_toy)
        assert first != start and phases == [("SFT to epoch_6", range(48), 96)]
        both = sft(tiny("--seed 1 --method sft"), *of_toy)
        assert both == [first, first.with_name("epoch_12")] and phases[1:] == [last]
        weights = (both[1] / "model.safetensors").read_bytes()
        for path in both:  # from nothing: the same bits
            (path / "complete.json").unlink()
        sft(tiny("--seed 1 --method sft"), *of_toy)
        assert len(phases) == 4 and (both[1] / "model.safetensors").read_bytes() == weights


def test_without_sft_the_model_is_taken_as_it_is(toy):
    setup = toy.setup
    assert sft(tiny("--start-epoch 0"), setup.base, [], setup.tokenizer) == [setup.base]
    with refused("no human solutions .* --start-epoch 0"):
        sft(toy.cfg, setup.base, [], setup.tokenizer)


def test_examples_that_are_too_long_are_counted_and_left_out(toy, capsys):
    q = toy.setup.splits.train[0]
    pairs = [(q, "# 1"), (q, "# 1 " * 200)]
    examples = trainer.as_examples(pairs, toy.setup, toy.cfg, "pool")
    assert len(examples) == 1 and examples[0][1] == len(toy.setup.prompt(q))
    assert "pool: 1 of 2 are longer than --max-length 160" in capsys.readouterr().err


def test_parameters_are_counted_from_a_config_or_taken_from_a_name():
    policy = tiny_llama()
    assert trainer.n_parameters("x", policy.config) == policy.num_parameters()
    names = {"x/Mistral-7B-v0.1": 7_000_000_000, "x/SmolLM2-135M": 135_000_000, "x/gpt2": None}
    assert {name: trainer.n_parameters(name, None) for name in names} == names
