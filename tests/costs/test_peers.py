"""The peers' algorithms beside published times."""

import pytest

from fastdpo.costs.gpus import GPUS
from fastdpo.costs.peers import ALGORITHMS, PUBLISHED
from fastdpo.costs.steps import Shape

SHAPE, H100 = Shape(4096, 32000, 2048), GPUS["H100"]


def test_published_times_are_reproduced_from_pass_counts():
    ratios = {}
    for one in PUBLISHED:
        modelled = ALGORITHMS[one.algorithm].seconds(one.shape, GPUS[one.gpu], **one.parts)
        ratios.setdefault(one.algorithm, []).append(modelled / one.seconds)
    near = {name for name, found in ratios.items() if any(0.8 < ratio < 1.2 for ratio in found)}
    assert {"eager", "cce", "liger scaled ce"} <= near
    assert all(ratio < 1.05 for found in ratios.values() for ratio in found)  # a floor: nobody is faster


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_step_is_the_sum_of_its_parts(name):
    algorithm, one = ALGORITHMS[name], SHAPE.one_pass / H100.flops
    forward, whole = algorithm.seconds(SHAPE, H100, backward=False), algorithm.seconds(SHAPE, H100)
    assert algorithm.step(SHAPE, H100) == pytest.approx(whole + forward)
    assert algorithm.step(SHAPE, H100, reference=False) == pytest.approx(whole)
    frozen = algorithm.step(SHAPE, H100, frozen=True)
    assert algorithm.step(SHAPE, H100) - frozen == pytest.approx(algorithm.dweight * one)
    assert forward >= one and frozen > 3 * one * 0.85  # two forwards and a product, which cce thins out


def test_the_table_beside_published_times(capsys):
    from fastdpo.costs import peers

    peers.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(tuple(ALGORITHMS)) for line in lines) == len(PUBLISHED)
