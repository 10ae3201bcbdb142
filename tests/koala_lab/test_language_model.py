"""Language models: causality, windows, losses, clipping, resume, metrics against slow loops."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from koala_lab import data, tasks
from koala_lab.config import RunConfig
from koala_lab.models import language
from koala_lab.models.language import LANGUAGE_MODELS, LSTM, Transformer
from koala_lab.runs import training as train
from koala_lab.tasks.language_model import COLUMNS, LanguageModel, windows
from tests.support.guards import NoHostReads

TINY = RunConfig(
    task="language_model",
    task_args={"sequence_length": 16},
    dataset="pydoc-topics",
    train_size=1500,
    model="lstm",
    model_args={"embedding": 8, "hidden": 12},
    optimizer="koala_m",
    epochs=2,
    batch_size=8,
    milestones=(1,),
)
SMALL = {"lstm": {"embedding": 8, "hidden": 12, "layers": 2}, "transformer": {"width": 8, "heads": 2, "layers": 2}}
each_network = pytest.mark.parametrize("name", SMALL)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def network_of(name: str, vocabulary: int = 11, context: int = 20, **changes: Any) -> nn.Module:
    torch.manual_seed(3)
    return LANGUAGE_MODELS[name](vocabulary, context=context, **SMALL[name] | changes)


def tokens_of(rows: int, length: int, vocabulary: int = 11) -> tuple[Tensor, Tensor]:
    text = torch.randint(vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(5))
    return text[:, :-1], text[:, 1:]


def task_of(config: RunConfig = TINY) -> LanguageModel:
    torch.manual_seed(config.seed)
    task = tasks.create(config, torch.device("cpu"))
    assert isinstance(task, LanguageModel)
    return task


# --- networks ---------------------------------------------------------------------------------------------------------


@each_network
@pytest.mark.parametrize("training", [True, False])
def test_the_future_does_not_change_the_past(name: str, training: bool) -> None:
    network = network_of(name).train(training)
    x, y = tokens_of(3, 12)
    changed = x.clone()
    changed[:, 7:] = (x[:, 7:] + 1) % 11
    with torch.no_grad():
        before, after = network(x, y)[0], network(changed, y)[0]
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().min(0).values.max() > 1e-4, "nor does it change itself"


@each_network
def test_the_past_matters(name: str) -> None:
    network = network_of(name).eval()
    x, y = tokens_of(3, 12)
    changed = x.clone()
    changed[:, 0] = (x[:, 0] + 1) % 11
    with torch.no_grad():
        difference = (network(x, y)[0] - network(changed, y)[0]).abs()
    assert (difference[:, :12].max(0).values > 0).all(), "the first token is forgotten"


@each_network
def test_rows_do_not_see_each_other(name: str) -> None:
    network = network_of(name).eval()
    x, y = tokens_of(4, 12)
    with torch.no_grad():
        together, alone = network(x, y)[0], network(x[2:3], y[2:3])[0]
    torch.testing.assert_close(together[2:3], alone)


@each_network
def test_evaluation_and_training_mode_agree_without_dropout(name: str) -> None:
    # torch has another, fused implementation of Transformer layers for evaluation
    network, (x, y) = network_of(name), tokens_of(3, 12)
    trained = network.train()(x, y)[0]
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x, y)[0], trained.detach())


@each_network
def test_dropout_acts_in_training_only(name: str) -> None:
    network, (x, y) = network_of(name, dropout=0.5), tokens_of(3, 12)
    assert not torch.equal(network.train()(x, y)[0], network(x, y)[0])
    assert torch.equal(network.eval()(x, y)[0], network(x, y)[0])


def test_an_lstm_goes_on_where_it_stopped() -> None:
    network, (x, y) = network_of("lstm").eval(), tokens_of(3, 12)
    with torch.no_grad():
        whole, last = network(x, y)
        first, state = network(x[:, :5], y[:, :5])
        second, end = network(x[:, 5:], y[:, 5:], state)
        forgetful, _ = network(x[:, 5:], y[:, 5:])
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)
    assert not torch.allclose(forgetful, second)


def test_tied_weights_are_one_tensor() -> None:
    tied = LSTM(50, embedding=8, hidden=8, tied=True)
    assert tied.output.weight is tied.embedding.weight
    count = sum(p.numel() for p in tied.parameters())
    assert sum(p.numel() for p in LSTM(50, embedding=8, hidden=8).parameters()) - count == 50 * 8
    with pytest.raises(ValueError, match="tied weights need embedding = hidden, got 8 and 12"):
        LSTM(50, embedding=8, hidden=12, tied=True)
    transformer = Transformer(50, context=4, width=8, tied=True)
    assert transformer.output.weight is transformer.embedding.weight


def test_numbers_of_parameters() -> None:
    # word_language_model of torch's examples with its defaults: embedding 200, two layers of 200, 33 278 words
    word = LSTM(33_278, embedding=200, hidden=200, layers=2)
    lstm = 4 * 200 * (200 + 200 + 2)
    assert sum(p.numel() for p in word.parameters()) == 2 * 33_278 * 200 + 33_278 + 2 * lstm
    layer = 4 * 8 * 8 + 4 * 8 + 2 * 8 * 32 + 32 + 8 + 4 * 8  # attention, its biases, the two dense layers, LayerNorms
    small = Transformer(50, context=16, width=8, layers=3)
    assert sum(p.numel() for p in small.parameters()) == 2 * 50 * 8 + 16 * 8 + 3 * layer + 2 * 8


def test_layers_of_a_transformer_start_from_different_weights() -> None:
    first, second = network_of("transformer").layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_a_transformer_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="a window of 12 tokens is longer than the context, 8"):
        network_of("transformer", context=8)(*tokens_of(1, 12))
    with pytest.raises(ValueError, match="width must be a multiple of heads, got 8 and 3"):
        network_of("transformer", heads=3)


def test_an_adaptive_softmax_is_the_likelihood_of_its_tree() -> None:
    network = network_of("lstm", hidden=32, cutoffs=(4, 7)).double()
    x, y = tokens_of(3, 12)
    hidden, _ = network.lstm(network.embedding(x))  # type: ignore[operator]
    head, tails = network.output.head.weight, network.output.tail  # type: ignore[union-attr]
    assert [tail[0].out_features for tail in tails] == [32 // 4, 32 // 16]  # type: ignore[index, union-attr]

    def nats(h: Tensor, token: int) -> Tensor:
        first = torch.log_softmax(head @ h, 0)  # four tokens and two clusters of tokens
        if token < 4:
            return -first[token]
        cluster = int(token >= 7)
        inner = torch.log_softmax(tails[cluster][1].weight @ tails[cluster][0].weight @ h, 0)  # type: ignore[index]
        return -first[4 + cluster] - inner[token - (4, 7)[cluster]]

    expected = torch.stack([nats(hidden[i, t], int(y[i, t])) for i in range(3) for t in range(12)]).view(3, 12)
    got, _ = network(x, y)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(network.float()(x, y)[0].double(), expected, rtol=0.05, atol=0.05)
    y = y.clone()
    y[1, 3:] = -1
    assert torch.equal(network(x, y)[0][y < 0], torch.zeros(9)), "what fills up a column costs nothing"


@pytest.mark.parametrize("there", [True, False])
def test_an_lstm_without_kernels_for_half_precision_is_computed_in_float32(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor without AVX-512 a run in bfloat16 goes on, and from a state that another one left behind."""
    if there and not language.has_lstm("cpu", torch.bfloat16):
        pytest.skip("this processor has no bfloat16 LSTM")
    network = network_of("lstm", hidden=32)
    x, y = tokens_of(3, 12)
    seen: list[torch.dtype] = []
    network.lstm.register_forward_hook(lambda module, args, out: seen.append(out[0].dtype))  # type: ignore[union-attr, operator]
    exact, (h, c) = network(x, y)
    follows, _ = network(x, y, (h, c))
    monkeypatch.setattr(language, "has_lstm", lambda device, dtype: there)
    with torch.autocast("cpu", torch.bfloat16):
        nats, state = network(x, y)
        again, _ = network(x, y, (h.bfloat16(), c.bfloat16()))
    again.sum().backward()
    assert seen == [torch.float32] * 2 + [torch.bfloat16 if there else torch.float32] * 2
    assert {s.dtype for s in state} == {seen[-1]}
    torch.testing.assert_close(nats, exact, rtol=0.05, atol=0.05)
    torch.testing.assert_close(again, follows, rtol=0.05, atol=0.05)
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_asking_for_an_lstm_draws_no_random_numbers() -> None:
    language.has_lstm.cache_clear()
    before = torch.get_rng_state()
    language.has_lstm("cpu", torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_adaptive_softmax_has_no_weights_to_tie() -> None:
    with pytest.raises(ValueError, match=r"no weights to tie: tied=True with cutoffs=\[4\]"):
        network_of("lstm", embedding=12, tied=True, cutoffs=(4,))
    with pytest.raises(ValueError, match="cutoffs"):
        network_of("lstm", cutoffs=(4, 30))


# --- windows ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(size=st.integers(2, 90), columns=st.integers(1, 7), length=st.integers(1, 9))
def test_windows_predict_every_token_but_the_first_once(size: int, columns: int, length: int) -> None:
    text = torch.arange(100, 100 + size)
    seen, previous = [], None
    for window in windows(text, columns, length):
        real = window.targets >= 0
        assert torch.equal(window.targets[real], window.tokens[real] + 1), "shifted by one"
        assert window.tokens.shape == window.targets.shape == (columns, window.tokens.shape[1])
        assert window.number == (0 if previous is None else previous.number + 1)
        if previous is not None:  # each row goes on where it stopped
            goes_on = previous.targets[:, -1] >= 0
            both = goes_on & real[:, 0]
            assert torch.equal(window.tokens[both, 0], previous.targets[both, -1])
        seen += window.targets[real].tolist()
        previous = window
    assert sorted(seen) == text[1:].tolist()


def test_training_batches_cover_the_text_in_columns() -> None:
    task = task_of(TINY.but(train_size=1000))
    text = task.data.train.tolist()
    batches = list(task.batches(0))
    assert len(batches) == task.steps_per_epoch == 999 // 8 // 16 == 7
    for row in range(8):
        start = row * (999 // 8)
        tokens = torch.cat([b.tokens[row] for b in batches]).tolist()
        targets = torch.cat([b.targets[row] for b in batches]).tolist()
        assert tokens == text[start : start + 7 * 16]
        assert targets == text[start + 1 : start + 7 * 16 + 1]
    assert [b.number for b in batches] == [*range(7)]


@pytest.mark.parametrize("start", [0, 1, 6, 7])
def test_a_resumed_epoch_goes_on_with_the_same_windows(start: int) -> None:
    task = task_of(TINY.but(train_size=1000))
    rest = list(task.batches(1, start))
    assert len(rest) == 7 - start
    for a, b in zip(list(task.batches(1))[start:], rest, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert a.number == b.number


# --- a step -----------------------------------------------------------------------------------------------------------


class Recorder(torch.optim.SGD):
    """SGD that remembers what it was given."""

    losses: Tensor
    gradient: Tensor

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.losses = closure()
        self.gradient = torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]])
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p -= group["lr"] * p.grad
        return self.losses


