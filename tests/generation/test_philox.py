"""The random numbers behind sampling: published answers, and independence of batch and blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from philox_answers import KNOWN_ANSWERS, philox_in_python
from scipy import stats
from tlstm_kernels.philox import philox4x32

from tlstm.generation.philox import GumbelNoise, gumbel, noise_of_tokens, seed_words, token_noise, uniform


def noise_in_python(seed: int, position: int, return_index: int, token: int) -> float:
    words = philox_in_python([token >> 2, position, return_index, 0], [seed % 2**32, seed >> 32])
    u = np.float32((words[token & 3] >> 9) + 0.5) * np.float32(2.0**-23)
    return -math.log(-math.log(float(u)))


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, words) -> None:
    got = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, got)) == words
    assert tuple(philox_in_python(counter, key)) == words


def test_noise_of_every_token_is_where_its_definition_says() -> None:
    seeds, index, positions = [0, 2**64 - 1, 0x123456789ABCDEF0], [0, 3, 1], [1, 70_001, 2**32 - 2]
    noise = token_noise(seed_words(seeds), torch.tensor(positions), torch.tensor(index), 65)
    for row in range(3):
        for token in (0, 1, 2, 3, 4, 31, 63, 64):
            expected = noise_in_python(seeds[row], positions[row], index[row], token)
            assert float(noise[row, token]) == pytest.approx(expected, rel=2**-23, abs=2**-30)


def test_uniform_is_exact_and_never_0_or_1() -> None:
    u = uniform(torch.tensor([0, 511, 512, 2**32 - 1])).to(torch.float64)
    assert u.tolist() == [2.0**-24, 2.0**-24, 3 * 2.0**-24, 1 - 2.0**-24]
    ends = gumbel(torch.tensor([0, 2**32 - 1]))
    assert torch.isfinite(ends).all()
    assert ends.tolist() == pytest.approx([-math.log(24 * math.log(2)), 24 * math.log(2)], rel=1e-6)


def test_noise_follows_the_gumbel_distribution() -> None:
    noise = token_noise(seed_words([5]), torch.arange(300)[None], torch.tensor([0]), 65)
    assert stats.kstest(noise.flatten().double().numpy(), stats.gumbel_r.cdf).pvalue > 1e-3
    streams = token_noise(seed_words([5, 6, 5]), torch.tensor([9, 9, 9]), torch.tensor([0, 0, 1]), 20_000)
    correlation = np.corrcoef(streams.numpy())  # another seed or return index is another stream
    assert np.abs(correlation - np.eye(3)).max() < 5 / math.sqrt(20_000)


@pytest.mark.parametrize("vocab_size", [13, 65, 70_001])
def test_neither_blocks_nor_batch_change_the_noise(vocab_size) -> None:
    seeds, index, positions = [3, 4, 3], [0, 0, 2], [1, 129, 7]
    steps = 3 if vocab_size > 10_000 else 300  # several blocks
    together = GumbelNoise(seeds, index, positions, vocab_size)
    alone = [GumbelNoise([s], [r], [p], vocab_size) for s, r, p in zip(seeds, index, positions, strict=True)]
    kept = [0, 1, 2]
    for step in range(steps):
        if step == steps // 2:
            kept = [2, 0]
            together.select(torch.tensor(kept))
        noise = together.next()
        singles = torch.cat([source.next() for source in alone])
        assert torch.equal(noise, singles[kept])


def test_noise_of_some_tokens_is_that_of_all() -> None:
    whole, some = GumbelNoise([9, 10], [0, 1], [5, 6], 257), GumbelNoise([9, 10], [0, 1], [5, 6], 257)
    for step in range(9):
        ids = torch.tensor([[3, 256, 77], [0, 1, 2]])
        expected = whole.next()
        got = some.next().gather(1, ids) if step % 3 == 0 else some.next_of(ids)
        assert torch.equal(got, expected.gather(1, ids))
    direct = noise_of_tokens(seed_words([9]), torch.tensor([5]), torch.tensor([0]), torch.arange(257)[None])
    assert torch.equal(direct, token_noise(seed_words([9]), torch.tensor([5]), torch.tensor([0]), 257))
