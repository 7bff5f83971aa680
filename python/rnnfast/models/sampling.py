"""Generation of text by repeated sampling.

The model reads the prime once and then its own output token by token, with the state carried, so a
step costs the same however long the text grows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .language_model import LanguageModel


def next_token_probabilities(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    excluded: Sequence[int] = (),
) -> Tensor:
    """The distribution that the next token is drawn from.

    The restrictions apply in this order: excluded tokens, temperature, top-k, top-p.

    Args:
        logits: (S, V), one row for each sample.
        temperature: divides the logits; below 1 favours likely tokens, above 1 unlikely ones, and 0
            leaves the most likely token alone.
        top_k: keep only the k most likely tokens.
        top_p: keep only the fewest tokens whose probabilities sum to p or more, the most likely
            first (Holtzman et al. 2020).
        excluded: tokens that may never be drawn.

    Returns:
        probabilities (S, V), float64.

    Raises:
        ValueError: a temperature below 0, top_k below 1, top_p outside (0, 1], or every token
            excluded.
    """
    check_sampling(temperature, top_k, top_p)
    size = logits.shape[-1]
    # In float64, so that dividing by a small temperature and adding up many tails stay harmless.
    scores = logits.double()
    if excluded:
        if len(set(excluded)) >= size:
            raise ValueError(f"all {size} tokens are excluded")
        scores = scores.index_fill(
            -1, torch.tensor(list(excluded), device=scores.device), -torch.inf
        )
    if temperature == 0:
        return torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)
    # With the largest score at 0, no temperature can overflow.
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < size:
        best = scores.topk(top_k, dim=-1)
        scores = torch.full_like(scores, -torch.inf).scatter(-1, best.indices, best.values)
    probabilities = scores.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        mass_before = ordered.cumsum(-1) - ordered
        kept = ordered.masked_fill(mass_before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, kept)
        probabilities /= probabilities.sum(-1, keepdim=True)
    return probabilities


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuses values that describe no distribution.

    Raises:
        ValueError: see `next_token_probabilities`.
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be finite and at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")


@torch.no_grad()
def generate(
    model: LanguageModel,
    prime: Sequence[int],
    length: int,
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    excluded: Sequence[int] = (),
    seed: int | None = None,
) -> Tensor:
    """Continues a text.

    Args:
        model: put in evaluation mode while it generates.
        prime: tokens to continue, at least one.
        length: tokens to generate.
        num_samples: independent continuations S, generated as one batch.
        temperature, top_k, top_p, excluded: see `next_token_probabilities`.
        seed: of the drawing; the same seed gives the same tokens. None draws from torch's global
            generator.

    Returns:
        the generated tokens without the prime, int64, shape (S, length), on the CPU.

    Raises:
        ValueError: an empty prime, a negative length, fewer than one sample, or a sampling
            parameter
            out of range.
        IndexError: a token of the prime isn't in the vocabulary.
    """
    check_sampling(temperature, top_k, top_p)
    if len(prime) == 0:
        raise ValueError("the prime is empty; it must hold at least one token")
    for token in prime:
        if not 0 <= token < model.vocabulary_size:
            raise IndexError(f"token {token} is outside a vocabulary of {model.vocabulary_size}")
    if length < 0:
        raise ValueError(f"length is {length}; it must be at least 0")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be at least 0 and below 2**63")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    device = model.embedding.weight.device
    samples = torch.empty(num_samples, length, dtype=torch.int64)
    tokens = torch.tensor(list(prime), device=device).unsqueeze(1).expand(-1, num_samples)
    was_training = model.training
    model.eval()
    try:
        state = None
        for step in range(length):
            logits, state = model(tokens, state)
            probabilities = next_token_probabilities(
                logits[-1].cpu(),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                excluded=excluded,
            )
            drawn = torch.multinomial(probabilities, 1, generator=generator)
            samples[:, step] = drawn[:, 0]
            tokens = drawn.T.to(device)
    finally:
        model.train(was_training)
    return samples