def recorded_step(config: RunConfig) -> tuple[LanguageModel, Recorder, Tensor]:
    task = task_of(config)
    optimizer = Recorder(task.network.parameters(), lr=0.1)
    task.network.train()
    returned = task.step(next(task.batches(0)), {"network": optimizer})
    return task, optimizer, returned


@each_network
def test_the_optimizer_sees_one_mean_loss_a_row(name: str) -> None:
    config = TINY.but(model=name, model_args=SMALL[name])
    _, optimizer, returned = recorded_step(config)
    task = task_of(config)  # the same weights again
    window = next(task.batches(0))
    expected = [task.network(window.tokens[i : i + 1], window.targets[i : i + 1])[0].mean().item() for i in range(8)]
    torch.testing.assert_close(optimizer.losses.detach(), torch.tensor(expected))
    torch.testing.assert_close(returned, optimizer.losses.detach().mean().reshape(1))
    assert not returned.requires_grad


def test_clipping_shortens_the_gradient_and_nothing_else() -> None:
    _, free, loss = recorded_step(TINY)
    norm = free.gradient.norm().item()
    for limit, expected in ((norm / 3, norm / 3), (norm * 3, norm)):
        _, clipped, same = recorded_step(TINY.but(task_args={"sequence_length": 16, "clip_norm": limit}))
        assert clipped.gradient.norm().item() == pytest.approx(expected, rel=1e-4)
        torch.testing.assert_close(clipped.gradient / expected, free.gradient / norm, rtol=1e-4, atol=1e-6)
        assert torch.equal(same, loss)


