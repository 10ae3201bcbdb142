"""Translation: the Transformer against plain formulas, beam search against all sentences, batches, BLEU, resume."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from torch import Tensor, nn

from koala_lab import tasks
from koala_lab.baselines.registry import OPTIMIZERS
from koala_lab.config import RunConfig
from koala_lab.data.pairs import EOS, PAD
from koala_lab.models.beam import beam_search
from koala_lab.models.translation import TRANSLATION_MODELS, EncoderDecoder, sinusoids
from koala_lab.runs import training as train
from koala_lab.tasks.translation import Batch, Translation
from tests.support.guards import NoHostReads

TINY = RunConfig(
    task="translation",
    task_args={"test_size": 8},
    dataset="numbers",
    train_size=100,
    model="transformer",
    model_args={"width": 16, "heads": 2, "layers": 1, "dropout": 0.0},
    optimizer="adam",
    optimizer_args={"lr": 5e-3},
    epochs=2,
    batch_size=16,
    milestones=(1,),
)
each_norm = pytest.mark.parametrize("norm_first", [False, True])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def network_of(vocabulary: int = 11, **changes: Any) -> EncoderDecoder:
    torch.manual_seed(3)
    network = EncoderDecoder(vocabulary, **{"width": 8, "heads": 2, "layers": 2, "dropout": 0.0} | changes).double()
    with torch.no_grad():
        for p in network.parameters():  # biases and gains are not at their initial values either
            p += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    return network


def sentences_of(rows: int, length: int, seed: int = 5, vocabulary: int = 11) -> Tensor:
    return torch.randint(2, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def task_of(config: RunConfig = TINY) -> Translation:
    torch.manual_seed(config.seed)
    task = tasks.create(config, torch.device("cpu"))
    assert isinstance(task, Translation)
    return task


def with_options(**options: Any) -> RunConfig:
    return TINY.but(task_args=dict(TINY.task_args) | options)


# --- the network ------------------------------------------------------------------------------------------------------


def plain_transformer(network: EncoderDecoder, source: list[int], target: list[int], norm_first: bool) -> Tensor:
    """Vaswani et al., sections 3.1 to 3.5, for one sentence and its weights; ``(T, vocabulary)``."""
    state = network.state_dict()
    width, heads = network.embedding.embedding_dim, 2

    def embed(tokens: list[int]) -> Tensor:
        rows = []
        for position, token in enumerate(tokens):
            angles = [position / 10_000 ** (2 * (j // 2) / width) for j in range(width)]
            waves = [math.cos(a) if j % 2 else math.sin(a) for j, a in enumerate(angles)]
            rows.append(state["embedding.weight"][token] * math.sqrt(width) + torch.tensor(waves, dtype=torch.float64))
        return torch.stack(rows)

    def norm(x: Tensor, name: str) -> Tensor:
        deviation = x - x.mean(1, keepdim=True)
        normal = deviation / (deviation.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return normal * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attend(x: Tensor, y: Tensor, name: str, causal: bool) -> Tensor:
        weights, biases = state[f"{name}.in_proj_weight"].chunk(3), state[f"{name}.in_proj_bias"].chunk(3)
        q, k, v = (z @ w.T + b for z, w, b in zip((x, y, y), weights, biases, strict=True))
        found = []
        for i in range(heads):
            part = slice(i * width // heads, (i + 1) * width // heads)
            scores = q[:, part] @ k[:, part].T / math.sqrt(width / heads)
            for t, s in itertools.product(range(len(x)), range(len(y))):
                if causal and s > t:
                    scores[t, s] = -math.inf
            found.append(scores.softmax(1) @ v[:, part])
        return torch.cat(found, 1) @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]

    def dense(x: Tensor, name: str) -> Tensor:
        hidden = (x @ state[f"{name}.linear1.weight"].T + state[f"{name}.linear1.bias"]).clamp(min=0)
        return hidden @ state[f"{name}.linear2.weight"].T + state[f"{name}.linear2.bias"]

    def residual(x: Tensor, part: Any, name: str) -> Tensor:
        return x + part(norm(x, name)) if norm_first else norm(x + part(x), name)

    x = embed(source)
    for i in range(len(network.encoder)):
        at = f"encoder.{i}"
        x = residual(x, lambda z, at=at: attend(z, z, f"{at}.self_attn", False), f"{at}.norm1")
        x = residual(x, lambda z, at=at: dense(z, at), f"{at}.norm2")
    memory = norm(x, "encoder_norm") if norm_first else x
    y = embed(target)
    for i in range(len(network.decoder)):
        at = f"decoder.{i}"
        y = residual(y, lambda z, at=at: attend(z, z, f"{at}.self_attn", True), f"{at}.norm1")
        y = residual(y, lambda z, at=at: attend(z, memory, f"{at}.multihead_attn", False), f"{at}.norm2")
        y = residual(y, lambda z, at=at: dense(z, at), f"{at}.norm3")
    return (norm(y, "decoder_norm") if norm_first else y) @ state["embedding.weight"].T


@each_norm
@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_the_papers(norm_first: bool, training: bool) -> None:
    network = network_of(norm_first=norm_first).train(training)
    source, target = sentences_of(1, 6), sentences_of(1, 4, seed=6)
    with torch.no_grad():
        given = network(source, target)[0]
    expected = plain_transformer(network, source[0].tolist(), target[0].tolist(), norm_first)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)  # positions are float32


@each_norm
def test_later_target_tokens_do_not_change_earlier_outputs(norm_first: bool) -> None:
    network, source, target = network_of(norm_first=norm_first), sentences_of(3, 6), sentences_of(3, 9, seed=6)
    changed = target.clone()
    changed[:, 5:] = 2 + (target[:, 5:] - 1) % 9
    with torch.no_grad():
        before, after = network(source, target), network(source, changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=1e-12, atol=1e-12)
    assert (before[:, 5:] - after[:, 5:]).abs().amax((0, 2)).min() > 1e-3


def test_every_output_sees_every_source_token_and_the_target_so_far() -> None:
    network, source, target = network_of(), sentences_of(1, 6), sentences_of(1, 5, seed=6)
    with torch.no_grad():
        before = network(source, target)
        for i in range(6):
            changed = source.clone()
            changed[0, i] = 2 + (source[0, i] - 1) % 9
            assert (network(changed, target) - before).abs().amax((0, 2)).min() > 1e-6
        changed = target.clone()
        changed[0, 0] = 2 + (target[0, 0] - 1) % 9
        assert (network(source, changed) - before).abs().amax((0, 2)).min() > 1e-6


@each_norm
@pytest.mark.parametrize("training", [True, False])
def test_padding_and_other_rows_change_nothing(norm_first: bool, training: bool) -> None:
    network = network_of(norm_first=norm_first).train(training)
    source, target = sentences_of(3, 5), sentences_of(3, 4, seed=6)
    wide_source = nn.functional.pad(source, (0, 4), value=PAD)
    wide_source[0] = sentences_of(1, 9, seed=7)
    wide_target = nn.functional.pad(target, (0, 3), value=PAD)
    with torch.no_grad():
        alone, padded = network(source, target), network(wide_source, wide_target)[:, :4]
    torch.testing.assert_close(padded[1:], alone[1:], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(padded[0], alone[0]), "its source is longer"


def test_dropout_acts_in_training_only() -> None:
    network, source, target = network_of(dropout=0.5), sentences_of(3, 6), sentences_of(3, 5)
    assert not torch.equal(network.train()(source, target), network(source, target))
    assert torch.equal(network.eval()(source, target), network(source, target))


def test_transformer_base_has_the_papers_size() -> None:
    # Vaswani et al., Table 3: 65 million with 37 000 tokens, which they share between both languages and the output
    with torch.device("meta"):
        base = TRANSLATION_MODELS["transformer_base"](37_000)
        pre_norm = TRANSLATION_MODELS["transformer_base"](37_000, norm_first=True)
    d, hidden = 512, 2048
    attention, dense, norm = 4 * d * d + 4 * d, 2 * d * hidden + hidden + d, 2 * d
    expected = 37_000 * d + 6 * (attention + dense + 2 * norm) + 6 * (2 * attention + dense + 3 * norm)
    count = sum(p.numel() for p in base.parameters())
    assert count == expected
    assert count == pytest.approx(65e6, rel=0.05)
    assert sum(p.numel() for p in pre_norm.parameters()) == expected + 2 * norm


def test_initial_weights() -> None:
    torch.manual_seed(0)
    network = EncoderDecoder(300, width=64)
    assert network.embedding.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    first, second = network.encoder
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    assert first.linear1.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (64 + 256)), rel=0.01)
    assert all(not p.any() for name, p in network.named_parameters() if name.endswith("bias"))
    assert all(torch.equal(p, torch.ones_like(p)) for name, p in network.named_parameters() if "norm1.weight" in name)


def test_bad_sizes_are_named() -> None:
    for width, heads in ((8, 3), (9, 3)):
        with pytest.raises(ValueError, match=f"width must be even and a multiple of heads, got {width} and {heads}"):
            EncoderDecoder(11, width=width, heads=heads)


def test_positions_differ_and_have_one_length() -> None:
    positions = sinusoids(50, 8, torch.device("cpu"))
    torch.testing.assert_close(positions.square().sum(1), torch.full((50,), 4.0))
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 0.05


# --- beam search ------------------------------------------------------------------------------------------------------

VOCABULARY = 4  # <pad>, <eos> and two words


def table(seed: int) -> Any:
    """A model with its own probabilities for every beginning, among which <pad> is the largest."""

    def log_probs(tokens: Tensor, of: Tensor) -> Tensor:
        rows = []
        for beginning, source in zip(tokens.tolist(), of.tolist(), strict=True):
            numbers = random.Random(f"{seed} {source} {beginning}")
            rows.append([5.0, *(2 * numbers.gauss(0, 1) for _ in range(VOCABULARY - 1))])
        return torch.tensor(rows, dtype=torch.float64).log_softmax(1)

    return log_probs


def score_of(log_probs: Any, source: int, sentence: list[int], length_penalty: float) -> float:
    """Of a sentence without <eos>, which is added; eq. 14 of Wu et al."""
    total, tokens = 0.0, [EOS]
    for token in [*sentence, EOS]:
        total += log_probs(torch.tensor([tokens]), torch.tensor([source]))[0, token].item()
        tokens.append(token)
    return total / ((5 + len(sentence) + 1) / 6) ** length_penalty


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_the_best_of_all_sentences(seed: int, length_penalty: float) -> None:
    log_probs, limits = table(seed), [4, 1, 3]
    found = beam_search(log_probs, limits, beam=64, length_penalty=length_penalty)
    for source, limit in enumerate(limits):
        everything = [list(s) for n in range(limit) for s in itertools.product((2, 3), repeat=n)]
        best = max(everything, key=lambda s, i=source: score_of(log_probs, i, s, length_penalty))
        assert found[source] == best


@pytest.mark.parametrize("seed", range(4))
def test_a_beam_of_one_is_greedy(seed: int) -> None:
    log_probs, limits = table(seed), [6, 2, 9]
    for source, found in enumerate(beam_search(log_probs, limits)):
        tokens = [EOS]
        while len(tokens) < limits[source]:
            best = log_probs(torch.tensor([tokens]), torch.tensor([source]))[0, 1:].argmax().item() + 1
            if best == EOS:
                break
            tokens.append(int(best))
        assert found == tokens[1:]


def test_a_beam_finds_what_greedy_search_misses() -> None:
    def log_probs(tokens: Tensor, of: Tensor) -> Tensor:
        rows = {
            (EOS,): [0, 0.01, 0.59, 0.4],
            (EOS, 2): [0, 0.4, 0.3, 0.3],  # 0.59 * 0.4
            (EOS, 3): [0, 0.9, 0.05, 0.05],  # 0.4 * 0.9
        }
        return torch.tensor([rows.get(tuple(t), [0, 1, 0, 0]) for t in tokens.tolist()]).log()

    assert beam_search(log_probs, [5]) == [[2]]
    assert beam_search(log_probs, [5], beam=2) == [[3]]


def test_the_length_penalty_is_exact() -> None:
    first = torch.tensor([0, 0.4, 0.35, 0.25]).double().log()  # the end at once, or a word that comes twice

    def log_probs(tokens: Tensor, of: Tensor) -> Tensor:
        again = nn.functional.one_hot(tokens[:, -1] if tokens.shape[1] == 2 else torch.full_like(of, EOS), VOCABULARY)
        return first.expand(len(of), -1) if tokens.shape[1] == 1 else again.double().log()

    balance = math.log(math.log(0.35) / math.log(0.4)) / math.log(8 / 6)  # between lengths of 1 and 3
    assert beam_search(log_probs, [9], beam=2, length_penalty=balance - 1e-6) == [[]]
    assert beam_search(log_probs, [9], beam=2, length_penalty=balance + 1e-6) == [[2, 2]]


@pytest.mark.parametrize("beam", [2, 3])
def test_sources_do_not_see_each_other(beam: int) -> None:
    together = beam_search(table(7), [5, 3, 8, 4], beam=beam)
    for source, limit in enumerate([5, 3, 8, 4]):
        alone = beam_search(lambda t, of, i=source: table(7)(t, torch.full_like(of, i)), [limit], beam=beam)
        assert alone == [together[source]]
        assert len(together[source]) < limit


# --- batches ----------------------------------------------------------------------------------------------------------


def pairs_in(batches: list[Batch]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    rows = [pair for b in batches for pair in zip(b.source.tolist(), b.target.tolist(), strict=True)]
    return [(tuple(t for t in s if t != PAD), tuple(t for t in g if t != PAD)) for s, g in rows]


def training_pairs(task: Translation) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    source, target = task.data.train
    one = [np.array([i]) for i in range(len(source))]
    return [(tuple(source.padded(i)[0].tolist()), tuple(target.padded(i)[0].tolist())) for i in one]


@pytest.mark.parametrize("max_tokens", [None, 150])
def test_an_epoch_reads_every_pair_once_in_batches_of_like_length(max_tokens: int | None) -> None:
    task = task_of(with_options(max_tokens=max_tokens))
    batches, again, other = list(task.batches(0)), list(task.batches(0)), list(task.batches(1))
    assert len(batches) == len(other) == task.steps_per_epoch
    expected = training_pairs(task)
    assert sorted(pairs_in(batches)) == sorted(pairs_in(other)) == sorted(expected)
    assert pairs_in(batches) == pairs_in(again) != pairs_in(other)
    for batch in batches:
        places = len(batch.source) * max(batch.source.shape[1], batch.target.shape[1])
        assert len(batch.source) <= 16
        assert places <= (max_tokens or math.inf)
        assert batch.tokens == (batch.target != PAD).sum()
    if max_tokens is None:
        assert sorted(len(b.source) for b in batches) == [4, *[16] * 6]
    share = sum(b.tokens for b in batches) / sum(b.target.numel() for b in batches)
    assert share > 0.8, "padding"


def test_too_long_pairs_are_left_out_of_training_only() -> None:
    task = task_of(with_options(max_tokens=12))
    kept = pairs_in(list(task.batches(0)))
    fitting = [pair for pair in training_pairs(task) if max(map(len, pair)) <= 12]
    assert 0 < len(fitting) < 100
    assert sorted(kept) == sorted(fitting)
    assert sum(map(len, task._by_length(task.data.test[0].lengths))) == 500


@pytest.mark.parametrize("start", [0, 1, 6, 7])
def test_a_resumed_epoch_goes_on_with_the_same_batches(start: int) -> None:
    task = task_of()
    rest = list(task.batches(1, start))
    assert len(rest) == 7 - start
    assert pairs_in(rest) == pairs_in(list(task.batches(1))[start:])


# --- a step -----------------------------------------------------------------------------------------------------------


def slow_nats(network: nn.Module, source: tuple[int, ...], target: tuple[int, ...], smoothing: float) -> float:
    """Summed over the tokens of one sentence, in float64, token by token."""
    total = 0.0
    for t, token in enumerate(target):
        given = torch.tensor([[EOS, *target[:t]]])
        with torch.no_grad():
            logits = network(torch.tensor([source]), given)[0, -1]
        log_p = logits - logits.logsumexp(0)
        total -= (1 - smoothing) * log_p[token].item() + smoothing * log_p.mean().item()
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_tokens_and_each_sample_a_sentence(smoothing: float) -> None:
    task = task_of(with_options(label_smoothing=smoothing))
    batch = next(task.batches(0))
    losses = task.sample_losses(batch).detach().double()
    pairs = pairs_in([batch])
    exact = task.network.double()
    nats = torch.tensor([slow_nats(exact, s, g, smoothing) for s, g in pairs], dtype=torch.float64)
    count = torch.tensor([len(g) for _, g in pairs])
    torch.testing.assert_close(losses.mean(), nats.sum() / count.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(losses, nats / count.double().mean(), rtol=1e-5, atol=0)


class Recorder(torch.optim.SGD):
    """SGD that remembers what it was given and leaves the weights alone."""

    losses: Tensor
    gradient: Tensor

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.losses = closure()
        self.gradient = torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]])
        return self.losses


def recorded_step(config: RunConfig) -> tuple[Recorder, Tensor, Tensor]:
    task = task_of(config)
    optimizer = Recorder(task.network.parameters(), lr=0.1)
    batch = next(task.batches(0))
    returned = task.step(batch, {"network": optimizer})
    return optimizer, returned, task.sample_losses(batch).detach()


def test_the_optimizer_sees_the_loss_of_every_sentence() -> None:
    optimizer, returned, expected = recorded_step(TINY)
    assert len(expected) == 16
    torch.testing.assert_close(optimizer.losses.detach(), expected)
    torch.testing.assert_close(returned, expected.mean().reshape(1))
    assert not returned.requires_grad


def test_clipping_shortens_the_gradient_and_nothing_else() -> None:
    free, loss, _ = recorded_step(TINY)
    norm = free.gradient.norm().item()
    for limit, expected in ((norm / 3, norm / 3), (norm * 3, norm)):
        clipped, same, _ = recorded_step(with_options(clip_norm=limit))
        assert clipped.gradient.norm().item() == pytest.approx(expected, rel=1e-4)
        torch.testing.assert_close(clipped.gradient / expected, free.gradient / norm, rtol=1e-4, atol=1e-6)
        assert torch.equal(same, loss)


def test_a_step_reads_nothing_back_to_the_host() -> None:
    config = with_options(clip_norm=0.1, max_tokens=200).but(optimizer="koala_m", optimizer_args={})
    run = train.TrainingRun(config, torch.device("cpu"))  # torch's Adam itself reads its counter on the CPU
    with NoHostReads():
        for batch in run.task.batches(0):
            run.train_step(batch)
    assert run.step == run.task.steps_per_epoch > 3


# --- metrics ----------------------------------------------------------------------------------------------------------


def trained_task() -> Translation:
    run = train.TrainingRun(TINY.but(train_size=600), torch.device("cpu"))
    for batch in run.task.batches(0):
        run.train_step(batch)
    assert isinstance(run.task, Translation)
    run.task.network.eval()
    return run.task


def slow_greedy(network: nn.Module, source: Tensor) -> list[int]:
    tokens = [EOS]
    while len(tokens) < 2 * source.shape[1] + 10:
        scores = network(source, torch.tensor([tokens]))[0, -1]
        scores[PAD] = -math.inf
        tokens.append(int(scores.argmax()))
        if tokens[-1] == EOS:
            return tokens[1:-1]
    return tokens[1:]


def test_metrics_against_slow_loops_and_sacrebleu() -> None:
    task = trained_task()
    metrics = task.evaluate(task.network)
    exact = trained_task().network.double()
    for part in ("validation", "test"):
        source, target = getattr(task.data, part)
        rows = [(source.padded(np.array([i])), target.padded(np.array([i]))) for i in range(len(source))]
        nats = count = 0.0
        for s, g in rows:
            with torch.no_grad():
                log_p = exact(s, nn.functional.pad(g[:, :-1], (1, 0), value=EOS)).log_softmax(2)
            nats, count = nats - log_p.gather(2, g[:, :, None]).sum().item(), count + g.numel()
        assert metrics[f"{part}_loss"] == pytest.approx(nats / count, rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["test_loss"]))
    with torch.no_grad():
        tokens = [slow_greedy(task.network, task.data.test[0].padded(np.array([i]))) for i in range(8)]
    text = [task.data.tokenizer.decode(t).strip() for t in tokens]
    assert task.translate(task.network, task.data.test[0].first(8)) == text
    expected = sacrebleu.corpus_bleu(text, [list(task.data.test_lines[1][:8])]).score
    assert metrics["bleu"] == pytest.approx(expected)
    assert 0 < expected < 100
    provenance = task.provenance()
    assert provenance["bleu"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert provenance["translations"][1] == [task.data.test_lines[0][1], task.data.test_lines[1][1], text[1]]


def test_a_perfect_translation_has_bleu_100(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of()
    monkeypatch.setattr(Translation, "translate", lambda self, *_: list(self.data.test_lines[1][:8]))
    assert task.evaluate(task.network)["bleu"] == pytest.approx(100)


@pytest.mark.parametrize("beam", [1, 2])
def test_a_diverged_run_is_a_failed_one(beam: int) -> None:
    broken = {"optimizer": "sgd", "optimizer_args": {"lr": 1e30}}
    result = train.train(with_options(beam=beam).but(**broken))
    assert (result.status, result.epochs) == ("failed", ())
    task = task_of(with_options(beam=beam))
    with torch.no_grad():
        task.network.embedding.weight.fill_(math.nan)
    assert math.isnan(task.evaluate(task.network)["test_loss"])
    assert task.translate(task.network, task.data.test[0].first(3)) == ["", "", ""]


def test_beam_search_of_a_network_sees_whole_sentences() -> None:
    task = trained_task()
    task.beam = 3
    network, sources = task.network, task.data.test[0].first(5)
    expected = []
    for i in range(5):
        source = sources.padded(np.array([i]))

        def log_probs(tokens: Tensor, of: Tensor, source: Tensor = source) -> Tensor:
            return network(source.expand(len(of), -1), tokens)[:, -1].log_softmax(1)

        [tokens] = beam_search(log_probs, [2 * source.shape[1] + 10], beam=3, length_penalty=0.6)
        expected.append(task.data.tokenizer.decode(tokens).strip())
    assert task.translate(network, sources) == expected


# --- runs -------------------------------------------------------------------------------------------------------------


def test_adam_learns_to_translate() -> None:
    result = train.train(TINY.but(train_size=None, model_args={"width": 32, "layers": 1}, epochs=2, milestones=()))
    assert result.status == "done"
    assert result.final["bleu"] > 50
    assert result.final["test_loss"] < 1
    assert len(result.provenance["translations"]) == 3
    assert train.RunResult.from_json(result.to_json()) == result


@pytest.mark.parametrize("optimizer", [name for name, method in OPTIMIZERS.items() if not method.own_forward])
def test_every_optimizer_trains_it(optimizer: str) -> None:
    rates = {"sgd": 0.1, "fromage": 0.01, "adadelta": 1.0, "koala_v": 1.0, "koala_m": 1.0}
    options = {"lr": rates.get(optimizer, 3e-3)}
    result = train.train(TINY.but(optimizer=optimizer, optimizer_args=options, epochs=3, milestones=()))
    assert result.status == "done"
    assert result.epochs[-1]["train_loss"] < result.epochs[0]["train_loss"]


@pytest.mark.parametrize("wrapper", ["lookahead", "swa"])
def test_wrappers_train_it(wrapper: str) -> None:
    options = {"swa": {"start": 1}}.get(wrapper, {})
    result = train.train(TINY.but(wrapper=wrapper, wrapper_args=options))
    assert result.status == "done"


def test_an_optimizer_with_its_own_forward_pass_is_refused() -> None:
    with pytest.raises(ValueError, match="'meka' runs the forward pass itself and needs a loss"):
        train.train(TINY.but(optimizer="meka", optimizer_args={}))


class _Interrupt(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["koala_m", "adam"])
def test_resume_in_the_middle_of_an_epoch_gives_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    config = TINY.but(optimizer=optimizer, optimizer_args={}, model_args=dict(TINY.model_args) | {"dropout": 0.3})
    whole, stop, checkpoint = train.train(config), random.SystemRandom().randrange(1, 14), tmp_path / "checkpoint.pt"

    def interrupt(done: int, total: int) -> None:
        if done == stop + 1:  # a checkpoint is written after the call, so `stop` is the last step that was kept
            raise _Interrupt

    with pytest.raises(_Interrupt):
        train.train(config, checkpoint=checkpoint, checkpoint_seconds=0, on_step=interrupt)
    rest = train.train(config, checkpoint=checkpoint)
    assert rest.epochs == whole.epochs, f"stopped after {stop}"
    for name in ("weights_sha256", "translations"):
        assert rest.provenance[name] == whole.provenance[name], f"stopped after {stop}"


def test_key_follows_data_and_options() -> None:
    changes: list[dict[str, Any]] = [
        {},
        *({"task_args": {"test_size": 8} | more} for more in ({"beam": 4}, {"clip_norm": 1.0}, {"max_tokens": 500})),
        {"dataset": "multi30k"},
        {"model": "transformer_base", "model_args": {}},
        {"train_size": None},
    ]
    assert len({TINY.but(**change).key for change in changes}) == len(changes)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"task_args": {"max_tokens": 0}}, ValueError, "max_tokens must be None or a whole number >= 1, got 0"),
        (
            {"task_args": {"max_tokens": 3}},
            ValueError,
            "max_tokens=3 is less than the shortest pair of numbers",
        ),
        ({"task_args": {"beam": 0}}, ValueError, "beam must be a whole number >= 1, got 0"),
        ({"task_args": {"test_size": 0.5}}, ValueError, "test_size must be None or a whole number >= 1, got 0.5"),
        (
            {"task_args": {"label_smoothing": 1}},
            ValueError,
            r"label_smoothing must be .* number in \[0, 1\), got 1",
        ),
        ({"task_args": {"length_penalty": -1}}, ValueError, "length_penalty must be a finite number >= 0, got -1"),
        ({"task_args": {"clip_norm": math.nan}}, ValueError, "clip_norm must be a finite number >= 0, got nan"),
        ({"task_args": {"tokens": 35}}, TypeError, "no option 'tokens'; it has max_tokens, label_smoothing"),
        ({"augment": True}, ValueError, "augment=True: there are no crops of a sentence"),
        ({"model_args": {"hiden": 3}}, TypeError, "hiden"),
    ],
)
def test_bad_options_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        train.train(TINY.but(**change))


@pytest.mark.parametrize("change", [{"dataset": "digits"}, {"model": "lstm"}, {"dataset": "tinyshakespeare"}])
def test_what_is_no_translation_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is unknown; known are .* of task 'translation'"):
        TINY.but(**change)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same_losses() -> None:
    config = with_options(clip_norm=0.5, beam=2)
    here, there = train.train(config), train.train(config, device="cuda")
    for a, b in zip(here.epochs, there.epochs, strict=True):
        assert b["test_loss"] == pytest.approx(a["test_loss"], rel=1e-3)
