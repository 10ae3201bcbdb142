"""Beam search for the best continuation of any model that gives log-probabilities of next tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from koala_lab.data.pairs import EOS, PAD


@torch.no_grad()
def beam_search(
    log_probs: Callable[[Tensor, Tensor], Tensor],
    limits: Sequence[int],
    *,
    beam: int = 1,
    length_penalty: float = 0.6,
    device: torch.device | str = "cpu",
) -> list[list[int]]:
    """Search the best sentence for each of several sources at once.

    ``beam`` beginnings are kept for each source. One that ends while it is among the ``beam`` most probable is put
    aside, and the search is over when so many are, or at the limit, where all must end. Of those put aside the one with
    the largest ``log p / ((5 + length) / 6) ** length_penalty`` is the result (Wu et al., arXiv 1609.08144, eq. 14,
    without coverage); ``<eos>`` counts in the length. With ``beam=1`` this is greedy search.

    Args:
        log_probs: Called with beginnings, int64 ``(R, t)``, which all start with ``EOS``, and the number of the source
            of each, ``(R,)``; returns the log-probability of each next token, ``(R, vocabulary)``.
        limits: For each source, how many tokens its result may have, ``<eos>`` included.
        beam: At least 1.
        length_penalty: 0 prefers short sentences, 1 does not.
        device: Where the beginnings live.

    Returns:
        Token numbers for each source, without ``EOS``; none where no sentence has a probability, as with weights that
        are not finite.
    """
    ended: list[list[tuple[float, list[int]]]] = [[] for _ in limits]
    limit = torch.tensor(limits, device=device)
    source = torch.arange(len(limits), device=device)  # of those still searched for
    tokens = torch.full((len(limits), beam, 1), EOS, device=device)
    scores = torch.full((len(limits), beam), -torch.inf, device=device)
    scores[:, 0] = 0.0  # the others would be copies of the first
    while len(source):
        length = tokens.shape[2]  # of sentences that end now
        following = log_probs(tokens.flatten(0, 1), source.repeat_interleave(beam)).view(len(source), beam, -1)
        size = following.shape[2]
        column = torch.arange(size, device=device)
        forbidden = (column == PAD) | ((column != EOS) & (limit[source] == length)[:, None])
        totals = (scores[:, :, None] + following).masked_fill(forbidden[:, None], -torch.inf).flatten(1)
        best, index = totals.topk(min(2 * beam, totals.shape[1]))
        before, token = index // size, index % size
        ends = (token == EOS) & best.isfinite()
        for i, k in ends[:, :beam].nonzero().tolist():
            score = best[i, k].item() / ((5 + length) / 6) ** length_penalty
            ended[int(source[i])].append((score, tokens[i, before[i, k], 1:].tolist()))
        on = ends.long().argsort(dim=1, stable=True)[:, :beam]  # most probable first, endings last
        kept = tokens.gather(1, before.gather(1, on)[:, :, None].expand(-1, -1, length))
        tokens = torch.cat([kept, token.gather(1, on)[:, :, None]], 2)
        scores = best.masked_fill(ends, -torch.inf).gather(1, on)
        enough = torch.tensor([len(ended[i]) >= beam for i in source.tolist()], device=device)
        rest = ~(enough | (limit[source] == length))
        source, tokens, scores = source[rest], tokens[rest], scores[rest]
    return [max(hypotheses, default=(0.0, []))[1] for hypotheses in ended]