def test_clipping_changes_a_run() -> None:
    short = {"sequence_length": 16, "clip_norm": 0.05}
    plain, clipped = (train.train(c).epochs[-1]["train_loss"] for c in (TINY, TINY.but(task_args=short)))
    assert plain != clipped


def test_the_state_is_carried_through_an_epoch_and_starts_anew_with_the_next() -> None:
    task = task_of()
    optimizer = Recorder(task.network.parameters(), lr=0.0)  # the weights stay
    losses = [task.step(window, {"network": optimizer}).item() for _ in range(2) for window in task.batches(0)]
    half = task.steps_per_epoch
    assert losses[:half] == losses[half:]
    text, rows = task.data.train.long(), TINY.batch_size
    height = (len(text) - 1) // rows
    column = text[: height * rows].view(rows, height)[:, : 16 * half]
    following = text[1 : height * rows + 1].view(rows, height)[:, : 16 * half]
    with torch.no_grad():
        whole, _ = task.network(column, following)  # in one go
    torch.testing.assert_close(torch.tensor(losses[:half]), whole.view(rows, half, 16).mean((0, 2)))
    assert all(not s.requires_grad for s in task.state), "the gradient must not reach the window before"


def test_a_step_reads_nothing_back_to_the_host() -> None:
    run = train.TrainingRun(TINY.but(task_args={"sequence_length": 16, "clip_norm": 0.1}), torch.device("cpu"))
    batches = run.task.batches(0)
    with NoHostReads():
        for _ in range(3):
            run.train_step(next(batches))
    assert run.step == 3


def test_pieces_are_means_of_consecutive_steps() -> None:
    config = TINY.but(task_args={"sequence_length": 16, "pieces": 3}, train_size=1300)  # ten steps
    seen: list[float] = []
    run = train.TrainingRun(config, torch.device("cpu"))
    run.task.network.train()
    for window in run.task.batches(0):
        before = run.sums.clone()
        run.train_step(window)
        seen.append((run.sums - before)[0].item())
    run.end_epoch()
    got = [run.epochs[0][f"train_loss_{i}"] for i in (1, 2, 3)]
    parts = [seen[:4], seen[4:7], seen[7:]]
    assert got == pytest.approx([sum(part) / len(part) for part in parts], rel=1e-5)
    assert run.epochs[0]["train_loss"] == pytest.approx(sum(seen) / 10, rel=1e-5)


def test_pieces_change_nothing_else() -> None:
    plain, pieces = (train.train(c) for c in (TINY, TINY.but(task_args={"sequence_length": 16, "pieces": 2})))
    assert pieces.provenance["weights_sha256"] == plain.provenance["weights_sha256"]
    assert [{k: v for k, v in e.items() if "loss_" not in k} for e in pieces.epochs] == [
        {k: v for k, v in e.items() if "loss_" not in k} for e in plain.epochs
    ]


def test_metrics_of_the_beginning_of_a_text() -> None:
    task = task_of(TINY.but(task_args={"sequence_length": 16, "evaluation_size": 100}))
    whole = data.load("pydoc-topics", train_size=1500)
    for part in ("validation", "test"):
        assert torch.equal(getattr(task.data, part), getattr(whole, part)[:100])
    assert torch.equal(task.data.train, whole.train)


# --- metrics ----------------------------------------------------------------------------------------------------------


def slow_mean_nats(task: LanguageModel, text: list[int]) -> float:
    """Token by token, in columns like a person who reads them one after the other."""
    height = -(-(len(text) - 1) // COLUMNS)
    total, count, length = 0.0, 0, task.sequence_length
    for column in range(COLUMNS):
        start, end = column * height, min((column + 1) * height, len(text) - 1)
        state: tuple[Tensor, ...] = ()
        for t in range(start, end):
            if isinstance(task.network, LSTM):
                nats, state = task.network(torch.tensor([[text[t]]]), torch.tensor([[text[t + 1]]]), state)
            else:  # reads its window up to here
                first = start + (t - start) // length * length
                window = torch.tensor([text[first : t + 1]]), torch.tensor([text[first + 1 : t + 2]])
                nats = task.network(*window)[0][:, -1:]
            total, count = total + nats.item(), count + 1
    assert count == len(text) - 1
    return total / count


@each_network
def test_metrics_against_a_slow_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = data.load("pydoc-topics")
    short = data.TextData(**vars(whole) | {"test": whole.test[:403], "validation": whole.validation[:197]})
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: short)
    task = task_of(TINY.but(model=name, model_args=SMALL[name]))
    network = task.network.eval()
    with torch.no_grad():
        for p in network.parameters():
            p *= 3  # far from uniform
        expected = {part: slow_mean_nats(task, getattr(short, part).tolist()) for part in ("test", "validation")}
    metrics = task.evaluate(network)
    assert metrics["test_loss"] == pytest.approx(expected["test"], rel=1e-5)
    assert metrics["validation_loss"] == pytest.approx(expected["validation"], rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(expected["test"]), rel=1e-4)
    assert metrics["bits_per_character"] == pytest.approx(expected["test"] / math.log(2), rel=1e-5)


@each_network
def test_the_perplexity_of_a_uniform_model_is_the_size_of_the_vocabulary(name: str) -> None:
    task = task_of(TINY.but(model=name, model_args=SMALL[name]))
    with torch.no_grad():
        for p in task.network.output.parameters():  # type: ignore[union-attr]
            p.zero_()
    metrics = task.evaluate(task.network.eval())
    assert metrics["perplexity"] == pytest.approx(len(task.data.vocabulary), rel=1e-6)
    assert metrics["test_loss"] == metrics["validation_loss"] == pytest.approx(math.log(len(task.data.vocabulary)))


def test_unigram_loss_by_hand() -> None:
    task = task_of()
    train_text, test_text = task.data.train.tolist(), task.data.test.tolist()
    total = len(train_text) + len(task.data.vocabulary)
    nats = [-math.log((train_text.count(token) + 1) / total) for token in test_text[1:]]
    assert task.evaluate(task.network)["unigram_loss"] == pytest.approx(sum(nats) / len(nats))


def test_evaluation_leaves_the_state_alone() -> None:
    task = task_of()
    task.sample_losses(next(task.batches(0)))
    before = [s.clone() for s in task.state]
    task.evaluate(task.network)
    assert all(torch.equal(a, b) for a, b in zip(before, task.state, strict=True))


def test_words_have_no_bits_per_character(monkeypatch: pytest.MonkeyPatch) -> None:
    words = data.TextData(**vars(data.load("pydoc-topics", train_size=1500)) | {"unit": "word"})
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: words)
    task = task_of()
    assert set(task.evaluate(task.network)) == {"test_loss", "perplexity", "validation_loss", "unigram_loss"}


# --- runs -------------------------------------------------------------------------------------------------------------


@each_network
@pytest.mark.parametrize("optimizer", ["koala_m", "sgd", "adam"])
def test_every_optimizer_learns_to_use_the_context(name: str, optimizer: str) -> None:
    sgd = {"lr": {"lstm": 0.5, "transformer": 0.1}[name], "momentum": 0.9}
    rate = {"sgd": sgd, "adam": {"lr": 1e-2}}.get(optimizer, {"formulas": "released"})
    args = {"embedding": 16, "hidden": 32} if name == "lstm" else {"width": 16}
    config = TINY.but(model=name, model_args=args, optimizer=optimizer, optimizer_args=rate, train_size=12_000)
    result = train.train(config.but(batch_size=4, milestones=()))
    assert result.status == "done"
    assert result.final["test_loss"] < result.final["unigram_loss"] - 0.1
    assert result.final["perplexity"] == pytest.approx(math.exp(result.final["test_loss"]), rel=1e-4)


class _Interrupt(Exception):
    pass


def interrupted(config: RunConfig, stop: int, checkpoint: Path) -> train.RunResult:
    """A run that is broken off after some steps and then goes on."""

    def interrupt(done: int, total: int) -> None:
        if done == stop + 1:  # a checkpoint is written after the call, so `stop` is the last step that was kept
            raise _Interrupt

    with pytest.raises(_Interrupt):
        train.train(config, checkpoint=checkpoint, checkpoint_seconds=0, on_step=interrupt)
    return train.train(config, checkpoint=checkpoint)


@each_network
@pytest.mark.parametrize("optimizer", ["koala_m", "adam"])
def test_resume_in_the_middle_of_an_epoch_gives_the_same_bits(name: str, optimizer: str, tmp_path: Path) -> None:
    config = TINY.but(model=name, model_args=SMALL[name] | {"dropout": 0.3}, optimizer=optimizer)
    whole, stop = train.train(config), random.SystemRandom().randrange(1, 2 * 11)
    rest = interrupted(config, stop, tmp_path / "checkpoint.pt")
    assert rest.epochs == whole.epochs, f"stopped after {stop}"
    assert rest.provenance["weights_sha256"] == whole.provenance["weights_sha256"], f"stopped after {stop}"


def test_without_the_state_a_resumed_run_would_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train.train(TINY)

    def forget(task: LanguageModel, state: Mapping[str, Tensor]) -> None:
        assert set(state) == {"h", "c"}

    monkeypatch.setattr(LanguageModel, "load_state_dict", forget)
    rest = interrupted(TINY, 5, tmp_path / "checkpoint.pt")
    assert rest.provenance["weights_sha256"] != whole.provenance["weights_sha256"]


def test_key_follows_text_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"task_args": {"sequence_length": 17}},
        {"task_args": {"sequence_length": 16, "clip_norm": 1.0}},
        {"model": "transformer", "model_args": {}},
        {"dataset": "tinyshakespeare"},
        {"train_size": None},
    ]
    keys = {TINY.but(**change).key for change in changes}
    assert len(keys) == len(changes)
    assert TINY.but(task_args={"sequence_length": 16.0}).key == TINY.key
    monkeypatch.setattr(data, "identity", lambda name: "another version of Python")
    assert TINY.key not in keys


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"task_args": {"sequence_length": 0}}, ValueError, "sequence_length must be a whole number >= 1, got 0"),
        ({"task_args": {"clip_norm": -1}}, ValueError, "clip_norm must be a finite number >= 0, got -1"),
        ({"task_args": {"pieces": 1}}, ValueError, "pieces must be 0 or a whole number >= 2, got 1"),
        ({"task_args": {"pieces": 6}}, ValueError, "pieces=6 exceeds the 5 windows of an epoch"),
        ({"task_args": {"evaluation_size": -1}}, ValueError, "evaluation_size must be 0 or a whole number >= 2"),
        ({"task_args": {"clip_norm": math.inf}}, ValueError, "clip_norm must be a finite number >= 0, got inf"),
        ({"task_args": {"bptt": 35}}, TypeError, "no option 'bptt'; it has sequence_length, clip_norm, pieces"),
        ({"augment": True}, ValueError, "augment=True: there are no crops of a text"),
        ({"train_size": 100}, ValueError, "batch_size=8 rows of sequence_length=16 need more than the 100 training"),
        ({"model_args": {"hiden": 3}}, TypeError, "hiden"),
    ],
)
def test_bad_options_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        train.train(TINY.but(**change))


@pytest.mark.parametrize("change", [{"dataset": "digits"}, {"model": "resnet8"}])
def test_images_and_their_networks_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is unknown; known are .* of task 'language_model'"):
        TINY.but(**change)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_network
def test_cuda_gives_the_same_losses(name: str) -> None:
    config = TINY.but(model=name, model_args=SMALL[name], task_args={"sequence_length": 16, "clip_norm": 0.5})
    here, there = train.train(config), train.train(config, device="cuda")
    for a, b in zip(here.epochs, there.epochs, strict=True):
        assert b == pytest.approx(a, rel=1e-3)
